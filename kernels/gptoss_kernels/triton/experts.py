"""A layer's experts as ``reference`` has them, each call sent to the kernel that suits its number of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptoss_kernels import reference
from gptoss_kernels.experts import ExpertWeight
from gptoss_kernels.mxfp4 import Mxfp4Tensor
from gptoss_kernels.triton import expert_matmul, expert_matvec
from gptoss_kernels.triton.activation import combine_experts
from gptoss_kernels.triton.common import DTYPES, needs_gradient
from gptoss_kernels.triton.grouping import group, tile_height

FEW_TOKENS = 4
"""Up to here each token reads its experts alone; tokens of one batch seldom share them, and no tile goes half empty."""


def expert_linear(x: Tensor, experts: Tensor, weight: ExpertWeight, bias: Tensor) -> Tensor:
    """As ``reference.expert_linear``. Differentiable in x and bias, any number of times."""
    if not isinstance(weight, Mxfp4Tensor) or x.dtype not in DTYPES or not experts.numel():
        return reference.expert_linear(x, experts, weight, bias)
    (tokens, slots), pairs = experts.shape, experts.numel()
    if needs_gradient(x, bias):
        rows = x[:, None].expand(-1, slots, -1) if x.dim() == 2 else x
        flat = experts.reshape(-1)
        products: Tensor = _Products.apply(rows.reshape(pairs, -1), flat, weight, False)  # type: ignore[assignment]
        return (products + bias[flat]).view(tokens, slots, -1)
    with torch.cuda.device_of(x):
        if tokens <= FEW_TOKENS:
            return expert_matvec.linear(x, experts, weight, bias)
        groups = _groups(experts, weight)
        return expert_matmul.grouped(x.flatten(0, -2), groups, pairs, weight, bias).view(tokens, slots, -1)


def expert_mixture(
    x: Tensor, experts: Tensor, weights: Tensor, gate_up: ExpertWeight, gate_up_bias: Tensor, down: ExpertWeight,
    down_bias: Tensor, alpha: float, limit: float,
) -> Tensor:
    """As ``reference.expert_mixture``, in two launches for a few tokens and three for many.

    The bits are those of ``expert_linear``, ``swiglu``, ``expert_linear`` and ``combine_experts`` one after the other.
    """
    unfit = x.dtype not in DTYPES or not experts.numel() or needs_gradient(x, weights, gate_up_bias, down_bias)
    if unfit or not isinstance(gate_up, Mxfp4Tensor) or not isinstance(down, Mxfp4Tensor):
        return _in_pieces(x, experts, weights, gate_up, gate_up_bias, down, down_bias, alpha, limit)
    (tokens, slots), pairs = experts.shape, experts.numel()
    with torch.cuda.device_of(x):
        if tokens <= FEW_TOKENS:
            act = expert_matvec.linear(x, experts, gate_up, gate_up_bias, (alpha, limit))
            return expert_matvec.down(act, experts, weights, down, down_bias)
        groups = _groups(experts, gate_up)
        act = expert_matmul.grouped(x, groups, pairs, gate_up, gate_up_bias, swiglu=(alpha, limit))
        outputs = expert_matmul.grouped(act, groups, pairs, down, down_bias)
    return combine_experts(outputs.view(tokens, slots, -1), weights)


def _in_pieces(
    x: Tensor, experts: Tensor, weights: Tensor, gate_up: ExpertWeight, gate_up_bias: Tensor, down: ExpertWeight,
    down_bias: Tensor, alpha: float, limit: float,
) -> Tensor:
    gate, up = reference.split_gate_up(expert_linear(x, experts, gate_up, gate_up_bias))
    outputs = expert_linear(reference.swiglu(gate, up, alpha, limit), experts, down, down_bias)
    return reference.combine_experts(outputs, weights)


def _groups(experts: Tensor, weight: Mxfp4Tensor) -> Any:
    count = weight.shape[0]
    return group(experts, count, tile_height(experts.numel(), count))


class _Products(torch.autograd.Function):
    """Rows times the matrices of their experts; the gradient is the same with every matrix transposed."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, experts: Tensor, weight: Mxfp4Tensor, transposed: bool) -> Tensor:
        ctx.save_for_backward(experts)
        ctx.weight, ctx.transposed = weight, transposed
        with torch.cuda.device_of(rows):
            groups = _groups(experts[:, None], weight)
            return expert_matmul.grouped(rows, groups, len(rows), weight, transposed=transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, None, None, None]:
        (experts,) = ctx.saved_tensors
        return _Products.apply(grads[0].contiguous(), experts, ctx.weight, not ctx.transposed), None, None, None
