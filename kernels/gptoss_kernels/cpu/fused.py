"""The compositions of ``reference``, of the functions of this package: here they save nothing but a name."""

from __future__ import annotations

from torch import Tensor

from gptoss_kernels.cpu.small import apply_rope, combine_experts, swiglu
from gptoss_kernels.cpu.weights import expert_linear, linear
from gptoss_kernels.experts import ExpertWeight
from gptoss_kernels.reference import split_gate_up

Projection = tuple[Tensor, Tensor]


def project_qkv(
    x: Tensor, q: Projection, k: Projection, v: Projection, cos: Tensor, sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.project_qkv``."""
    def heads(y: Tensor) -> Tensor:
        return y.view(*y.shape[:2], -1, 2 * cos.shape[-1])

    return (apply_rope(heads(linear(x, *q)), cos, sin), apply_rope(heads(linear(x, *k)), cos, sin),
            heads(linear(x, *v)))


def expert_mixture(
    x: Tensor, experts: Tensor, weights: Tensor, gate_up: ExpertWeight, gate_up_bias: Tensor, down: ExpertWeight,
    down_bias: Tensor, alpha: float, limit: float,
) -> Tensor:
    """As ``reference.expert_mixture``."""
    gate, up = split_gate_up(expert_linear(x, experts, gate_up, gate_up_bias))
    outputs = expert_linear(swiglu(gate, up, alpha, limit), experts, down, down_bias)
    return combine_experts(outputs, weights)
