"""Attention in one launch: scores, band, sink, softmax and values, without a score in memory.

A program takes some queries of one group of heads and goes twice over the keys that they can reach: once for the
softmax's sum, once for the values. Going twice lets it multiply the values by the rounded pattern, which is what the
published code does and what a hook shows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptoss_kernels.triton.attention_tiles import mix, scores_of, see, see_sink, shares, vectors
from gptoss_kernels.triton.common import dot_type, power_of_two, rounded

ROWS = 64  # queries of a program, heads counted one by one
KEYS = 64
WARPS = 4
EVERYTHING = 1 << 30  # the window of a band without one


@triton.jit
def attend_kernel(
    q, k, v, sinks, positions, key_positions, z, scores, pattern, tokens, keys, window,
    SCALE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, FACTOR: tl.constexpr, EMIT: tl.constexpr,
):
    """q, z (B, tokens, H, SIZE); k, v (B, keys, KV_HEADS, SIZE); positions (B, tokens), key_positions (B, keys).

    With EMIT also scores (B, H, tokens, keys) and pattern (B, H, tokens, keys + 1), where a query can reach.
    """
    batch, kv_head = tl.program_id(1) // KV_HEADS, tl.program_id(1) % KV_HEADS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    exists = token < tokens
    dtype: tl.constexpr = z.dtype.element_ty
    query_at = ((batch.to(tl.int64) * tokens + token) * (KV_HEADS * GROUP) + head) * SIZE
    query = vectors(q, query_at, exists, SIZE, BLOCK_SIZE)
    place = tl.load(positions + batch * tokens + token, mask=exists, other=-1).to(tl.int32)
    first = tl.load(key_positions + batch * keys).to(tl.int32)  # positions of the keys count up from here
    begin = tl.maximum(tl.min(tl.where(exists, place, 2147483647), 0) - window + 1 - first, 0) // KEYS * KEYS
    end = tl.minimum(tl.max(place, 0) - first + 1, keys)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    emitted = ((batch.to(tl.int64) * (KV_HEADS * GROUP) + head) * tokens + token)[:, None]
    for start in range(begin, end, KEYS):
        column = start + tl.arange(0, KEYS)
        key_at = ((batch.to(tl.int64) * keys + column) * KV_HEADS + kv_head) * SIZE
        key = vectors(k, key_at, column < keys, SIZE, BLOCK_SIZE)
        s = scores_of(query, key, visible(place, first + column, window, column < keys), SCALE, dtype, FACTOR)
        largest, total = see(largest, total, s)
        if EMIT:
            tl.store(scores + emitted * keys + column[None, :], s.to(dtype),
                     mask=exists[:, None] & (column < keys)[None, :])
    sink = tl.load(sinks + head).to(tl.float32)
    largest, inverse = see_sink(largest, total, sink)
    mixed = tl.zeros((ROWS, BLOCK_SIZE), tl.float32)
    for start in range(begin, end, KEYS):
        column = start + tl.arange(0, KEYS)
        key_at = ((batch.to(tl.int64) * keys + column) * KV_HEADS + kv_head) * SIZE
        key = vectors(k, key_at, column < keys, SIZE, BLOCK_SIZE)
        s = scores_of(query, key, visible(place, first + column, window, column < keys), SCALE, dtype, FACTOR)
        share = shares(s, largest, inverse, dtype)
        mixed = mix(mixed, share, vectors(v, key_at, column < keys, SIZE, BLOCK_SIZE), FACTOR)
        if EMIT:
            tl.store(pattern + emitted * (keys + 1) + column[None, :], share.to(dtype),
                     mask=exists[:, None] & (column < keys)[None, :])
    if EMIT:
        tl.store(pattern + emitted * (keys + 1) + keys, shares(sink[:, None], largest, inverse, dtype).to(dtype),
                 mask=exists[:, None])
    i = tl.arange(0, BLOCK_SIZE)
    tl.store(z + query_at[:, None] + i[None, :], rounded(mixed, dtype).to(dtype),
             mask=exists[:, None] & (i < SIZE)[None, :])


@triton.jit
def visible(query, key, window, exists):
    """Positions of queries (rows,) and keys (keys,) -> (rows, keys) bool."""
    distance = query[:, None] - key[None, :]
    return (distance >= 0) & (distance < window) & ((key >= 0) & exists)[None, :]


def attend(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, positions: Tensor, key_positions: Tensor, window: int | None,
    emit: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """q (B, T, H, D) at ``positions`` (B, T) looks at k, v (B, S, K, D) -> z (B, T, H, D), scores and pattern.

    Args:
        key_positions: (B, S), counting up by one from column to column, negative for padding. Columns beyond the
            last query's position may hold anything finite: nobody sees them.
        window: how many keys a query reaches, itself included; None for all.
        emit: give scores (B, H, T, S) and pattern (B, H, T, S + 1) too, the very numbers that were multiplied.
            Otherwise they are None.
    """
    (batch, tokens, heads, size), (_, keys, kv_heads, _) = q.shape, k.shape
    z = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    scores = pattern = None
    if emit:
        scores = torch.full((batch, heads, tokens, keys), -math.inf, dtype=q.dtype, device=q.device)
        pattern = torch.zeros(batch, heads, tokens, keys + 1, dtype=q.dtype, device=q.device)
    factor: Any = dot_type(q.dtype)
    group = heads // kv_heads
    rows = min(ROWS, max(16, power_of_two(tokens * group)))
    attend_kernel[(triton.cdiv(tokens * group, rows), batch * kv_heads)](
        q.contiguous(), k.contiguous(), v.contiguous(), sinks, positions.contiguous(), key_positions.contiguous(), z,
        z if scores is None else scores, z if pattern is None else pattern, tokens, keys,
        EVERYTHING if window is None else window, size**-0.5, kv_heads, group, size, max(16, power_of_two(size)), rows,
        KEYS, factor, emit, num_warps=WARPS)
    return z, scores, pattern
