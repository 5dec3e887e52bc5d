"""Products of rows with the matrices of their experts, forward and backward, while the experts stay packed.

A packed expert is decoded when a row needs it and dropped right after, in the backward pass once more. So a gradient
costs the same scratch as a forward pass, and a decoded copy of all experts never exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gptoss_kernels.dense import product
from gptoss_kernels.mxfp4 import Mxfp4Tensor, dequantize

ExpertWeight = Mxfp4Tensor | Tensor

SCRATCH_VALUES = 1 << 20  # decoded at a time, if one expert is not larger: many small experts cost one lookup together


def expert_products(rows: Tensor, experts: Tensor, weight: ExpertWeight) -> Tensor:
    """Each row times the matrix of its expert -> (M, out).

    Args:
        rows: (M, in), in float32, bfloat16 or float64. Differentiable, any number of times.
        experts: (M,) int64.
        weight: (E, out, in), packed MXFP4 or dense; a constant to autograd.

    Never more than ``SCRATCH_VALUES`` decoded values are alive, or one expert where one is larger.
    """
    return _ExpertProducts.apply(rows, experts, weight, False)  # type: ignore[return-value]


class _ExpertProducts(torch.autograd.Function):
    """The gradient with respect to the rows is the same operation with every matrix transposed."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, experts: Tensor, weight: ExpertWeight, transposed: bool) -> Tensor:
        ctx.save_for_backward(experts)
        ctx.weight, ctx.transposed = weight, transposed
        return _products(rows, experts, weight, transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, None, None, None]:
        (experts,) = ctx.saved_tensors
        return _ExpertProducts.apply(grads[0], experts, ctx.weight, not ctx.transposed), None, None, None


def _products(rows: Tensor, experts: Tensor, weight: ExpertWeight, transposed: bool) -> Tensor:
    order = experts.argsort(stable=True)  # rows of the same expert next to each other
    counts = torch.bincount(experts, minlength=weight.shape[0]).tolist()
    chosen = [expert for expert, count in enumerate(counts) if count]
    pieces = rows[order].split([counts[expert] for expert in chosen])
    together = max(1, SCRATCH_VALUES // (weight.shape[1] * weight.shape[2]))
    products: list[Tensor] = []
    for start in range(0, len(chosen), together):
        part = slice(start, start + together)
        products += _group(pieces[part], weight, chosen[part], transposed)
    joined = torch.cat(products)
    out = torch.empty_like(joined)
    out[order] = joined
    return out


def _group(pieces: Sequence[Tensor], weight: ExpertWeight, experts: list[int], transposed: bool) -> list[Tensor]:
    """The products of a few experts. What was decoded for them goes when this returns, before the next are decoded."""
    matrices = _decode(weight[experts], pieces[0].dtype) if isinstance(weight, Mxfp4Tensor) else \
        [weight[expert] for expert in experts]
    return [product(piece, w, transposed) for piece, w in zip(pieces, matrices, strict=True)]


def _decode(packed: Mxfp4Tensor, dtype: torch.dtype) -> Tensor:
    """MXFP4 is exact in float32, so float64 (for checks of gradients) loses nothing on the way."""
    return dequantize(packed, torch.float32 if dtype == torch.float64 else dtype).to(dtype)
