"""What a method is, and the two runs of a pair that most of them start from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

import gptoss_workbench as wb
from gptoss_workbench.model.model import Model
from gptoss_workbench.model.run import Run
from gptoss_workbench.planted import Pair

Scores = Callable[[Model, Pair], np.ndarray]
Whole = Callable[[Model, Pair], float]

KEPT = (*wb.COMPONENT_SITES, "resid_pre", "attn.pattern", "router.logits")


def metric_of(run: Run, pair: Pair) -> float:
    """Logit of the answer minus logit of the other token, after the last token."""
    logits = run.model.transformer.unembed(run.hidden[-1])
    return float(logits[pair.answer] - logits[pair.other])


@lru_cache(maxsize=64)  # every method asks about the same pairs
def both(model: Model, pair: Pair) -> tuple[Run, Run]:
    """The clean and the corrupt run, with all that methods read from them."""
    clean, corrupt = (model.run(list(ids), capture=KEPT) for ids in (pair.clean, pair.corrupt))
    return clean, corrupt


def whole_effect(model: Model, pair: Pair) -> float:
    """What there is to explain: the metric of the clean prompt minus that of the corrupt one."""
    clean, corrupt = both(model, pair)
    return metric_of(clean, pair) - metric_of(corrupt, pair)


def grid(model: Model, index: int, tokens: int, fill: float = 0.0) -> np.ndarray:
    return np.full((model.config.num_hidden_layers, index, tokens), fill)


@dataclass(frozen=True)
class Method:
    """A way to find out which places matter.

    Attributes:
        name: for the table.
        kind: what it scores: "residual", "attention", "mlp", "head", "expert", "router" or "sink".
        scores: (model, pair) -> (layer, index, token), see methods.py.
        tells: which of layer, token, head, expert it names. Without "token" its scores have one entry for the whole
            prompt, or say something of one token alone.
        in_logits: whether scores are effects on the metric, so that they can be held against the whole effect.
        whole: (model, pair) -> the whole effect.
        few: it costs more, or is much like another: ask it about a few of the models without a circuit, and about those
            circuits alone that have a place of its kind.
    """

    name: str
    kind: str
    scores: Scores
    tells: tuple[str, ...]
    in_logits: bool = True
    whole: Whole = whole_effect
    few: bool = False


WHERE, HEAD, EXPERT = ("layer", "token"), ("layer", "token", "head"), ("layer", "token", "expert")
