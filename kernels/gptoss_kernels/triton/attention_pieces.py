"""Attention in pieces, for hooks that change scores or pattern."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptoss_kernels import reference
from gptoss_kernels.triton.attention_tiles import mix, scores_of, see, see_sink, shares, vectors
from gptoss_kernels.triton.common import dot_type, falls_back_to, power_of_two, rounded

ROWS = 64
KEYS = 64
ROW_KEYS = 1024  # of one query, in one step of the softmax
PART = 512  # keys of one program when a few queries are spread; a multiple of KEYS
FEW_ROWS = 64  # queries of a group, heads counted one by one, up to which their keys are spread


@triton.jit
def scores_kernel(
    q, k, visible, scores, tokens, keys, SCALE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, FACTOR: tl.constexpr,
):
    """q (B, tokens, H, SIZE), k (B, keys, KV_HEADS, SIZE), visible (B, tokens, keys) -> scores (B, H, tokens, keys)."""
    batch, kv_head = tl.program_id(2) // KV_HEADS, tl.program_id(2) % KV_HEADS
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    exists = token < tokens
    column = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    inside = exists[:, None] & (column < keys)[None, :]
    dtype: tl.constexpr = scores.dtype.element_ty
    query_at = ((batch.to(tl.int64) * tokens + token) * (KV_HEADS * GROUP) + head) * SIZE
    key_at = ((batch.to(tl.int64) * keys + column) * KV_HEADS + kv_head) * SIZE
    seen = tl.load(visible + (batch.to(tl.int64) * tokens + token)[:, None] * keys + column[None, :], mask=inside,
                   other=0)
    s = scores_of(vectors(q, query_at, exists, SIZE, BLOCK_SIZE), vectors(k, key_at, column < keys, SIZE, BLOCK_SIZE),
                  seen != 0, SCALE, dtype, FACTOR)
    at = ((batch.to(tl.int64) * (KV_HEADS * GROUP) + head) * tokens + token)[:, None] * keys + column[None, :]
    tl.store(scores + at, s.to(dtype), mask=inside)


@triton.jit
def softmax_kernel(scores, sinks, pattern, tokens, keys, HEADS: tl.constexpr, KEYS: tl.constexpr):
    """One row of scores (B, HEADS, tokens, keys) -> pattern (B, HEADS, tokens, keys + 1)."""
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = pattern.dtype.element_ty
    largest = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    for start in range(0, keys, KEYS):
        column = start + tl.arange(0, KEYS)
        s = tl.load(scores + row * keys + column, mask=column < keys, other=float("-inf")).to(tl.float32)
        largest, total = see(largest, total, s[None, :])
    sink = tl.load(sinks + row // tokens % HEADS + tl.zeros((1,), tl.int32)).to(tl.float32)
    largest, inverse = see_sink(largest, total, sink)
    for start in range(0, keys, KEYS):
        column = start + tl.arange(0, KEYS)
        s = tl.load(scores + row * keys + column, mask=column < keys, other=float("-inf")).to(tl.float32)
        share = shares(s[None, :], largest, inverse, dtype)
        tl.store(pattern + row * (keys + 1) + column[None, :], share.to(dtype), mask=(column < keys)[None, :])
    share = shares(sink[:, None], largest, inverse, dtype)
    tl.store(pattern + row * (keys + 1) + keys + tl.zeros((1, 1), tl.int32), share.to(dtype))


@triton.jit
def values_kernel(
    pattern, v, parts, tokens, keys, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, part, FACTOR: tl.constexpr,
):
    """pattern (B, H, tokens, keys + 1), v (B, keys, KV_HEADS, SIZE) -> parts (n, B, tokens, H, SIZE).

    Each of the n is the sum over its ``part`` keys.
    """
    batch, kv_head = tl.program_id(2) // KV_HEADS, tl.program_id(2) % KV_HEADS
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    exists = token < tokens
    mixed = tl.zeros((ROWS, BLOCK_SIZE), tl.float32)
    at = ((batch.to(tl.int64) * (KV_HEADS * GROUP) + head) * tokens + token)[:, None] * (keys + 1)
    begin = tl.program_id(0) * part
    for start in range(begin, tl.minimum(begin + part, keys), KEYS):
        column = start + tl.arange(0, KEYS)
        share = tl.load(pattern + at + column[None, :], mask=exists[:, None] & (column < keys)[None, :], other=0.0)
        key_at = ((batch.to(tl.int64) * keys + column) * KV_HEADS + kv_head) * SIZE
        mixed = mix(mixed, share, vectors(v, key_at, column < keys, SIZE, BLOCK_SIZE), FACTOR)
    batches = tl.num_programs(2) // KV_HEADS
    i = tl.arange(0, BLOCK_SIZE)
    to = ((tl.program_id(0).to(tl.int64) * batches + batch) * tokens + token) * (KV_HEADS * GROUP) + head
    dtype: tl.constexpr = parts.dtype.element_ty
    tl.store(parts + to[:, None] * SIZE + i[None, :], rounded(mixed, dtype).to(dtype),
             mask=exists[:, None] & (i < SIZE)[None, :])


@triton.jit
def sum_kernel(parts, z, count, n, BLOCK: tl.constexpr):
    """parts (n, count) float32 -> z (count,): added in their order, rounded once."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(n):
        total += tl.load(parts + i, mask=i < count, other=0.0)
        parts += count
    dtype: tl.constexpr = z.dtype.element_ty
    tl.store(z + i, rounded(total, dtype).to(dtype), mask=i < count)


