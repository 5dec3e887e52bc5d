"""gpt-oss in its training form: same function as the exported file, laid out for speed on a CPU.

Differences of layout only: q, k and v in one matrix; gate rows before up rows instead of interleaved;
flat tokens without padding; prefixes shared by many examples computed once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptoss_workbench.nano.batching import Batch, Group
from gptoss_workbench.nano.quant import StraightThrough


@dataclass(frozen=True)
class Config:
    """Sizes, named as in gpt-oss's config.json; `rows` counts the stored rows, the shared one included."""

    rows: int
    hidden_size: int = 128
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    num_local_experts: int = 16
    num_experts_per_tok: int = 4
    intermediate_size: int = 64
    sliding_window: int = 16
    swiglu_limit: float = 7.0
    rope_theta: float = 150_000.0
    rope_factor: float = 32.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    original_context: int = 4096
    rms_norm_eps: float = 1e-5


def yarn_frequencies(config: Config) -> tuple[Tensor, float]:
    """Rotary frequencies float32 [head_dim / 2] and the factor on cos and sin, as in gpt-oss."""
    half = config.head_dim // 2
    period = config.rope_theta ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)

    def dimension(rotations: float) -> float:
        turns = config.original_context / (rotations * 2 * math.pi)
        return half * math.log(turns) / math.log(config.rope_theta)

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    stretch = ((torch.arange(half).float() - low) / (high - low)).clamp(0, 1)
    frequencies = stretch / (config.rope_factor * period) + (1 - stretch) / period
    return frequencies, 0.1 * math.log(config.rope_factor) + 1.0


class Gather(torch.autograd.Function):
    """Rows by index where every row is read at most once by real data: the gradient is a gather too."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradients[0].index_select(0, inverse), None, None


class Unpad(torch.autograd.Function):
    """The flat tokens out of the padded groups; padding gets no gradient."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, inverse: Tensor, index: Tensor, exists: Tensor) -> Tensor:
        ctx.save_for_backward(index, exists)
        return padded.index_select(0, inverse)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        index, exists = ctx.saved_tensors
        return gradients[0].index_select(0, index).mul_(exists), None, None, None


class Experts(torch.autograd.Function):
    """The expert MLPs on tokens sorted by expert; written by hand so that nothing is copied twice."""

    ALPHA = 1.702

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor,
                ends: list[int], limit: float) -> Tensor:
        """x [N, d] sorted by expert, up [E, 2F, d] (gate first), down [E, d, F] -> [N, d]."""
        width = down.shape[2]
        hidden = x.new_empty(x.shape[0], 2 * width)
        out = torch.empty_like(x)
        starts = [0, *ends[:-1]]
        for e, (a, b) in enumerate(zip(starts, ends, strict=True)):
            torch.addmm(up_bias[e], x[a:b], up[e].T, out=hidden[a:b])
        gate = hidden[:, :width].clamp(max=limit)
        linear = hidden[:, width:].clamp(-limit, limit).add_(1.0)
        sigmoid = torch.sigmoid(gate * Experts.ALPHA)
        act = gate * sigmoid * linear
        for e, (a, b) in enumerate(zip(starts, ends, strict=True)):
            torch.addmm(down_bias[e], act[a:b], down[e].T, out=out[a:b])
        ctx.save_for_backward(x, up, down, hidden, gate, linear, sigmoid, act)
        ctx.bounds, ctx.limit = list(zip(starts, ends, strict=True)), limit
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, up, down, hidden, gate, linear, sigmoid, act = ctx.saved_tensors
        d_out = gradients[0].contiguous()
        width = down.shape[2]
        d_act = torch.empty_like(act)
        d_down, d_up = torch.empty_like(down), torch.empty_like(up)
        d_down_bias, d_up_bias = x.new_empty(down.shape[:2]), x.new_empty(up.shape[:2])
        for e, (a, b) in enumerate(ctx.bounds):
            torch.mm(d_out[a:b], down[e], out=d_act[a:b])
            torch.mm(d_out[a:b].T, act[a:b], out=d_down[e])
            torch.sum(d_out[a:b], 0, out=d_down_bias[e])
        d_hidden = torch.empty_like(hidden)
        slope = sigmoid * (1.0 + Experts.ALPHA * gate * (1.0 - sigmoid))
        d_hidden[:, :width] = d_act * linear * slope * (hidden[:, :width] <= ctx.limit)
        d_hidden[:, width:] = d_act * gate * sigmoid * (hidden[:, width:].abs() <= ctx.limit)
        d_x = torch.empty_like(x)
        for e, (a, b) in enumerate(ctx.bounds):
            torch.mm(d_hidden[a:b], up[e], out=d_x[a:b])
            torch.mm(d_hidden[a:b].T, x[a:b], out=d_up[e])
            torch.sum(d_hidden[a:b], 0, out=d_up_bias[e])
        return d_x, d_up, d_up_bias, d_down, d_down_bias, None, None


