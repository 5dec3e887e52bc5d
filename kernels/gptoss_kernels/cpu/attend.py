"""Attention as in ``reference``, with products that are fast on every processor."""

from __future__ import annotations

import math

from torch import Tensor

from gptoss_kernels.cpu.matmul import matmul
from gptoss_kernels.reference import softmax_with_sink, visible_keys


def attention_scores(q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """As ``reference.attention_scores``."""
    b, t, heads, size = q.shape
    groups = heads // k.shape[2]
    q = q.view(b, t, k.shape[2], groups, size).permute(0, 2, 3, 1, 4).reshape(b, k.shape[2], groups * t, size)
    scores = matmul(q, k.permute(0, 2, 3, 1)) * size**-0.5
    return scores.view(b, heads, t, -1).masked_fill(~visible[:, None], -math.inf)


def attention_values(pattern: Tensor, v: Tensor) -> Tensor:
    """As ``reference.attention_values``."""
    b, heads, t, _ = pattern.shape
    kv_heads = v.shape[2]
    weights = pattern[..., :-1].reshape(b, kv_heads, heads // kv_heads * t, -1)
    return matmul(weights, v.transpose(1, 2)).view(b, heads, t, -1).transpose(1, 2)


def attention_shown(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, positions: Tensor, key_positions: Tensor, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.attention_shown``."""
    scores = attention_scores(q, k, visible_keys(positions, key_positions, window))
    pattern = softmax_with_sink(scores, sinks)
    return attention_values(pattern, v), scores, pattern


def attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, positions: Tensor, key_positions: Tensor, window: int | None,
) -> Tensor:
    """As ``reference.attention``."""
    return attention_shown(q, k, v, sinks, positions, key_positions, window)[0]