@falls_back_to(reference.attention_scores)
def attention_scores(q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """As ``reference.attention_scores``."""
    (batch, tokens, heads, size), (_, keys, kv_heads, _) = q.shape, k.shape
    scores = torch.empty(batch, heads, tokens, keys, dtype=q.dtype, device=q.device)
    visible = visible.expand(batch, tokens, keys).contiguous().view(torch.uint8)
    rows, factor = query_rows(tokens * heads // kv_heads), _factor(q)
    if scores.numel():
        grid = (triton.cdiv(keys, KEYS), triton.cdiv(tokens * heads // kv_heads, rows), batch * kv_heads)
        scores_kernel[grid](q.contiguous(), k.contiguous(), visible, scores, tokens, keys, size**-0.5, kv_heads,
                            heads // kv_heads, size, max(16, power_of_two(size)), rows, KEYS, factor)
    return scores


@falls_back_to(reference.softmax_with_sink)
def softmax_with_sink(scores: Tensor, sinks: Tensor) -> Tensor:
    """As ``reference.softmax_with_sink``."""
    batch, heads, tokens, keys = scores.shape
    pattern = torch.empty(batch, heads, tokens, keys + 1, dtype=scores.dtype, device=scores.device)
    if pattern.numel():
        softmax_kernel[(batch * heads * tokens,)](scores.contiguous(), sinks, pattern, tokens, keys, heads, ROW_KEYS)
    return pattern


@falls_back_to(reference.attention_values)
def attention_values(pattern: Tensor, v: Tensor) -> Tensor:
    """As ``reference.attention_values``. For a few queries the keys are spread over programs and summed in order."""
    (batch, heads, tokens, _), (_, keys, kv_heads, size) = pattern.shape, v.shape
    group_rows = tokens * heads // kv_heads
    spread = group_rows <= FEW_ROWS and keys > PART
    z = torch.empty(batch, tokens, heads, size, dtype=pattern.dtype, device=pattern.device)
    if not z.numel():
        return z
    n = triton.cdiv(keys, PART) if spread else 1
    parts = torch.empty(n, *z.shape, dtype=torch.float32, device=z.device) if spread else z
    rows, factor = query_rows(group_rows), _factor(v)
    values_kernel[(n, triton.cdiv(group_rows, rows), batch * kv_heads)](
        pattern.contiguous(), v.contiguous(), parts, tokens, keys, kv_heads, heads // kv_heads, size,
        max(16, power_of_two(size)), rows, KEYS, PART if spread else keys, factor)
    if spread:
        sum_kernel[(triton.cdiv(z.numel(), 256),)](parts, z, z.numel(), n, 256)
    return z


def query_rows(queries: int) -> int:
    """Queries of one program, heads counted one by one."""
    return min(ROWS, max(16, power_of_two(queries)))


def _factor(x: Tensor) -> Any:
    return dot_type(x.dtype)
