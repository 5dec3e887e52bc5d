"""Products of one token with dense matrices: two thirds of what a decoding step reads.

Each weight is read once, 16 bytes at a time, by a program that owns a few rows. More tokens go to torch's own product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptoss_kernels import reference
from gptoss_kernels.triton.common import falls_back_to, rounded
from gptoss_kernels.triton.rope import rotated

ROWS = 8
DEPTH = 512  # summed over at a time
WARPS = 4

Projection = tuple[Tensor, Tensor]


@triton.jit
def row_products(x, weight, row, inside, WIDTH: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """x (WIDTH,), weight (rows, WIDTH), row (ROWS,) -> the rows' products with x, (ROWS,) float32."""
    total = tl.zeros((ROWS, DEPTH), tl.float32)
    for start in tl.static_range(0, WIDTH, DEPTH):
        column = start + tl.arange(0, DEPTH)
        w = tl.load(weight + row.to(tl.int64)[:, None] * WIDTH + column[None, :],
                    mask=inside[:, None] & (column < WIDTH)[None, :], other=0.0)
        total += w.to(tl.float32) * tl.load(x + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    return tl.sum(total, 1)


@triton.jit
def linear_kernel(
    x, weight, bias, out, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """x (WIDTH,), weight (HEIGHT, WIDTH), bias (HEIGHT,) -> out (HEIGHT,)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < HEIGHT
    y = row_products(x, weight, row, inside, WIDTH, ROWS, DEPTH)
    if BIASED:
        y += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = out.dtype.element_ty
    tl.store(out + row, rounded(y, dtype).to(dtype), mask=inside)


@triton.jit
def qkv_kernel(
    x, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, cos, sin, q, k, v, HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):
    """Query, key and value heads of one token, queries and keys rotated. cos, sin (HALF,).

    A program computes the same few rows of both halves of one head, because the rotation pairs them.
    """
    head = tl.program_id(1)
    weight, bias, out = q_weight, q_bias, q
    if head >= HEADS + KV_HEADS:
        weight, bias, out = v_weight, v_bias, v
        head -= HEADS + KV_HEADS
    elif head >= HEADS:
        weight, bias, out = k_weight, k_bias, k
        head -= HEADS
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = i < HALF
    row = head * (2 * HALF) + i
    dtype: tl.constexpr = q.dtype.element_ty
    first = row_products(x, weight, row, inside, WIDTH, ROWS, DEPTH)
    first = rounded(first + tl.load(bias + row, mask=inside, other=0.0).to(tl.float32), dtype)
    second = row_products(x, weight, row + HALF, inside, WIDTH, ROWS, DEPTH)
    second = rounded(second + tl.load(bias + row + HALF, mask=inside, other=0.0).to(tl.float32), dtype)
    if tl.program_id(1) < HEADS + KV_HEADS:
        c = tl.load(cos + i, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + i, mask=inside, other=0.0).to(tl.float32)
        first, second = rotated(first, second, c, s, dtype)
    tl.store(out + row, first.to(dtype), mask=inside)
    tl.store(out + row + HALF, second.to(dtype), mask=inside)


@falls_back_to(reference.linear)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As ``reference.linear``; for a single row by a kernel of its own, for more by torch."""
    if not _suits(x, weight):
        return reference.linear(x, weight, bias)
    height, width = weight.shape
    out = torch.empty(*x.shape[:-1], height, dtype=x.dtype, device=x.device)
    linear_kernel[(triton.cdiv(height, ROWS),)](x.contiguous(), weight, weight if bias is None else bias, out, height,
                                                width, bias is not None, ROWS, DEPTH, num_warps=WARPS)
    return out


@falls_back_to(reference.project_qkv)
def project_qkv(
    x: Tensor, q: Projection, k: Projection, v: Projection, cos: Tensor, sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.project_qkv``; for a single token in one launch."""
    if not all(_suits(x, weight) for weight, _ in (q, k, v)):
        return reference.project_qkv(x, q, k, v, cos, sin)
    half = cos.shape[-1]
    heads, kv_heads = (len(weight) // (2 * half) for weight, _ in (q, k))
    outs = [torch.empty(1, 1, n, 2 * half, dtype=x.dtype, device=x.device) for n in (heads, kv_heads, kv_heads)]
    qkv_kernel[(triton.cdiv(half, ROWS), heads + 2 * kv_heads)](
        x.contiguous(), *q, *k, *v, cos.contiguous(), sin.contiguous(), *outs, heads, kv_heads, half, x.shape[-1], ROWS,
        DEPTH, num_warps=WARPS)
    return outs[0], outs[1], outs[2]


def _suits(x: Tensor, weight: Tensor) -> bool:
    """One row, and a weight that lies row after row in the dtype of x."""
    return x.numel() == x.shape[-1] and weight.is_contiguous() and weight.dtype == x.dtype and weight.numel() > 0
