"""Experts for a single token, or a few: every row of a matrix that a token needs is read once, as it is packed.

No tile is padded with tokens that are not there. A program takes a few rows of one expert; its threads read 16
packed bytes at a time, which is one block of 32 values, and keep their part of the vector in registers for all rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptoss_kernels.mxfp4 import Mxfp4Tensor
from gptoss_kernels.triton.activation import clamped_swiglu
from gptoss_kernels.triton.common import rounded
from gptoss_kernels.triton.decode import nibble, powers

ROWS = 16  # of one program; even, so that a gate row and its up row meet
WARPS = 4
DOWN_ROWS = 8  # fewer where a program does several experts in turn: there must be enough programs for every processor
DOWN_WARPS = 2
BLOCKS = 32  # of 32 values, of a row at a time: one for each lane of a warp

# The vector is scaled up while it meets the raw codes, which are tiny, and the sum is scaled by the rest of UNDO.
_UP = tl.constexpr(2.0**64)
_REST = tl.constexpr(2.0**63)


@triton.jit
def row_products(x, words, scales, row, inside, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """Products of packed rows with a vector: x (WIDTH,), words (rows, WIDTH / 8), row (ROWS,) -> (ROWS,) float32."""
    total = tl.zeros((ROWS, BLOCKS), tl.float32)
    for start in tl.static_range(0, WIDTH // 32, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        word = start * 4 + tl.arange(0, BLOCKS * 4)
        column = start * 32 + tl.arange(0, BLOCKS * 32)
        here = inside[:, None] & (word < WIDTH // 8)[None, :]
        codes = tl.load(words + row[:, None] * (WIDTH // 8) + word[None, :], mask=here, other=0)
        here = inside[:, None] & (block < WIDTH // 32)[None, :]
        scale = tl.load(scales + row[:, None] * (WIDTH // 32) + block[None, :], mask=here, other=0)
        part = tl.load(x + column, mask=column < WIDTH, other=0.0).to(tl.float32) * _UP
        even, odd = tl.reshape(part, (BLOCKS * 4, 2, 2, 2)).split()  # by the last bit of a value's place in its word
        x04, x26 = even.split()
        x15, x37 = odd.split()
        x0, x4 = x04.split()
        x1, x5 = x15.split()
        x2, x6 = x26.split()
        x3, x7 = x37.split()
        product = nibble(codes, 0) * x0[None, :]
        product += nibble(codes, 1) * x1[None, :]
        product += nibble(codes, 2) * x2[None, :]
        product += nibble(codes, 3) * x3[None, :]
        product += nibble(codes, 4) * x4[None, :]
        product += nibble(codes, 5) * x5[None, :]
        product += nibble(codes, 6) * x6[None, :]
        product += nibble(codes, 7) * x7[None, :]
        total += tl.sum(tl.reshape(product, (ROWS, BLOCKS, 4)), 2) * _REST * powers(scale)
    return tl.sum(total, 1)


@triton.jit
def linear_kernel(
    x, experts, words, scales, bias, out, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SHARED: tl.constexpr,
    ACTIVATE: tl.constexpr, alpha, limit, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):
    """x (pairs / SHARED, WIDTH), experts (pairs,), weights (E, HEIGHT, WIDTH) -> out (pairs, HEIGHT).

    With ACTIVATE the rows are gates and ups in turn and out, (pairs, HEIGHT / 2), is their SwiGLU.
    """
    pair = tl.program_id(1)
    expert = tl.load(experts + pair)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < HEIGHT
    product = row_products(x + (pair // SHARED).to(tl.int64) * WIDTH, words + expert * (HEIGHT * (WIDTH // 8)),
                           scales + expert * (HEIGHT * (WIDTH // 32)), row, inside, WIDTH, ROWS, BLOCKS)
    dtype: tl.constexpr = out.dtype.element_ty
    b = tl.load(bias + expert * HEIGHT + row, mask=inside, other=0.0).to(tl.float32)
    y = rounded(rounded(product, dtype) + b, dtype)
    if ACTIVATE:
        gate, up = tl.reshape(y, (ROWS // 2, 2)).split()
        half = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
        act = clamped_swiglu(gate, up, alpha, limit, dtype)
        tl.store(out + pair.to(tl.int64) * (HEIGHT // 2) + half, act.to(dtype), mask=half < HEIGHT // 2)
    else:
        tl.store(out + pair.to(tl.int64) * HEIGHT + row, y.to(dtype), mask=inside)


@triton.jit
def down_kernel(
    act, experts, weights, words, scales, bias, out, SLOTS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):
    """The second map and the weighted sum: act (tokens, SLOTS, WIDTH), weights (tokens, SLOTS) -> (tokens, HEIGHT)."""
    token = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < HEIGHT
    dtype: tl.constexpr = out.dtype.element_ty
    total = tl.zeros((ROWS,), tl.float32)
    for slot in range(SLOTS):
        pair = token * SLOTS + slot
        expert = tl.load(experts + pair)
        product = row_products(act + pair * WIDTH, words + expert * (HEIGHT * (WIDTH // 8)),
                               scales + expert * (HEIGHT * (WIDTH // 32)), row, inside, WIDTH, ROWS, BLOCKS)
        b = tl.load(bias + expert * HEIGHT + row, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weights + pair).to(tl.float32)
        total += weight * rounded(rounded(product, dtype) + b, dtype)
    tl.store(out + token * HEIGHT + row, rounded(total, dtype).to(dtype), mask=inside)


def linear(x: Tensor, experts: Tensor, weight: Mxfp4Tensor, bias: Tensor, swiglu: tuple[float, float] | None = None
           ) -> Tensor:
    """One linear map per chosen expert: x (N, in) or (N, k, in), experts (N, k) -> (N, k, out).

    With ``swiglu`` (alpha, limit) the rows are gates and ups in turn, and the result (N, k, out / 2) is activated.
    """
    (tokens, slots), (_, height, width) = experts.shape, weight.shape
    x, experts, blocks, scales = x.contiguous(), experts.contiguous(), *_packed(weight)
    out = torch.empty(tokens, slots, height // 2 if swiglu else height, dtype=x.dtype, device=x.device)
    alpha, limit = swiglu or (0.0, 0.0)
    linear_kernel[(triton.cdiv(height, ROWS), tokens * slots)](
        x, experts, blocks, scales, bias.contiguous(), out, height, width, slots if x.dim() == 2 else 1,
        swiglu is not None, alpha, limit, ROWS, BLOCKS, num_warps=WARPS)
    return out


def down(act: Tensor, experts: Tensor, weights: Tensor, weight: Mxfp4Tensor, bias: Tensor) -> Tensor:
    """The second map of each chosen expert and the weighted sum: act (N, k, in), weights (N, k) -> (N, out)."""
    (tokens, slots), (_, height, width) = experts.shape, weight.shape
    out = torch.empty(tokens, height, dtype=act.dtype, device=act.device)
    blocks, scales = _packed(weight)
    down_kernel[(triton.cdiv(height, DOWN_ROWS), tokens)](
        act.contiguous(), experts.contiguous(), weights.contiguous(), blocks, scales, bias.contiguous(), out, slots,
        height, width, DOWN_ROWS, BLOCKS, num_warps=DOWN_WARPS)
    return out


def _packed(weight: Mxfp4Tensor) -> tuple[Tensor, Tensor]:
    """Codes as int32 words (E, out, in / 32, 4), and scales; the bytes of the checkpoint, not copied."""
    return weight.blocks.contiguous().view(torch.int32), weight.scales.contiguous()
