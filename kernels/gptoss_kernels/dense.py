"""Products of matrices, forward and backward.

Autograd's own backward pass multiplies by a matrix the other way round, for which torch has no fast bfloat16 product on
processors without bfloat16 instructions: 32 rows times (5760, 2880) took 26 s where the forward product took 0.5 s.
Here it takes 0.3 s, in float32 and in parts, so that no float32 copy of the matrix exists.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PART_VALUES = 1 << 20
"""Values of a bfloat16 matrix that are widened at a time."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in), weight (out, in), bias (out,) -> (..., out): F.linear bit for bit, differentiable in x.

    Where the weight or the bias wants a gradient too, it is F.linear altogether.
    """
    learnt = weight.requires_grad or (bias is not None and bias.requires_grad)
    if learnt or not (x.requires_grad and torch.is_grad_enabled()):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias, False)  # type: ignore[return-value]


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a (..., n, m), b (..., m, p) -> (..., n, p): torch.matmul bit for bit, differentiable in both."""
    if torch.is_grad_enabled() and _slow(a) and (a.requires_grad or b.requires_grad):
        return _Matmul.apply(a, b)  # type: ignore[return-value]
    return torch.matmul(a, b)


def _slow(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.device.type == "cpu"


def product(rows: Tensor, matrix: Tensor, transposed: bool, bias: Tensor | None = None) -> Tensor:
    """rows times matrix.T, or times matrix (out, in) itself when ``transposed``: (..., in) or (..., out) and back.

    One rounding, to the dtype of the rows.
    """
    if not transposed:
        return F.linear(rows, matrix, bias)
    if not _slow(rows):
        return rows @ matrix
    flat = rows.reshape(-1, matrix.shape[0])
    total = torch.zeros(len(flat), matrix.shape[1])
    step = max(1, PART_VALUES // matrix.shape[1])
    for start in range(0, matrix.shape[0], step):
        part = slice(start, start + step)
        total.addmm_(flat[:, part].float(), matrix[part].float())
    return total.to(rows.dtype).view(*rows.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    """Its gradient is the same product the other way round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
        ctx.weight, ctx.transposed = weight, transposed
        return product(x, weight, transposed, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, None, None, None]:
        return _Linear.apply(grads[0], ctx.weight, None, not ctx.transposed), None, None, None


class _Matmul(torch.autograd.Function):
    """The gradients in float32 at least, rounded once. Both factors are of a run, hence small: widened whole."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.matmul(a, b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        wide = torch.promote_types(a.dtype, torch.float32)
        g, wanted = grads[0].to(wide), ctx.needs_input_grad
        return ((g @ b.to(wide).mT).to(a.dtype) if wanted[0] else None,
                (a.to(wide).mT @ g).to(b.dtype) if wanted[1] else None)
