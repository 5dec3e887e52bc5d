"""The clamped SwiGLU, and the weighted sum of the experts' outputs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptoss_kernels import reference
from gptoss_kernels.triton.common import falls_back_to, rounded

_BLOCK = 1024
_COLUMNS = 512


@triton.jit
def clamped_swiglu(gate, up, alpha, limit, dtype: tl.constexpr):
    """gate * sigmoid(alpha * gate) * (up + 1) with gate and up clamped; float32 values rounded as torch rounds."""
    gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.clamp(up, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    open_ = rounded(tl.sigmoid(rounded(alpha * gate, dtype)), dtype)
    return rounded(rounded(gate * open_, dtype) * rounded(up + 1, dtype), dtype)


@triton.jit
def swiglu_kernel(gate, up, out, alpha, limit, count, stride, BLOCK: tl.constexpr):
    """gate, up: ``count`` values, ``stride`` apart; out: as many next to each other."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    g = tl.load(gate + i * stride, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + i * stride, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = out.dtype.element_ty
    tl.store(out + i, clamped_swiglu(g, u, alpha, limit, dtype).to(dtype), mask=inside)


@triton.jit
def combine_kernel(outputs, weights, out, WIDTH: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """outputs (tokens, SLOTS, WIDTH), weights (tokens, SLOTS) -> out (tokens, WIDTH), slots added in their order."""
    token = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(SLOTS):
        weight = tl.load(weights + token * SLOTS + slot).to(tl.float32)
        at = (token * SLOTS + slot) * WIDTH + column
        total += weight * tl.load(outputs + at, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = out.dtype.element_ty
    tl.store(out + token * WIDTH + column, rounded(total, dtype).to(dtype), mask=inside)


@falls_back_to(reference.swiglu)
def swiglu(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    """As ``reference.swiglu``, with the bits of the form that is fused into the experts' first map."""
    gate, up, stride = _evenly_spaced(gate, up)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel():
        swiglu_kernel[(triton.cdiv(out.numel(), _BLOCK),)](gate, up, out, alpha, limit, out.numel(), stride, _BLOCK)
    return out


def _evenly_spaced(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, int]:
    """The halves of an interleaved tensor as they are, anything else made contiguous; and the step of their values."""
    def every_second(x: Tensor) -> bool:
        return x.stride() == tuple(2 * step for step in torch.empty(x.shape, device="meta").stride())

    if every_second(gate) and every_second(up):
        return gate, up, 2
    return gate.contiguous(), up.contiguous(), 1


@falls_back_to(reference.combine_experts)
def combine_experts(outputs: Tensor, weights: Tensor) -> Tensor:
    """As ``reference.combine_experts``."""
    (tokens, slots, width) = outputs.shape
    out = torch.empty(tokens, width, dtype=outputs.dtype, device=outputs.device)
    if out.numel():
        combine_kernel[(triton.cdiv(width, _COLUMNS), tokens)](outputs.contiguous(), weights.contiguous(), out, width,
                                                               slots, _COLUMNS)
    return out
