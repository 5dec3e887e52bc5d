"""The reference kernels with experts that ask nothing of the host, so that a recording can hold them."""

from __future__ import annotations

import torch
from torch import Tensor

from gptoss_kernels import reference
from gptoss_kernels.mxfp4 import Mxfp4Tensor
from gptoss_kernels.reference import *  # noqa: F403
from gptoss_kernels.reference import combine_experts, split_gate_up, swiglu

name = "reference, on the device alone"
missing = reference.missing

_CODES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def expert_linear(x: Tensor, experts: Tensor, weight: Mxfp4Tensor, bias: Tensor) -> Tensor:
    """As ``reference.expert_linear``, one matrix for each token and slot."""
    bytes_, powers = weight.blocks[experts].int(), torch.exp2(weight.scales[experts].float() - 127)
    codes = torch.stack((_CODES[bytes_ & 15], _CODES[bytes_ >> 4]), dim=-1).flatten(-2)
    matrices = (codes * powers[..., None]).flatten(-2).to(x.dtype)  # (token, slot, out, in)
    rows = x[:, None].expand(-1, experts.shape[1], -1) if x.dim() == 2 else x
    return (matrices @ rows[..., None])[..., 0] + bias[experts]


def expert_mixture(
    x: Tensor, experts: Tensor, weights: Tensor, gate_up: Mxfp4Tensor, gate_up_bias: Tensor, down: Mxfp4Tensor,
    down_bias: Tensor, alpha: float, limit: float,
) -> Tensor:
    gate, up = split_gate_up(expert_linear(x, experts, gate_up, gate_up_bias))
    return combine_experts(expert_linear(swiglu(gate, up, alpha, limit), experts, down, down_bias), weights)


def not_recorded(dtype: torch.dtype, rows: int) -> str | None:
    return None