class Dispatch(torch.autograd.Function):
    """Each token once per chosen expert, in expert order: [T, d] -> [T * k, d]; its gradient sums k."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x.index_select(0, order // k)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return gradients[0].index_select(0, inverse).unflatten(0, (-1, ctx.k)).sum(1), None, None, None


class WeightedLoss(torch.autograd.Function):
    """Mean cross-entropy with weights; its gradient is made together with it, in one pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """logits [N, rows], targets int64 [N], weights [N] -> scalar."""
        share = weights / weights.sum()
        probabilities = torch.softmax(logits, -1)
        chosen = probabilities.gather(1, targets[:, None])[:, 0]
        loss = -(chosen.clamp_min(1e-30).log() * share).sum()
        probabilities[torch.arange(len(targets)), targets] -= 1.0
        ctx.save_for_backward(probabilities.mul_(share[:, None]))
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * gradients[0], None, None


class Layer(nn.Module):
    """Attention with sinks, then a mixture of experts."""

    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        d, heads, kv = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        h, experts, width = config.head_dim, config.num_local_experts, config.intermediate_size
        residual = 1 / math.sqrt(2 * config.num_hidden_layers)

        def normal(*shape: int, std: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape) * std)

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape))

        self.config, self.sliding = config, index % 2 == 0
        self.attention_norm = nn.Parameter(torch.ones(d))
        self.qkv = normal((heads + 2 * kv) * h, d, std=d**-0.5)
        self.qkv_bias = zeros((heads + 2 * kv) * h)
        self.out = normal(d, heads * h, std=(heads * h) ** -0.5 * residual)
        self.out_bias = zeros(d)
        self.sinks = zeros(heads)
        self.mlp_norm = nn.Parameter(torch.ones(d))
        self.router = normal(experts, d, std=d**-0.5)
        self.router_bias = zeros(experts)
        self.up = normal(experts, 2 * width, d, std=d**-0.5)
        self.up_bias = zeros(experts, 2 * width)
        self.down = normal(experts, d, width, std=width**-0.5 * residual)
        self.down_bias = zeros(experts, d)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.config.rms_norm_eps)

    def attention(self, x: Tensor, batch: Batch, cos: Tensor, sin: Tensor) -> Tensor:
        """x [T, d]; cos, sin [T, 1, head_dim / 2] -> [T, d]."""
        c = self.config
        heads, kv, h = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        qkv = F.linear(self.norm(x, self.attention_norm), self.qkv, self.qkv_bias)
        query_key, value = qkv.split([(heads + kv) * h, kv * h], 1)
        first, second = query_key.unflatten(1, (heads + kv, 2, h // 2)).unbind(2)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1).flatten(1)
        flat = torch.cat((turned, value), 1)
        padded = Gather.apply(flat, batch.index, batch.inverse)
        pieces = padded.split([group.own.numel() for group in batch.groups])
        shape = batch.groups[0].own.shape
        prefix = pieces[0].view(*shape, -1)[..., heads * h :]
        if self.sliding:
            prefix = torch.stack([row.index_select(0, tail) for row, tail in
                                  zip(prefix.unbind(0), batch.prefix_tail.unbind(0), strict=True)])
        outs = [self.attend(piece.view(*group.own.shape, -1), prefix, group)
                for piece, group in zip(pieces, batch.groups, strict=True)]
        joined = Unpad.apply(torch.cat(outs), batch.inverse, batch.index, batch.exists)
        return F.linear(joined, self.out, self.out_bias)

    def attend(self, own: Tensor, prefix: Tensor, group: Group) -> Tensor:
        """own [B, L, q + k + v], prefix [U, P, k + v] -> [B * L, heads * head_dim]."""
        c = self.config
        heads, kv, h = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        b, length, per = own.shape[0], own.shape[1], heads // kv
        own_query, keys_values = own.split([heads * h, 2 * kv * h], -1)
        if group.prefix is not None:
            keys_values = torch.cat((prefix.index_select(0, group.prefix), keys_values), 1)
        query = (own_query * h**-0.5).view(b, length, kv, per, h).permute(0, 2, 3, 1, 4)
        key, value = keys_values.unflatten(-1, (2, kv, h)).unbind(2)
        key, value = key.permute(0, 2, 3, 1), value.transpose(1, 2)
        scores = torch.bmm(query.reshape(b * kv, per * length, h), key.reshape(b * kv, h, -1))
        mask = group.sliding_mask if self.sliding else group.full_mask
        scores = scores.view(b, heads, length, -1) + mask[:, None]
        sinks = self.sinks.view(1, heads, 1, 1).expand(b, heads, length, 1)
        pattern = torch.softmax(torch.cat((scores, sinks), -1), -1)[..., :-1]
        out = torch.bmm(pattern.reshape(b * kv, per * length, -1), value.reshape(b * kv, -1, h))
        return out.view(b, heads, length, h).transpose(1, 2).reshape(b * length, heads * h)

    def experts(self, x: Tensor, quantized: bool) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, d] -> (output [T, d], auxiliary loss, how often each expert was chosen [E])."""
        c = self.config
        k, count = c.num_experts_per_tok, c.num_local_experts
        t = self.norm(x, self.mlp_norm)
        logits = F.linear(t, self.router, self.router_bias)
        top, chosen = logits.topk(k, -1)
        share = torch.softmax(top, -1)
        flat = chosen.reshape(-1)
        order = flat.argsort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order))
        load = torch.bincount(flat, minlength=count)
        up, down = self.up, self.down
        if quantized:
            up, down = StraightThrough.apply(up), StraightThrough.apply(down)
        y = Experts.apply(Dispatch.apply(t, order, inverse, k), up, self.up_bias, down, self.down_bias,
                          load.cumsum(0).tolist(), c.swiglu_limit)
        y = Gather.apply(y, inverse, order).unflatten(0, (-1, k))
        out = torch.bmm(share[:, None], y)[:, 0]
        balance = count * (load / len(flat) * torch.softmax(logits, -1).mean(0)).sum()
        return out, balance + 1e-3 * torch.logsumexp(logits, -1).square().mean(), load


class TrainingModel(nn.Module):
    """Rows in, hidden states out; `logits` is the exact softmax over 201,088 ids in compact form."""

    frequencies: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        d = config.hidden_size
        self.config = config
        self.embedding = nn.Parameter(torch.randn(config.rows, d) * 0.5)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.final_norm = nn.Parameter(torch.ones(d))
        self.unembedding = nn.Parameter(torch.randn(config.rows, d) * d**-0.5 * 0.5)
        frequencies, self.concentration = yarn_frequencies(config)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.quantized = False

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """-> (final hidden states [T, d], mean auxiliary loss, expert load [layers, E])."""
        angles = batch.positions.float()[:, None, None] * self.frequencies
        cos, sin = angles.cos() * self.concentration, angles.sin() * self.concentration
        x = F.embedding(batch.rows, self.embedding)
        auxiliary, loads = x.new_zeros(()), []
        for layer in self.layers:
            assert isinstance(layer, Layer)
            x = x + layer.attention(x, batch, cos, sin)
            y, balance, load = layer.experts(x, self.quantized)
            x, auxiliary = x + y, auxiliary + balance
            loads.append(load)
        x = F.rms_norm(x, (x.shape[-1],), self.final_norm, self.config.rms_norm_eps)
        return x, auxiliary / len(self.layers), torch.stack(loads)

    def logits(self, hidden: Tensor, unused: int) -> Tensor:
        """[N, d] -> [N, rows]; the shared row stands for `unused` equal logits, hence + log(unused)."""
        logits = F.linear(hidden, self.unembedding)
        shift = logits.new_zeros(logits.shape[-1])
        shift[-1] = math.log(unused)
        return logits + shift
