"""The two functions that read weights, sent to the engine that was chosen for this machine."""

from __future__ import annotations

import torch
from torch import Tensor

from gptoss_kernels.cpu import plain
from gptoss_kernels.cpu.choice import chosen
from gptoss_kernels.experts import ExpertWeight

DTYPES = (torch.bfloat16, torch.float32)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As ``reference.linear``: x (..., in), weight (out, in), bias (out,) -> (..., out). torch computes float32."""
    engine = chosen(x.dtype) if x.dtype == torch.bfloat16 and x.device.type == "cpu" else None
    return (plain if engine is None else engine).linear(x, weight, bias)


def expert_linear(x: Tensor, experts: Tensor, weight: ExpertWeight, bias: Tensor) -> Tensor:
    """As ``reference.expert_linear``. Gradients, dense experts and other devices are left to the reference."""
    engine = chosen(x.dtype) if x.dtype in DTYPES and x.device.type == "cpu" else None
    return (plain if engine is None else engine).expert_linear(x, experts, weight, bias)
