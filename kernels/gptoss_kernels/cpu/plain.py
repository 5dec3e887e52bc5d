"""The path without compiled code: the reference's arithmetic, with products in float32 where bfloat16 is slow.

Packed experts are decoded by the table of value pairs of ``gptoss_kernels.mxfp4``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptoss_kernels import reference
from gptoss_kernels.cpu import matmul
from gptoss_kernels.experts import ExpertWeight, expert_products


def expert_linear(x: Tensor, experts: Tensor, weight: ExpertWeight, bias: Tensor) -> Tensor:
    """As ``reference.expert_linear``."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or isinstance(weight, Tensor) or matmul.native() \
            or (torch.is_grad_enabled() and (x.requires_grad or bias.requires_grad)):
        return reference.expert_linear(x, experts, weight, bias)
    n, k = experts.shape
    flat = experts.reshape(-1)
    rows = (x[:, None].expand(n, k, -1) if x.dim() == 2 else x).float().reshape(n * k, -1)
    return (expert_products(rows, flat, weight).to(torch.bfloat16) + bias[flat]).view(n, k, -1)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As ``reference.linear``."""
    several = x.numel() >= 4 * x.shape[-1]
    gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or matmul.native() or gradient or not several:
        return reference.linear(x, weight, bias)
    return matmul.linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)
