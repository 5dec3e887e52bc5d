"""Next-token distributions over the distinct rows of the unembedding.

The embedded model gives one shared row to all the ids that never occur in its training text. Each of those ids has the
same logit, so the row is shown once, with the probability of all of them together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptoss_workbench.errors import ExperimentError
from gptoss_workbench.model.model import Model

SHARED = -1  #: the id under which the shared row is shown


def row_counts(model: Model) -> Tensor:
    """How many ids stand behind each row: (row,) int64."""
    weights = model.weights
    if weights.row_of_token is None:
        return torch.ones(len(weights.unembed), dtype=torch.int64, device=model.device)
    return torch.bincount(weights.row_of_token, minlength=len(weights.unembed))


def log_probs(model: Model, hidden: Tensor) -> Tensor:
    """hidden (..., d_model) after the final norm -> log-probability (nats) of all ids of a row, (..., row) float32."""
    logits = model.transformer.unembed_rows(hidden).float()
    return torch.log_softmax(logits + row_counts(model).log(), dim=-1)


def entropy(model: Model, hidden: Tensor) -> Tensor:
    """hidden (..., d_model) -> entropy (nats) of the next-token distribution over all ids, (...,) float32."""
    logits = model.transformer.unembed_rows(hidden).float()
    counts = row_counts(model).float()
    log_p = logits - torch.logsumexp(logits + counts.log(), dim=-1, keepdim=True)  # of one id of each row
    return -(counts * log_p.exp() * log_p).sum(-1)


def token_log_probs(model: Model, hidden: Tensor, ids: Tensor) -> Tensor:
    """Log-probability (nats) of particular ids: hidden (token, d_model), ids (token,) -> (token,) float32."""
    rows = ids if model.weights.row_of_token is None else model.weights.row_of_token[ids]
    together = log_probs(model, hidden).gather(-1, rows[:, None])[:, 0]
    return together - row_counts(model)[rows].log()


def row_id_and_text(model: Model, row: int) -> tuple[int, str]:
    """The id and text under which a row is shown."""
    row_of_token = model.weights.row_of_token
    if row_of_token is None:
        return row, model.vocabulary.token_text(row)
    ids = (row_of_token == row).nonzero()[:, 0]
    if len(ids) == 1:
        return int(ids[0]), model.vocabulary.token_text(int(ids[0]))
    return SHARED, f"⟨any of {len(ids):,} unused tokens⟩"


def single_id(model: Model, token: str | int) -> int:
    """The id of a text that is one token, or the id itself.

    Raises:
        ExperimentError: the text is not one token, or the id is outside the vocabulary.
    """
    if isinstance(token, str):
        ids = model.vocabulary.encode(token)
        if len(ids) != 1:
            parts = [model.vocabulary.token_text(id) for id in ids]
            raise ExperimentError(
                f"{token!r} is not one token.", expected="a text that is one token, or an id",
                got=f"{len(ids)}: {parts}", hint='Words inside a sentence begin with a space: " Paris".',
            )
        return ids[0]
    if not 0 <= token < model.config.vocab_size:
        raise ExperimentError("There is no such token id.", expected=f"0 to {model.config.vocab_size - 1}", got=token)
    return int(token)
