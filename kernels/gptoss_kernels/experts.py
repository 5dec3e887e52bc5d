"""Products of rows with the matrices of their experts, forward and backward, while the experts stay packed.

A packed expert is decoded when a row needs it and dropped right after, in the backward pass once more. So a gradient
costs the same scratch as a forward pass, and a decoded copy of all experts never exists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gptoss_kernels.dense import product
from gptoss_kernels.mxfp4 import Mxfp4Tensor, dequantize

ExpertWeight = Mxfp4Tensor | Tensor

SCRATCH_VALUES = 1 << 20  # decoded at a time, if one expert is not larger: many small experts cost one lookup together

ROWS_AT_ONCE = 1024
"""Rows of one expert in one product: enough for a fast one, few enough to stay near the processor. The same for all,
so that the bits do not depend on who looks."""


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
    # index_select moves whole rows: six times as fast as rows[order] on a processor.
    pieces = rows.index_select(0, order).split([counts[expert] for expert in chosen])
    together = max(1, SCRATCH_VALUES // (weight.shape[1] * weight.shape[2]))
    products: list[Tensor] = []
    for start in range(0, len(chosen), together):
        part = slice(start, start + together)
        products += _group(pieces[part], weight, chosen[part], transposed)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return torch.cat(products).index_select(0, back)


def expert_outputs(
    x: Tensor, experts: Tensor, gate_up: ExpertWeight, gate_up_bias: Tensor, down: ExpertWeight, down_bias: Tensor,
    middle: Callable[[Tensor], Tensor],
) -> Tensor:
    """Both maps of the chosen experts with ``middle`` between them, some rows at a time: x (N, in) -> (N, k, out).

    The same products as two times ``expert_products``, but what lies between is never there for all rows: with
    thousands of rows it would go through memory a dozen times. Not differentiable.

    Args:
        experts: (N, k) int64.
        gate_up, gate_up_bias: (E, 2F, in) and (E, 2F); down, down_bias: (E, out, F) and (E, out).
        middle: (rows, 2F) -> (rows, F).
    """
    flat, count = experts.reshape(-1), experts.shape[1]
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=gate_up.shape[0]).tolist()
    chosen = [expert for expert, rows in enumerate(counts) if rows]
    tokens = (order // count).split([counts[expert] for expert in chosen])
    together = max(1, SCRATCH_VALUES // (gate_up.shape[1] * gate_up.shape[2]))
    outputs = x.new_empty(len(order), down.shape[1])
    done = 0
    for start in range(0, len(chosen), together):
        group = chosen[start:start + together]
        first, second = (_matrices(weight, group, x.dtype) for weight in (gate_up, down))
        for number, expert in enumerate(group):
            for part in tokens[start + number].split(ROWS_AT_ONCE):
                hidden = middle(product(x.index_select(0, part), first[number], False).add_(gate_up_bias[expert]))
                torch.mm(hidden, second[number].T, out=outputs[done:done + len(part)]).add_(down_bias[expert])
                done += len(part)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return outputs.index_select(0, back).view(*experts.shape, down.shape[1])


def _matrices(weight: ExpertWeight, experts: list[int], dtype: torch.dtype) -> Tensor | list[Tensor]:
    """Some experts' matrices, (out, in) each, one after the other."""
    if not isinstance(weight, Mxfp4Tensor):
        return [weight[expert] for expert in experts]
    first, count = experts[0], len(experts)
    neighbours = experts == [*range(first, first + count)]  # a view: torch copies chosen bytes one at a time
    return _decode(weight[first:first + count] if neighbours else weight[experts], dtype)


def _group(pieces: Sequence[Tensor], weight: ExpertWeight, experts: list[int], transposed: bool) -> list[Tensor]:
    """The products of a few experts. What was decoded for them goes when this returns, before the next are decoded."""
    matrices = _matrices(weight, experts, pieces[0].dtype)
    return [product(part, w, transposed) for piece, w in zip(pieces, matrices, strict=True)
            for part in piece.split(ROWS_AT_ONCE)]


def _decode(packed: Mxfp4Tensor, dtype: torch.dtype) -> Tensor:
    """MXFP4 is exact in float32, so float64 (for checks of gradients) loses nothing on the way."""
    return dequantize(packed, torch.float32 if dtype == torch.float64 else dtype).to(dtype)
