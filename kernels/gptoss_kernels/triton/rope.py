"""Rotary positions. One program a token, all of its heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptoss_kernels import reference
from gptoss_kernels.triton.common import falls_back_to, power_of_two, rounded


@triton.jit
def rotated(first, second, cos, sin, dtype: tl.constexpr):
    """Both halves of heads after the rotation, float32, every product and sum rounded as in torch."""
    one = rounded(rounded(first * cos, dtype) - rounded(second * sin, dtype), dtype)
    two = rounded(rounded(second * cos, dtype) + rounded(first * sin, dtype), dtype)
    return one, two


@triton.jit
def rope_kernel(
    x, cos, sin, out, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):
    """x, out (tokens, HEADS, 2 * HALF); cos, sin (tokens, HALF)."""
    token = tl.program_id(0).to(tl.int64)
    head, i = tl.arange(0, BLOCK_HEADS), tl.arange(0, BLOCK_HALF)
    c = tl.load(cos + token * HALF + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * HALF + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    inside = (head < HEADS)[:, None] & (i < HALF)[None, :]
    at = token * (HEADS * 2 * HALF) + head[:, None] * (2 * HALF) + i[None, :]
    first = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + at + HALF, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = out.dtype.element_ty
    first, second = rotated(first, second, c, s, dtype)
    tl.store(out + at, first.to(dtype), mask=inside)
    tl.store(out + at + HALF, second.to(dtype), mask=inside)


@falls_back_to(reference.apply_rope)
def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As ``reference.apply_rope``."""
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    batch, tokens, heads, size = x.shape
    out = torch.empty_like(x)
    if out.numel():
        rope_kernel[(batch * tokens,)](x, cos, sin, out, heads, size // 2, power_of_two(heads), power_of_two(size // 2))
    return out
