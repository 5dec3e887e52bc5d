"""From what a person asked to what the model did: questions, and runs that are remembered while they are current."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptoss_workbench.hooks.edits import Edit
    from gptoss_workbench.model.model import Model
    from gptoss_workbench.model.run import Run

Banned = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Prompt:
    """What stands in the prompt boxes. Empty system and developer boxes mean harmony's defaults."""

    user: str
    system: str = ""
    developer: str = ""
    effort: str = "medium"

    def conversation(self) -> Any:
        """The harmony Conversation that waits for the assistant."""
        import gptoss_workbench as wb

        return wb.chat(self.user, system=self.system or None, developer=self.developer or None, effort=self.effort)


@dataclass(frozen=True, eq=False)
class Reading:
    """What the model made of a text.

    Attributes:
        ids: the tokens; the first ``prompt_length`` are the prompt, the rest the model's answer.
        run: with the edits, if any; holds ``router``, ``resid_post`` and, when asked for, ``attn.pattern``.
        clean: the same tokens without the edits; None when there are no edits.
    """

    ids: list[int]
    prompt_length: int
    run: Run
    clean: Run | None = None


def ban(banned: Banned) -> list[Edit]:
    """The edits that keep these (layer, expert) pairs from being chosen, one a layer."""
    import gptoss_workbench as wb

    by_layer: dict[int, list[int]] = {}
    for layer, expert in banned:
        by_layer.setdefault(layer, []).append(expert)
    return [wb.ban_experts(layer=layer, experts=sorted(experts)) for layer, experts in sorted(by_layer.items())]


def sites(quantity: str) -> tuple[str, ...]:
    """What the pictures need captured. Attention maps grow with the square of the text: only when asked for."""
    return ("router", "resid_post", "attn.pattern") if quantity == "sink" else ("router", "resid_post")


class Reader:
    """Runs the model, and answers from memory what it has just run."""

    def __init__(self, model: Model, remember: int = 4) -> None:
        self._model, self._remember = model, remember
        self._runs: OrderedDict[tuple, Run] = OrderedDict()

    def run(self, ids: list[int], banned: Banned = (), quantity: str = "") -> Run:
        """The run of these tokens under these edits, with what ``quantity`` needs captured."""
        wanted = sites(quantity)
        for captured in {wanted, sites("sink")}:
            key = (tuple(ids), banned, captured)
            if key in self._runs:
                self._runs.move_to_end(key)
                return self._runs[key]
        made = self._model.run(ids, capture=list(wanted), edits=ban(banned))
        self._runs[tuple(ids), banned, wanted] = made
        while len(self._runs) > self._remember:
            self._runs.popitem(last=False)
        return made

    def read(self, prompt: list[int], answer: list[int], banned: Banned, quantity: str) -> Reading:
        """Run prompt and answer with the edits, and without them if there are any."""
        ids = [*prompt, *answer]
        clean = self.run(ids, (), quantity) if banned else None
        return Reading(ids, len(prompt), self.run(ids, banned, quantity), clean)

    def forget(self) -> None:
        """Let go of the remembered runs."""
        self._runs.clear()
