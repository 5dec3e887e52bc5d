"""The specification: every kernel of gpt-oss in plain torch, with each rounding where the published code has it.

Any faster kernel is held to these functions by the same tests. In float32 they are exact to rounding; in bfloat16
they round at the places where OpenAI's torch code rounds (gpt_oss/torch/model.py, commit 7b58334).

Letters in shapes: B batch, T new tokens, S keys so far, H query heads, K key/value heads, D head size, d model width,
E experts, k experts chosen per token, F expert width, N = B*T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from gptoss_kernels.mxfp4 import Mxfp4Tensor, dequantize

name = "reference"

ExpertWeight = Mxfp4Tensor | Tensor

SCRATCH_VALUES = 1 << 20  # decoded at a time, if one expert is not larger: many small experts cost one lookup together


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
    scores = torch.matmul(q, k.permute(0, 2, 3, 1)) * size**-0.5
    return scores.view(b, heads, t, -1).masked_fill(~visible[:, None], -math.inf)


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
    return torch.matmul(weights, v.transpose(1, 2)).view(b, heads, t, -1).transpose(1, 2)


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

    A packed expert is decoded when a token chose it and dropped afterwards, so memory stays at the packed size.
    """
    n, k = experts.shape
    flat = experts.reshape(-1)
    order = flat.argsort(stable=True)  # rows of the same expert next to each other
    sources = x[order // k] if x.dim() == 2 else x.reshape(n * k, -1)[order]
    counts = torch.bincount(flat, minlength=weight.shape[0]).tolist()
    chosen = [expert for expert, count in enumerate(counts) if count]
    pieces = sources.split([counts[expert] for expert in chosen])
    products = torch.cat([F.linear(piece, w) for piece, w in zip(pieces, _dense(weight, chosen, x.dtype))])
    out = torch.empty_like(products)
    out[order] = products
    return (out + bias[flat]).view(n, k, -1)


def _dense(weight: ExpertWeight, experts: list[int], dtype: torch.dtype) -> Iterator[Tensor]:
    """The (out, in) matrices of some experts in turn, decoded as many at a time as the scratch holds."""
    if not isinstance(weight, Mxfp4Tensor):
        yield from (weight[expert] for expert in experts)
        return
    together = max(1, SCRATCH_VALUES // (weight.shape[1] * weight.shape[2]))
    for start in range(0, len(experts), together):
        yield from dequantize(weight[experts[start : start + together]], dtype)


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
