"""RMS norm, alone and together with the addition in front of it. One program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptoss_kernels import reference
from gptoss_kernels.triton.common import falls_back_to, power_of_two, rounded


@triton.jit
def norm_kernel(x, delta, scale, total, out, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr):
    """x, delta, total, out (rows, WIDTH), scale (WIDTH,) float32. ``delta`` and ``total`` are touched when ADD."""
    row = tl.program_id(0).to(tl.int64) * WIDTH
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    t = tl.load(x + row + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        t += tl.load(delta + row + column, mask=inside, other=0.0).to(tl.float32)
        t = rounded(t, total.dtype.element_ty)
        tl.store(total + row + column, t.to(total.dtype.element_ty), mask=inside)
    t = t * tl.rsqrt(tl.sum(t * t, 0) / WIDTH + eps)
    t = t * tl.load(scale + column, mask=inside, other=0.0)
    tl.store(out + row + column, rounded(t, out.dtype.element_ty).to(out.dtype.element_ty), mask=inside)


@falls_back_to(reference.rms_norm)
def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """As ``reference.rms_norm``."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _launch(x, x, scale, out, out, eps, add=False)
    return out


@falls_back_to(reference.add_norm)
def add_norm(x: Tensor, delta: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As ``reference.add_norm``, reading and writing each value once."""
    x, delta = x.contiguous(), delta.contiguous()
    total, out = torch.empty_like(x), torch.empty_like(x)
    _launch(x, delta, scale, total, out, eps, add=True)
    return total, out


def _launch(x: Tensor, delta: Tensor, scale: Tensor, total: Tensor, out: Tensor, eps: float, add: bool) -> None:
    width = x.shape[-1]
    rows = x.numel() // width
    if rows:
        norm_kernel[(rows,)](x, delta, scale, total, out, eps, width, power_of_two(width), add,
                             num_warps=8 if width >= 2048 else 4)
