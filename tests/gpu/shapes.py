"""Models of the published shapes with random weights, made on the device one layer after the other."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gptoss_kernels.mxfp4 import Mxfp4Tensor
from gptoss_workbench.model.config import ModelConfig
from gptoss_workbench.model.weights import LayerWeights, Weights
from tests.benchmarks import full_shape

DRY: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "num_local_experts": 4, "num_experts_per_tok": 2, "experts_per_token": 2, "vocab_size": 128, "sliding_window": 8,
    "num_hidden_layers": 2, "eos_token_id": 2, "pad_token_id": 0,
}
"""What a dry run has instead of the published sizes."""


def config(model: str, dry: bool, **sizes: Any) -> dict[str, Any]:
    """The published config.json of "20b" or "120b"."""
    return full_shape.config(model, **({**DRY, **sizes} if dry else sizes))


class Maker:
    """Draws weights whose maps keep the size of what they are given."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> None:
        self._device, self._dtype = device, dtype
        self._draw = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, scale: float, mean: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
        out = torch.empty(shape, dtype=dtype or self._dtype, device=self._device)
        return out.normal_(mean, scale, generator=self._draw)

    def matrix(self, rows: int, columns: int) -> Tensor:
        return self.normal(rows, columns, scale=columns**-0.5)

    def packed(self, experts: int, rows: int, columns: int) -> Mxfp4Tensor:
        """Any codes; scales of four neighbouring powers of two, 4.6 times the lowest in the mean."""
        groups = columns // 32
        lowest = 127 + round(math.log2(columns**-0.5 / full_shape.CODE_RMS / 4.61))

        def bytes_(low: int, high: int, *shape: int) -> Tensor:
            out = torch.empty(shape, dtype=torch.uint8, device=self._device)
            return out.random_(low, high, generator=self._draw)

        return Mxfp4Tensor(bytes_(0, 256, experts, rows, groups, 16), bytes_(lowest, lowest + 4, experts, rows, groups))

    def layer(self, c: ModelConfig) -> LayerWeights:
        d, inner, experts, size = c.hidden_size, c.intermediate_size, c.num_local_experts, c.head_dim
        queries, keys = c.num_attention_heads * size, c.num_key_value_heads * size

        def bias(*shape: int) -> Tensor:
            return self.normal(*shape, scale=0.1)

        def norm() -> Tensor:
            return self.normal(d, scale=0.1, mean=1.0, dtype=torch.float32)

        return LayerWeights(
            attn_norm=norm(), q_weight=self.matrix(queries, d), q_bias=bias(queries), k_weight=self.matrix(keys, d),
            k_bias=bias(keys), v_weight=self.matrix(keys, d), v_bias=bias(keys), o_weight=self.matrix(d, queries),
            o_bias=bias(d), sinks=self.normal(c.num_attention_heads, scale=1.0), mlp_norm=norm(),
            router_weight=self.matrix(experts, d), router_bias=bias(experts),
            gate_up=self.packed(experts, 2 * inner, d), gate_up_bias=bias(experts, 2 * inner),
            down=self.packed(experts, d, inner), down_bias=bias(experts, d))

    def weights(self, c: ModelConfig) -> Weights:
        """A whole model; the device never holds more than it and one tensor."""
        layers = [self.layer(c) for _ in range(c.num_hidden_layers)]
        return Weights(
            embed=self.normal(c.vocab_size, c.hidden_size, scale=1.0), layers=layers,
            final_norm=self.normal(c.hidden_size, scale=0.1, mean=1.0, dtype=torch.float32),
            unembed=self.matrix(c.vocab_size, c.hidden_size), row_of_token=None)


def active_bytes(weights: Weights, c: ModelConfig) -> int:
    """Bytes of weights that one token reads: everything but the embedding and the experts that it does not visit."""
    total = 0
    for name, tensor in weights.tensors():
        part = name.rpartition(".")[2]
        if part in ("gate_up", "gate_up_bias", "down", "down_bias"):
            total += tensor.nbytes * c.num_experts_per_tok // c.num_local_experts
        elif name == "embed":
            total += tensor.nbytes // c.vocab_size
        else:
            total += tensor.nbytes
    return total
