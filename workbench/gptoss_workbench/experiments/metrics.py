"""Metrics: one number from next-token logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gptoss_workbench.errors import ExperimentError
from gptoss_workbench.experiments.rows import single_id
from gptoss_workbench.model.model import Model


@dataclass(frozen=True)
class Metric:
    """A named function of the next-token logits after the last token of a prompt.

    Attributes:
        name: for labels.
        of: (model, logits (prompt, vocab)) -> (prompt,) float32.
        beside: for a metric that compares with the clean prompt: gives ``of`` from its logits (vocab,).
    """

    name: str
    of: Callable[[Model, Tensor], Tensor]
    beside: Callable[[Tensor], Callable[[Model, Tensor], Tensor]] | None = None

    def given(self, clean: Tensor) -> Metric:
        """The same metric, comparing with these logits (vocab,) where it compares at all."""
        return self if self.beside is None else replace(self, of=self.beside(clean))


def names_of(metrics: Sequence[Metric]) -> np.ndarray:
    """Their names as labels."""
    names = np.empty(len(metrics), dtype=object)
    names[:] = [metric.name for metric in metrics]
    return names


def logit_diff(answer: str | int, other: str | int) -> Metric:
    """Logit of ``answer`` minus logit of ``other``; each a text that is one token, or an id."""

    def of(model: Model, logits: Tensor) -> Tensor:
        return (logits[:, single_id(model, answer)] - logits[:, single_id(model, other)]).float()

    return Metric(f"logit({answer!r}) - logit({other!r})", of)


def probability(answer: str | int) -> Metric:
    """Probability of ``answer`` as the next token.

    Pitfall: it saturates. Where the model is sure, large effects on the logits hardly show.
    """
    def of(model: Model, logits: Tensor) -> Tensor:
        return torch.softmax(logits.float(), -1)[:, single_id(model, answer)]

    return Metric(f"p({answer!r})", of)


def rank(answer: str | int) -> Metric:
    """How many tokens are likelier than ``answer``: 0 when it is the likeliest. It has no gradient."""

    def of(model: Model, logits: Tensor) -> Tensor:
        return (logits > logits[:, single_id(model, answer), None]).sum(-1).float()

    return Metric(f"rank({answer!r})", of)


def kl_divergence() -> Metric:
    """KL(clean || run) of the next-token distributions, in nats: how far a run is from the clean prompt's prediction.

    Experiments with a clean prompt put its logits in. 0 for the clean prompt itself, so that the share that was
    recovered is 1 - KL / KL(corrupt).
    """
    def beside(clean: Tensor) -> Callable[[Model, Tensor], Tensor]:
        log_p = torch.log_softmax(clean.float(), -1)

        def of(model: Model, logits: Tensor) -> Tensor:
            log_q = torch.log_softmax(logits.float(), -1)
            return (log_p.exp() * (log_p - log_q)).sum(-1)

        return of

    def alone(model: Model, logits: Tensor) -> Tensor:
        raise ExperimentError("This metric compares with a clean prompt, and there is none here.",
                              expected="an experiment with clean=, or metric.given(logits)", got="logits alone")

    return Metric("KL(clean || run)", alone, beside)
