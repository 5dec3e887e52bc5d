"""The specification: every kernel of gpt-oss in plain torch, with each rounding where the published code has it.

Any faster kernel is held to these functions by the same tests. In float32 they are exact to rounding; in bfloat16
they round at the places where OpenAI's torch code rounds (gpt_oss/torch/model.py, commit 7b58334).

Letters in shapes: B batch, T new tokens, S keys so far, H query heads, K key/value heads, D head size, d model width,
E experts, k experts chosen per token, F expert width, N = B*T tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gptoss_kernels import dense
from gptoss_kernels.experts import ExpertWeight, expert_outputs, expert_products

name = "reference"


def missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this cannot compute there (see ``gptoss_kernels.select``): plain torch always can."""
    return None


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x (..., d) any dtype, scale (d,) float32 -> (..., d) in x's dtype. Float32 inside, one rounding at the end."""
    t = x.float()
    t = t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + eps)
    return (t * scale).to(x.dtype)


def yarn_frequencies(
    head_dim: int, theta: float, factor: float, beta_fast: float, beta_slow: float,
    original_context: int, truncate: bool,
) -> tuple[Tensor, float]:
    """Angular frequencies of YaRN (Peng et al. 2023, arXiv 2309.00071) -> ((D/2,) float32, concentration).

    gpt-oss does not round the ends of the ramp (``truncate`` False); rounding changes some frequencies by 76 %.
    The order of operations gives the same float32 bits as transformers. The concentration multiplies cos and sin.
    """
    half = head_dim // 2

    def ramp_end(rotations: float) -> float:
        return half * math.log(original_context / (rotations * 2 * math.pi)) / math.log(theta)

    low, high = ramp_end(beta_fast), ramp_end(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    period = theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    extrapolated, interpolated = 1.0 / period, 1.0 / (factor * period)
    ramp = ((torch.arange(half, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    keep = 1 - ramp
    concentration = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return interpolated * (1 - keep) + extrapolated * keep, concentration


def rope_tables(
    positions: Tensor, frequencies: Tensor, concentration: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """positions (B, T) int -> cos, sin (B, T, D/2). Angles in float32, cast to ``dtype`` before they multiply."""
    angles = positions.float()[..., None] * frequencies
    return (angles.cos() * concentration).to(dtype), (angles.sin() * concentration).to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, T, heads, D): dimension i pairs with i + D/2 (half-split, not interleaved)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attention_scores(q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """q (B, T, H, D), k (B, S, K, D), visible (B, T, S) bool -> scores (B, H, T, S), -inf where not visible.

    Query head h reads key head h // (H/K). The product is rounded to the dtype, then scaled by 1/sqrt(D).
    """
    b, t, heads, size = q.shape
    groups = heads // k.shape[2]
    q = q.view(b, t, k.shape[2], groups, size).permute(0, 2, 3, 1, 4).reshape(b, k.shape[2], groups * t, size)
    scores = dense.matmul(q, k.permute(0, 2, 3, 1)).mul_(size**-0.5)
    hidden = torch.zeros_like(visible, dtype=scores.dtype).masked_fill_(~visible, -math.inf)
    return scores.view(b, heads, t, -1).add_(hidden[:, None])  # twenty times as fast as filling all heads by the mask


def softmax_with_sink(scores: Tensor, sinks: Tensor) -> Tensor:
    """scores (B, H, T, S), sinks (H,) -> pattern (B, H, T, S + 1); the last column is the sink's share, rows sum to 1.

    The sink is a learned logit, not multiplied by the softmax scale. A row that sees no key rests wholly on the sink.
    """
    sink = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.softmax(torch.cat((scores, sink), dim=-1), dim=-1)


def attention_values(pattern: Tensor, v: Tensor) -> Tensor:
    """pattern (B, H, T, S + 1), v (B, S, K, D) -> z (B, T, H, D). The sink adds nothing."""
    b, heads, t, _ = pattern.shape
    kv_heads = v.shape[2]
    weights = pattern[..., :-1].reshape(b, kv_heads, heads // kv_heads * t, -1)
    return dense.matmul(weights, v.transpose(1, 2)).view(b, heads, t, -1).transpose(1, 2)


def choose_experts(logits: Tensor, k: int) -> Tensor:
    """The k experts with the largest logits: (..., E) -> (..., k) int64, best first, ties as torch.topk orders them."""
    return torch.topk(logits, k, dim=-1, sorted=True).indices


def expert_weights(logits: Tensor, experts: Tensor) -> Tensor:
    """Softmax over the logits of the chosen experts only: (..., E), (..., k) -> (..., k), in the logits' dtype."""
    return torch.softmax(logits.gather(-1, experts), dim=-1)


def expert_linear(x: Tensor, experts: Tensor, weight: ExpertWeight, bias: Tensor) -> Tensor:
    """One linear map per chosen expert -> (N, k, out).

    Args:
        x: (N, in), the same for every slot, or (N, k, in).
        experts: (N, k) int64.
        weight: (E, out, in), packed MXFP4 or dense.
        bias: (E, out). Added after the product was rounded, as in the published code.

    A packed expert is decoded when a token chose it and dropped afterwards, so memory stays at the packed size, in the
    backward pass too (``gptoss_kernels.experts``). Differentiable in x and bias; the weights are constants.
    """
    n, k = experts.shape
    flat = experts.reshape(-1)
    rows = x[:, None].expand(n, k, -1) if x.dim() == 2 else x
    return (expert_products(rows.reshape(n * k, -1), flat, weight) + bias.index_select(0, flat)).view(n, k, -1)


def split_gate_up(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """(..., 2F) -> gate, up (..., F) each: gate in the even columns, up in the odd ones (interleaved)."""
    return gate_up[..., ::2], gate_up[..., 1::2]


def swiglu(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    """Clamped SwiGLU: gate * sigmoid(alpha * gate) * (up + 1), gate cut above, up cut on both sides at ``limit``."""
    gate = gate.clamp(max=limit)
    up = up.clamp(min=-limit, max=limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def combine_experts(outputs: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum over slots: outputs (N, k, d), weights (N, k) -> (N, d); one contraction, one rounding."""
    return torch.bmm(weights[:, None, :], outputs)[:, 0]


# What faster kernels do in one go. Each is the composition of the functions above, with the roundings in the same
# places, so that a hook between the pieces sees what the fused form computes.


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in), weight (out, in), bias (out,) -> (..., out), in x's dtype."""
    return dense.linear(x, weight, bias)


def project_qkv(
    x: Tensor, q: tuple[Tensor, Tensor], k: tuple[Tensor, Tensor], v: tuple[Tensor, Tensor], cos: Tensor, sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, rotated, and values: x (B, T, d) -> (B, T, H, D), (B, T, K, D), (B, T, K, D).

    Args:
        q, k, v: weight (heads * D, d) and bias (heads * D,) of each projection.
        cos, sin: (B, T, D/2), see ``rope_tables``.
    """
    def heads(y: Tensor) -> Tensor:
        return y.view(*y.shape[:2], -1, 2 * cos.shape[-1])

    return (apply_rope(heads(linear(x, *q)), cos, sin), apply_rope(heads(linear(x, *k)), cos, sin),
            heads(linear(x, *v)))


def add_norm(x: Tensor, delta: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Both x + delta and its norm: x, delta (..., d), scale (d,) float32 -> two of (..., d)."""
    total = x + delta
    return total, rms_norm(total, scale, eps)


def route(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Choose experts and weigh them: (..., E) -> (..., k) int64, (..., k) in the logits' dtype."""
    chosen = choose_experts(logits, k)
    return chosen, expert_weights(logits, chosen)


def expert_mixture(
    x: Tensor, experts: Tensor, weights: Tensor, gate_up: ExpertWeight, gate_up_bias: Tensor, down: ExpertWeight,
    down_bias: Tensor, alpha: float, limit: float,
) -> Tensor:
    """A whole layer of experts: x (N, d), experts (N, k) int64, weights (N, k) -> (N, d).

    Args:
        gate_up, gate_up_bias: (E, 2F, d) and (E, 2F), gate and up rows interleaved.
        down, down_bias: (E, d, F) and (E, d).
        alpha, limit: see ``swiglu``.
    """
    if not (torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad)):
        return combine_experts(expert_outputs(x, experts, gate_up, gate_up_bias, down, down_bias, lambda y: swiglu(
            *split_gate_up(y), alpha, limit)), weights)
    gate, up = split_gate_up(expert_linear(x, experts, gate_up, gate_up_bias))
    outputs = expert_linear(swiglu(gate, up, alpha, limit), experts, down, down_bias)
    return combine_experts(outputs, weights)


def store_kv(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, column: Tensor) -> None:
    """Write one column of two buffers in place: k, v (B, 1, K, D) into keys, values (B, C, K, D) at ``column``.

    Args:
        column: (1,) int64, on the device of the buffers, 0 to C - 1. Not read by the host.
    """
    keys.index_copy_(1, column, k)
    values.index_copy_(1, column, v)


def visible_keys(positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """Which keys a query may look at: (B, T) and (B, S) -> (B, T, S) bool.

    Never later ones, nor padding (a negative position), nor those ``window`` or more behind when there is a window.
    """
    distance = positions[:, :, None] - key_positions[:, None, :]
    visible = (distance >= 0) & (key_positions[:, None, :] >= 0)
    return visible if window is None else visible & (distance < window)


def attention_shown(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, positions: Tensor, key_positions: Tensor, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention as it is computed, for hooks that look and change nothing.

    Args:
        q: (B, T, H, D) at ``positions`` (B, T), each row counting up by one.
        k, v: (B, S, K, D) at ``key_positions`` (B, S), each row counting up by one, negative for padding.
        sinks: (H,).
        window: how many keys a query reaches, itself included; None for all.

    Returns:
        z (B, T, H, D), scores (B, H, T, S), pattern (B, H, T, S + 1).
    """
    scores = attention_scores(q, k, visible_keys(positions, key_positions, window))
    pattern = softmax_with_sink(scores, sinks)
    return attention_values(pattern, v), scores, pattern


def attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, positions: Tensor, key_positions: Tensor, window: int | None,
) -> Tensor:
    """z (B, T, H, D) of ``attention_shown``, for when nobody looks inside."""
    return attention_shown(q, k, v, sinks, positions, key_positions, window)[0]
