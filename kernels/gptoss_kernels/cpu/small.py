"""Norms, rotation, SwiGLU and the weighted sum of experts as compiled tasks, with the reference's roundings.

Gradients, other dtypes and devices, tensors of no elements and processors without numba are left to the reference.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from gptoss_kernels import reference
from gptoss_kernels.cpu import products
from gptoss_kernels.cpu.choice import chosen

DTYPES = (torch.bfloat16, torch.float32)


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """As ``reference.rms_norm``."""
    return _norm(x, None, scale, eps)[1] if suits(x, scale=scale) else reference.rms_norm(x, scale, eps)


def add_norm(x: Tensor, delta: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As ``reference.add_norm``."""
    if x.shape != delta.shape or not suits(x, delta, scale=scale):
        total = x + delta
        return total, rms_norm(total, scale, eps)
    return _norm(x, delta, scale, eps)


def _norm(x: Tensor, delta: Tensor | None, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, scale, width = x.contiguous(), scale.contiguous(), x.shape[-1]
    added = None if delta is None else delta.contiguous()
    total, norm = x if added is None else torch.empty_like(x), torch.empty_like(x)
    run("normed", x.numel() // width, x.data_ptr(), 0 if added is None else added.data_ptr(), scale.data_ptr(),
        total.data_ptr(), norm.data_ptr(), width, bits(eps), way=wide(x))
    return total, norm


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As ``reference.apply_rope``."""
    if not (suits(x, cos, sin) and x.dim() == 4 and cos.shape == sin.shape == (*x.shape[:2], x.shape[3] // 2)):
        return reference.apply_rope(x, cos, sin)
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    out = torch.empty_like(x)
    run("rotated", x.shape[0] * x.shape[1], x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), x.shape[2],
        cos.shape[-1], way=wide(x))
    return out


def combine_experts(outputs: Tensor, weights: Tensor) -> Tensor:
    """As ``reference.combine_experts``."""
    if not (suits(outputs, weights) and outputs.dim() == 3 and weights.shape == outputs.shape[:2]):
        return reference.combine_experts(outputs, weights)
    outputs, weights = outputs.contiguous(), weights.contiguous()
    tokens, slots, width = outputs.shape
    out = torch.empty(tokens, width, dtype=outputs.dtype)
    run("combined", tokens, outputs.data_ptr(), weights.data_ptr(), out.data_ptr(), slots, width,
        way=wide(outputs))
    return out


def swiglu(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    """As ``reference.swiglu``."""
    if gate.shape != up.shape or gate.dim() == 0 or not suits(gate, up):
        return reference.swiglu(gate, up, alpha, limit)
    width = gate.shape[-1]
    gates, ups = gate.reshape(-1, width), up.reshape(-1, width)  # no copies of what an expert gives
    if gates.stride() != ups.stride():
        gates, ups = gates.contiguous(), ups.contiguous()
    out = torch.empty(gate.shape, dtype=gate.dtype)
    run("gated", len(gates), gates.data_ptr(), ups.data_ptr(), out.data_ptr(), width, *gates.stride(), bits(alpha),
        bits(limit), way=wide(gate))
    return out


def suits(*tensors: Tensor, scale: Tensor | None = None) -> bool:
    """Whether the tasks can take it: ``scale`` is float32 whatever the others are."""
    dtype = tensors[0].dtype
    every = tensors if scale is None else (*tensors, scale)
    return (dtype in DTYPES and all(one.dtype == dtype for one in tensors) and tensors[0].numel() > 0
            and all(one.device.type == "cpu" for one in every)
            and (scale is None or (scale.dtype == torch.float32 and scale.shape == tensors[0].shape[-1:]))
            and not (torch.is_grad_enabled() and any(one.requires_grad for one in every))
            and chosen(dtype) is not None)


def run(kind: str, rows: int, *fields: int, way: int = 0) -> None:
    products.run(products.task(kind, way), rows, *fields)


def wide(x: Tensor) -> int:
    return int(x.dtype == torch.float32)


def bits(value: float) -> int:
    """Of the nearest float32."""
    return int.from_bytes(struct.pack("=f", value), "little" if struct.pack("=h", 1)[0] else "big")
