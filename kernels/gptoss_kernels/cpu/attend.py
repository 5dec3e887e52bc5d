"""Attention as in ``reference``, with products that are fast on every processor.

One query in each row, as in decoding, goes through compiled tasks: torch's products of so few numbers cost more in
calls, and in threads that wait for each other, than in sums.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gptoss_kernels import reference
from gptoss_kernels.cpu.choice import chosen
from gptoss_kernels.cpu.matmul import matmul
from gptoss_kernels.cpu.small import bits, run, suits, wide


def visible_keys(positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """As ``reference.visible_keys``."""
    rows, columns = key_positions.shape
    if positions.shape != (rows, 1) or columns == 0 or not _computes(positions, key_positions):
        return reference.visible_keys(positions, key_positions, window)
    positions, key_positions = positions.contiguous(), key_positions.contiguous()
    visible = torch.empty(rows, 1, columns, dtype=torch.bool)
    run("revealed", rows, positions.data_ptr(), key_positions.data_ptr(), visible.data_ptr(), columns,
        -1 if window is None else window)
    return visible


def softmax_with_sink(scores: Tensor, sinks: Tensor) -> Tensor:
    """As ``reference.softmax_with_sink``."""
    rows, heads, queries, keys = scores.shape
    if queries != 1 or not suits(scores, sinks) or sinks.shape != (heads,):
        return reference.softmax_with_sink(scores, sinks)
    scores, sinks = scores.contiguous(), sinks.contiguous()
    pattern = torch.empty(rows, heads, 1, keys + 1, dtype=scores.dtype)
    run("softened", rows * heads, scores.data_ptr(), sinks.data_ptr(), pattern.data_ptr(), heads, keys,
        way=wide(scores))
    return pattern


def store_kv(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, column: Tensor) -> None:
    """As ``reference.store_kv``; a column that does not exist is not written."""
    same = keys.shape == values.shape and k.shape == v.shape == (len(keys), 1, *keys.shape[2:])
    whole = keys.is_contiguous() and values.is_contiguous() and column.dtype == torch.int64
    if not (same and whole and suits(keys, values, k, v)):
        return reference.store_kv(keys, values, k, v, column)
    k, v = k.contiguous(), v.contiguous()
    run("stored", len(keys), keys.data_ptr(), values.data_ptr(), k.data_ptr(), v.data_ptr(), column.data_ptr(),
        keys.shape[1], k[0].numel() * k.itemsize)


def attention_scores(q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """As ``reference.attention_scores``."""
    b, t, heads, size = q.shape
    groups = heads // k.shape[2]
    if t == 1 and visible.shape == (b, 1, k.shape[1]) and _suits(q, k):
        q, visible, out = q.contiguous(), visible.contiguous(), torch.empty(b, heads, 1, k.shape[1], dtype=q.dtype)
        run("scored", b * k.shape[2], q.data_ptr(), k.data_ptr(), visible.data_ptr(), out.data_ptr(), k.shape[2],
            groups, size, k.shape[1], *k.stride()[:2], bits(size**-0.5), way=wide(q))
        return out
    q = q.view(b, t, k.shape[2], groups, size).permute(0, 2, 3, 1, 4).reshape(b, k.shape[2], groups * t, size)
    scores = matmul(q, k.permute(0, 2, 3, 1)) * size**-0.5
    return scores.view(b, heads, t, -1).masked_fill(~visible[:, None], -math.inf)


def attention_values(pattern: Tensor, v: Tensor) -> Tensor:
    """As ``reference.attention_values``."""
    b, heads, t, _ = pattern.shape
    kv_heads = v.shape[2]
    if t == 1 and pattern.shape[3] == v.shape[1] + 1 and _suits(pattern, v):
        pattern, out = pattern.contiguous(), torch.empty(b, 1, heads, v.shape[3], dtype=v.dtype)
        run("mixed", b * kv_heads, pattern.data_ptr(), v.data_ptr(), out.data_ptr(), kv_heads, heads // kv_heads,
            v.shape[3], v.shape[1], *v.stride()[:2], way=wide(v))
        return out
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


def _computes(*positions: Tensor) -> bool:
    return (all(one.dtype == torch.int64 and one.device.type == "cpu" for one in positions)
            and chosen(torch.bfloat16) is not None)


def _suits(small: Tensor, cached: Tensor) -> bool:
    """Whether the tasks can take it: the heads of a key or value lie together, wherever the cache has its rows."""
    return (suits(small, cached) and cached.numel() > 0 and len(small) == len(cached)
            and cached.stride()[2:] == (cached.shape[3], 1))
