"""Kernels that compute what the reference computes, bit for bit, and whose backward pass follows the rules of RelP.

Source: Jafari et al. 2025, "RelP: Faithful and Efficient Circuit Discovery in Language Models via Relevance Patching"
(arXiv 2508.21258), rules of layer-wise relevance propagation (Bach et al. 2015; for transformers Ali et al. 2022).
Each rule takes a factor that varies as a constant, so that what is left is linear around the run:

- norm: the root mean square is constant (LN-rule).
- activation: sigmoid(alpha * gate) is constant (identity rule). The clamps keep their own slope, 0 beyond the limit.
- gate times up: each factor gets half of the slope (half rule).
- attention: the pattern is constant (AH-rule), so nothing flows into queries, keys and scores.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from gptoss_kernels import reference
from gptoss_kernels.experts import ExpertWeight

NO_SLOPE = ("attn.q", "attn.k", "attn.scores")
"""Sites that act through the pattern alone."""


def _halved(x: Tensor) -> Tensor:
    """x with half of its slope; what is added is zero, so the bits stay."""
    return x.detach() + 0.5 * (x - x.detach())


def _rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    t = x.float()
    t = t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + eps).detach()
    return (t * scale).to(x.dtype)


def _add_norm(x: Tensor, delta: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + delta
    return total, _rms_norm(total, scale, eps)


def _softmax_with_sink(scores: Tensor, sinks: Tensor) -> Tensor:
    return reference.softmax_with_sink(scores, sinks).detach()


def _attention_shown(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, positions: Tensor, key_positions: Tensor, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    scores = reference.attention_scores(q, k, reference.visible_keys(positions, key_positions, window))
    pattern = _softmax_with_sink(scores, sinks)
    return reference.attention_values(pattern, v), scores, pattern


def _attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, positions: Tensor, key_positions: Tensor, window: int | None,
) -> Tensor:
    return _attention_shown(q, k, v, sinks, positions, key_positions, window)[0]


def _swiglu(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    return _halved(gate) * torch.sigmoid(alpha * gate).detach() * (_halved(up) + 1)


def _expert_mixture(
    x: Tensor, experts: Tensor, weights: Tensor, gate_up: ExpertWeight, gate_up_bias: Tensor, down: ExpertWeight,
    down_bias: Tensor, alpha: float, limit: float,
) -> Tensor:
    gate, up = reference.split_gate_up(reference.expert_linear(x, experts, gate_up, gate_up_bias))
    outputs = reference.expert_linear(_swiglu(gate, up, alpha, limit), experts, down, down_bias)
    return reference.combine_experts(outputs, weights)


def _kernels() -> ModuleType:
    """The reference with these functions in place of its own."""
    made = ModuleType("relp", __doc__)
    made.__dict__.update({name: value for name, value in vars(reference).items() if not name.startswith("__")})
    made.__dict__.update(name="reference, slopes by RelP", rms_norm=_rms_norm, add_norm=_add_norm, swiglu=_swiglu,
                         softmax_with_sink=_softmax_with_sink, attention_shown=_attention_shown,
                         attention=_attention, expert_mixture=_expert_mixture)
    return made


KERNELS = _kernels()
