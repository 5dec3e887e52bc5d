"""Choosing the next token from its logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gptoss_workbench.errors import WorkbenchError


@dataclass(frozen=True)
class Sampling:
    """How to choose.

    Attributes:
        temperature: 0 takes the likeliest token; otherwise logits are divided by it first.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens that together reach this probability (nucleus sampling, arXiv 1904.09751).
        min_p: keep tokens at least this likely relative to the likeliest (arXiv 2407.01082).

    The cuts apply in the order temperature, top_k, top_p, min_p, each on what the one before left.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name, valid, range_ in (
            ("temperature", self.temperature >= 0, "0 or more"), ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"), ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
        ):
            if not valid:
                raise WorkbenchError(f"{name} is out of range.", expected=range_, got=getattr(self, name))


def sample(logits: Tensor, how: Sampling, rng: torch.Generator | None = None) -> tuple[int, float]:
    """logits (vocab,) -> the chosen id and its log-probability (nats) under the model, before any cut."""
    logits = logits.float()
    log_total = torch.logsumexp(logits, dim=-1)
    if how.temperature == 0:
        token = int(logits.argmax())
    else:
        weights = probabilities(logits, how)
        token = int(torch.multinomial(weights if rng is None else weights.to(rng.device), 1, generator=rng))
    return token, float(logits[token] - log_total)


def probabilities(logits: Tensor, how: Sampling) -> Tensor:
    """logits (vocab,) -> the distribution (vocab,) float32 that ``sample`` draws from, for temperature > 0."""
    logits = logits.float() / how.temperature
    if 0 < how.top_k < len(logits):
        keep = torch.topk(logits, how.top_k).indices
        logits = torch.full_like(logits, float("-inf")).scatter(0, keep, logits[keep])
    if how.top_p < 1:
        ordered, order = torch.softmax(logits, dim=-1).sort(descending=True)
        before = ordered.cumsum(0) - ordered  # mass of the likelier tokens: the one that crosses top_p still counts
        logits = logits.index_fill(0, order[before >= how.top_p], float("-inf"))
    weights = torch.softmax(logits, dim=-1)
    if how.min_p > 0:
        weights = torch.where(weights >= how.min_p * weights.max(), weights, 0.0)
        weights = weights / weights.sum()
    return weights
