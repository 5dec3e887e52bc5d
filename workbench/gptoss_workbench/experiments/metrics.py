"""Metrics: one number from next-token logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from gptoss_workbench.experiments.rows import single_id
from gptoss_workbench.model.model import Model


@dataclass(frozen=True)
class Metric:
    """A named function of the next-token logits after the last token of a prompt.

    Attributes:
        name: for labels.
        of: (model, logits (prompt, vocab)) -> (prompt,) float32.
    """

    name: str
    of: Callable[[Model, Tensor], Tensor]


def logit_diff(answer: str | int, other: str | int) -> Metric:
    """Logit of ``answer`` minus logit of ``other``; each a text that is one token, or an id."""

    def of(model: Model, logits: Tensor) -> Tensor:
        return (logits[:, single_id(model, answer)] - logits[:, single_id(model, other)]).float()

    return Metric(f"logit({answer!r}) - logit({other!r})", of)
