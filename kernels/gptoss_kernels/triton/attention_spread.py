"""Attention of a few queries over many keys, which are spread over programs.

Fused attention gives a program all keys of a query. When a single token looks at thousands of keys that leaves most of
a GPU idle. Here a program has a part of them: first for the scores with their largest and their sum of exponentials,
then for the pattern and the values; a third launch adds the parts up. A part that no query reaches ends at once. So a
cache may have more columns than are filled, and how many are only the GPU needs to know.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptoss_kernels.triton.attention_fused import EVERYTHING, visible
from gptoss_kernels.triton.attention_pieces import KEYS, PART, query_rows, sum_kernel
from gptoss_kernels.triton.attention_tiles import mix, scores_of, see, see_sink, shares, vectors
from gptoss_kernels.triton.common import dot_type, power_of_two, rounded


@triton.jit
def spread_scores_kernel(
    q, k, positions, key_positions, scores, seen, tokens, keys, window, SCALE: tl.constexpr, KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PART: tl.constexpr, FACTOR: tl.constexpr,
):
    """Scores (B, H, tokens, keys) of the keys that a query can reach, and seen (parts, B, tokens, H, 2) float32.

    Other arguments as in ``attention_fused``. ``seen`` holds a part's largest score and sum of exponentials.
    """
    batch, kv_head = tl.program_id(2) // KV_HEADS, tl.program_id(2) % KV_HEADS
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    exists = token < tokens
    dtype: tl.constexpr = scores.dtype.element_ty
    query_at = ((batch.to(tl.int64) * tokens + token) * (KV_HEADS * GROUP) + head) * SIZE
    query = vectors(q, query_at, exists, SIZE, BLOCK_SIZE)
    place = tl.load(positions + batch * tokens + token, mask=exists, other=-1).to(tl.int32)
    first = tl.load(key_positions + batch * keys).to(tl.int32)
    begin, end = _reach(place, exists, first, keys, window, KEYS, PART)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    to = ((batch.to(tl.int64) * (KV_HEADS * GROUP) + head) * tokens + token)[:, None] * keys
    for start in range(begin, end, KEYS):
        column = start + tl.arange(0, KEYS)
        key_at = ((batch.to(tl.int64) * keys + column) * KV_HEADS + kv_head) * SIZE
        key = vectors(k, key_at, column < keys, SIZE, BLOCK_SIZE)
        s = scores_of(query, key, visible(place, first + column, window, column < keys), SCALE, dtype, FACTOR)
        largest, total = see(largest, total, s)
        tl.store(scores + to + column[None, :], s.to(dtype), mask=exists[:, None] & (column < keys)[None, :])
    batches = tl.num_programs(2) // KV_HEADS
    at = ((tl.program_id(0).to(tl.int64) * batches + batch) * tokens + token) * (KV_HEADS * GROUP) + head
    tl.store(seen + at * 2, largest, mask=exists)
    tl.store(seen + at * 2 + 1, total, mask=exists)


@triton.jit
def spread_values_kernel(
    scores, seen, v, sinks, positions, key_positions, parts, pattern, tokens, keys, window, KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PART: tl.constexpr, FACTOR: tl.constexpr, EMIT: tl.constexpr,
):
    """Parts (n, B, tokens, H, SIZE) float32: the values that each part's share of the pattern mixes.

    With EMIT also pattern (B, H, tokens, keys + 1), where a query can reach.
    """
    batch, kv_head = tl.program_id(2) // KV_HEADS, tl.program_id(2) % KV_HEADS
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    exists = token < tokens
    dtype: tl.constexpr = scores.dtype.element_ty
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    batches = tl.num_programs(2) // KV_HEADS
    own = (batch.to(tl.int64) * tokens + token) * (KV_HEADS * GROUP) + head
    step = batches.to(tl.int64) * tokens * (KV_HEADS * GROUP)
    for part in range(tl.num_programs(0)):
        at = seen + (part * step + own) * 2
        of_part = tl.load(at, mask=exists, other=float("-inf"))
        new = tl.maximum(largest, of_part)
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(largest - base) + tl.load(at + 1, mask=exists, other=0.0) * tl.exp(of_part - base)
        largest = new
    sink = tl.load(sinks + head).to(tl.float32)
    largest, inverse = see_sink(largest, total, sink)
    place = tl.load(positions + batch * tokens + token, mask=exists, other=-1).to(tl.int32)
    first = tl.load(key_positions + batch * keys).to(tl.int32)
    begin, end = _reach(place, exists, first, keys, window, KEYS, PART)
    mixed = tl.zeros((ROWS, BLOCK_SIZE), tl.float32)
    line = (batch.to(tl.int64) * (KV_HEADS * GROUP) + head) * tokens + token
    for start in range(begin, end, KEYS):
        column = start + tl.arange(0, KEYS)
        inside = exists[:, None] & (column < keys)[None, :]
        s = tl.load(scores + line[:, None] * keys + column[None, :], mask=inside, other=float("-inf")).to(tl.float32)
        share = shares(s, largest, inverse, dtype)
        key_at = ((batch.to(tl.int64) * keys + column) * KV_HEADS + kv_head) * SIZE
        mixed = mix(mixed, share, vectors(v, key_at, column < keys, SIZE, BLOCK_SIZE), FACTOR)
        if EMIT:
            tl.store(pattern + line[:, None] * (keys + 1) + column[None, :], share.to(dtype), mask=inside)
    if EMIT:
        of_sink = shares(sink[:, None], largest, inverse, dtype)
        tl.store(pattern + line[:, None] * (keys + 1) + keys, of_sink.to(dtype),
                 mask=exists[:, None] & (tl.program_id(0) == 0))
    i = tl.arange(0, BLOCK_SIZE)
    to = (tl.program_id(0) * step + own) * SIZE
    tl.store(parts + to[:, None] + i[None, :], rounded(mixed, tl.float32), mask=exists[:, None] & (i < SIZE)[None, :])


@triton.jit
def _reach(place, exists, first, keys, window, KEYS: tl.constexpr, PART: tl.constexpr):
    """From which column to which this program's part goes, as far as its queries can reach."""
    begin = tl.maximum(tl.min(tl.where(exists, place, 2147483647), 0) - window + 1 - first, 0) // KEYS * KEYS
    end = tl.minimum(tl.max(place, 0) - first + 1, keys)
    start = tl.program_id(0) * PART
    return tl.maximum(begin, start), tl.minimum(end, start + PART)


