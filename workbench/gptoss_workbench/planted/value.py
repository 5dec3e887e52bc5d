"""What a planted model is: a model, prompts that exercise it, and what is true about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gptoss_workbench.experiments.metrics import Metric, logit_diff
from gptoss_workbench.model.model import Model


@dataclass(frozen=True, order=True)
class Place:
    """A component that does something at a token.

    Attributes:
        kind: "head", "expert" or "router".
        layer: its layer.
        index: which head or expert; -1 for a router.
        role: at which token, by its role in the prompt (see ``Pair.roles``).
    """

    kind: str
    layer: int
    index: int
    role: str

    def __str__(self) -> str:
        which = f" {self.index}" if self.index >= 0 else ""
        return f"{self.kind}{which} of layer {self.layer} at {self.role}"


@dataclass(frozen=True)
class Pair:
    """Two prompts of equal length that differ in what the circuit is about.

    Attributes:
        clean, corrupt: token ids.
        answer: the token that the model says after ``clean``.
        other: what it is compared with.
        roles: positions by role; "last" is always there. Tokens without a role do nothing in the circuit.
    """

    clean: tuple[int, ...]
    corrupt: tuple[int, ...]
    answer: int
    other: int
    roles: Mapping[str, int] = field(hash=False)

    @property
    def metric(self) -> Metric:
        """Logit of the answer minus logit of the other token."""
        return logit_diff(self.answer, self.other)


@dataclass(frozen=True, eq=False)
class Planted:
    """A model with a circuit that is known because it was put there.

    Attributes:
        name: which circuit.
        seed: of the places, the prompts and the background.
        background: size of the random weights around the circuit, see ``gptoss_workbench.planted``.
        model: the model to examine.
        pairs: prompts.
        truth: the components that carry the difference between clean and corrupt, with their tokens. Empty in a model
            without a circuit.
        decoys: components that are as active as the true ones, at the same tokens, and do not matter for the answer.
        path: where the difference is: for each layer the role of the token whose residual stream carries it into it.
        sink: the head, (layer, head), whose sink is what decides, where there is one.
        build: makes the model anew with other parts, see ``without``, ``bare`` and ``with_window``.
    """

    name: str
    seed: int
    background: float
    model: Model
    pairs: tuple[Pair, ...]
    truth: frozenset[Place]
    decoys: frozenset[Place]
    path: tuple[str, ...]
    sink: tuple[int, int] | None
    build: Callable[..., Model] = field(repr=False)

    def __repr__(self) -> str:
        parts = ", ".join(str(place) for place in sorted(self.truth)) or "no circuit"
        return f"<planted {self.name}, seed {self.seed}, {len(self.pairs)} pairs: {parts}>"

    def without(self, *places: Place) -> Model:
        """The same model with these components of the circuit (or decoys) left out, their background kept."""
        return self.build(without=places)

    def bare(self) -> Model:
        """The circuit alone: no background, no decoys."""
        return self.build(background=0.0, without=tuple(self.decoys))

    def with_window(self, window: int) -> Model:
        """The same weights under another sliding window, in tokens."""
        return self.build(window=window)
