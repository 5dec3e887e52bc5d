"""The tensors of one model, named for what they do, the same for every checkpoint layout.

Dimension names: d = hidden size, H = query heads, K = key-value heads, dh = head size, E = experts,
F = an expert's inner width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from torch import Tensor

from gptoss_kernels.mxfp4 import Mxfp4Tensor

Experts = Mxfp4Tensor | Tensor


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One transformer layer.

    The norm scales are float32; every other dense tensor has the model's compute dtype. ``gate_up`` and
    ``down`` stay packed when the checkpoint packs them. Rows of ``gate_up`` (and of its bias) interleave:
    even rows make the gate, odd rows the linear part. A sink is one logit a head.
    """

    attn_norm: Tensor  # (d,)
    q_weight: Tensor  # (H * dh, d)
    q_bias: Tensor  # (H * dh,)
    k_weight: Tensor  # (K * dh, d)
    k_bias: Tensor  # (K * dh,)
    v_weight: Tensor  # (K * dh, d)
    v_bias: Tensor  # (K * dh,)
    o_weight: Tensor  # (d, H * dh)
    o_bias: Tensor  # (d,)
    sinks: Tensor  # (H,)
    mlp_norm: Tensor  # (d,)
    router_weight: Tensor  # (E, d)
    router_bias: Tensor  # (E,)
    gate_up: Experts  # (E, 2 * F, d)
    gate_up_bias: Tensor  # (E, 2 * F)
    down: Experts  # (E, d, F)
    down_bias: Tensor  # (E, d)


@dataclass(frozen=True, eq=False)
class Weights:
    """A whole model.

    ``row_of_token`` is None when row i of the two vocabulary matrices belongs to token i. Otherwise the
    matrices hold only the distinct rows, and token i has row ``row_of_token[i]``.
    """

    embed: Tensor  # (rows, d)
    layers: list[LayerWeights]
    final_norm: Tensor  # (d,)
    unembed: Tensor  # (rows, d)
    row_of_token: Tensor | None  # int64 (vocab,)

    def tensors(self) -> Iterator[tuple[str, Tensor | Mxfp4Tensor]]:
        """Every tensor with a name such as ``layers.3.q_weight``, in the order of the computation."""
        yield "embed", self.embed
        if self.row_of_token is not None:
            yield "row_of_token", self.row_of_token
        for index, layer in enumerate(self.layers):
            for field in fields(layer):
                yield f"layers.{index}.{field.name}", getattr(layer, field.name)
        yield "final_norm", self.final_norm
        yield "unembed", self.unembed

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as held, packed experts counted packed."""
        return sum(tensor.nbytes for _, tensor in self.tensors())