def attend_spread(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, positions: Tensor, key_positions: Tensor, window: int | None,
    emit: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As ``attention_fused.attend``; with its bits where all keys that are reached lie in one part."""
    (batch, tokens, heads, size), (_, keys, kv_heads, _) = q.shape, k.shape
    group, n = heads // kv_heads, triton.cdiv(keys, PART)
    z = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    shape = batch, heads, tokens, keys
    if emit:
        scores = torch.full(shape, -math.inf, dtype=q.dtype, device=q.device)
        pattern = torch.zeros(batch, heads, tokens, keys + 1, dtype=q.dtype, device=q.device)
    else:
        scores = torch.empty(shape, dtype=q.dtype, device=q.device)
        pattern = scores
    seen = torch.empty(n, batch, tokens, heads, 2, dtype=torch.float32, device=q.device)
    parts = torch.empty(n, *z.shape, dtype=torch.float32, device=q.device)
    rows, block = query_rows(tokens * group), max(16, power_of_two(size))
    reach = EVERYTHING if window is None else window
    factor: Any = dot_type(q.dtype)
    grid = (n, triton.cdiv(tokens * group, rows), batch * kv_heads)
    positions, key_positions = positions.contiguous(), key_positions.contiguous()
    spread_scores_kernel[grid](
        q.contiguous(), k.contiguous(), positions, key_positions, scores, seen, tokens, keys, reach, size**-0.5,
        kv_heads, group, size, block, rows, KEYS, PART, factor)
    spread_values_kernel[grid](
        scores, seen, v.contiguous(), sinks, positions, key_positions, parts, pattern, tokens, keys, reach, kv_heads,
        group, size, block, rows, KEYS, PART, factor, emit)
    sum_kernel[(triton.cdiv(z.numel(), 256),)](parts, z, z.numel(), n, 256)
    return (z, scores, pattern) if emit else (z, None, None)
