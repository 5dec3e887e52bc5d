"""Experts for many tokens: tokens of the same expert meet its packed matrix in one tile product.

A tile of the matrix is decoded in registers and used at once; a decoded expert never exists in memory. The same
kernel, reading the matrix the other way round, carries gradients back to the experts' input.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptoss_kernels.mxfp4 import Mxfp4Tensor
from gptoss_kernels.triton.activation import clamped_swiglu
from gptoss_kernels.triton.common import dot_type, rounded
from gptoss_kernels.triton.decode import matrix
from gptoss_kernels.triton.grouping import Groups

COLUMNS = 64  # of the result, in one tile
DEPTH = 64  # summed over at a time; a multiple of 32
WARPS = 4


@triton.jit
def grouped_kernel(
    x, order, tiles, codes, scales, bias, out, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SHARED: tl.constexpr,
    TRANSPOSED: tl.constexpr, BIASED: tl.constexpr, ACTIVATE: tl.constexpr, alpha, limit, FACTOR: tl.constexpr,
    PAIRS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):
    """out (pairs, columns) = x (pairs / SHARED, depth) times the matrix (HEIGHT, WIDTH) of each pair's expert.

    Columns run over HEIGHT and depth over WIDTH, or the other way round when TRANSPOSED. With ACTIVATE the columns
    are gates and ups in turn and out holds half as many, activated.
    """
    tile = tl.program_id(1)
    expert = tl.load(tiles + tile * 3)
    if expert < 0:
        return
    place = tl.load(tiles + tile * 3 + 1) + tl.arange(0, PAIRS)
    taken = place < tl.load(tiles + tile * 3 + 2)
    pair = tl.load(order + place, mask=taken, other=0).to(tl.int64)
    columns: tl.constexpr = WIDTH if TRANSPOSED else HEIGHT
    depth: tl.constexpr = HEIGHT if TRANSPOSED else WIDTH
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    codes += expert.to(tl.int64) * (HEIGHT * (WIDTH // 2))
    scales += expert.to(tl.int64) * (HEIGHT * (WIDTH // 32))
    total = tl.zeros((PAIRS, COLUMNS), tl.float32)
    for start in range(0, depth, DEPTH):
        at = start + tl.arange(0, DEPTH)
        a = tl.load(x + (pair // SHARED)[:, None] * depth + at[None, :], mask=taken[:, None] & (at < depth)[None, :],
                    other=0.0)
        if TRANSPOSED:
            b = _part(codes, scales, start, tl.program_id(0) * COLUMNS, HEIGHT, WIDTH, DEPTH, COLUMNS, FACTOR)
        else:
            b = tl.trans(_part(codes, scales, tl.program_id(0) * COLUMNS, start, HEIGHT, WIDTH, COLUMNS, DEPTH, FACTOR))
        total = tl.dot(a.to(FACTOR), b, total, input_precision="ieee")
    dtype: tl.constexpr = out.dtype.element_ty
    y = rounded(total, dtype)
    if BIASED:
        b = tl.load(bias + expert.to(tl.int64) * columns + column, mask=column < columns, other=0.0).to(tl.float32)
        y = rounded(y + b[None, :], dtype)
    if ACTIVATE:
        gate, up = tl.reshape(y, (PAIRS, COLUMNS // 2, 2)).split()
        half = tl.program_id(0) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
        act = clamped_swiglu(gate, up, alpha, limit, dtype)
        tl.store(out + pair[:, None] * (columns // 2) + half[None, :], act.to(dtype),
                 mask=taken[:, None] & (half < columns // 2)[None, :])
    else:
        tl.store(out + pair[:, None] * columns + column[None, :], y.to(dtype),
                 mask=taken[:, None] & (column < columns)[None, :])


@triton.jit
def _part(
    codes, scales, row, column, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    dtype: tl.constexpr,
):
    """The part of one expert's matrix that begins at (row, column), decoded, (ROWS, COLUMNS); zeros beyond its end."""
    r = row + tl.arange(0, ROWS)
    byte = column // 2 + tl.arange(0, COLUMNS // 2)
    block = column // 32 + tl.arange(0, COLUMNS // 32)
    packed = tl.load(codes + r[:, None] * (WIDTH // 2) + byte[None, :],
                     mask=(r < HEIGHT)[:, None] & (byte < WIDTH // 2)[None, :], other=0)
    scale = tl.load(scales + r[:, None] * (WIDTH // 32) + block[None, :],
                    mask=(r < HEIGHT)[:, None] & (block < WIDTH // 32)[None, :], other=0)
    return matrix(packed, scale, ROWS, COLUMNS, dtype)


def grouped(
    x: Tensor, groups: Groups, pairs: int, weight: Mxfp4Tensor, bias: Tensor | None = None, *,
    swiglu: tuple[float, float] | None = None, transposed: bool = False,
) -> Tensor:
    """Each pair's row times the matrix of its expert -> (pairs, out).

    Args:
        x: (pairs, in), or (N, in) when the slots of a token share a row.
        groups: see ``grouping.group``, for as many pairs.
        weight: (E, out, in), or (E, in, out) when ``transposed``.
        bias: (E, out), added after the product was rounded.
        swiglu: alpha and limit; rows of the matrix are then gates and ups in turn, the result (pairs, out / 2).
    """
    _, height, width = weight.shape
    columns = width if transposed else height
    out = torch.empty(pairs, columns // 2 if swiglu else columns, dtype=x.dtype, device=x.device)
    alpha, limit = swiglu or (0.0, 0.0)
    factor: Any = dot_type(x.dtype)
    grouped_kernel[(triton.cdiv(columns, COLUMNS), len(groups.tiles))](
        x.contiguous(), groups.order, groups.tiles, weight.blocks.contiguous(), weight.scales.contiguous(),
        x if bias is None else bias.contiguous(), out, height, width, pairs // len(x), transposed, bias is not None,
        swiglu is not None, alpha, limit, factor, groups.height, COLUMNS, DEPTH, num_warps=WARPS)
    return out
