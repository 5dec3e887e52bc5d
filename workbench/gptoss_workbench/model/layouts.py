"""Checkpoint layouts as data: which tensors each holds, under which name, in which shape and dtype.

A layout is recognised by tensor names alone. Shapes cannot tell: the published models have a square
``down`` matrix, so a transposed one would look right.

Shapes are written in the letters of ``Sizes.dims``: d hidden size, H query heads, q and kv the widths of all
query and of all key-value heads, E experts, F an expert's inner width, V vocabulary, R stored rows.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from gptoss_workbench.errors import CheckpointError
from gptoss_workbench.model.config import ModelConfig
from gptoss_workbench.model.files import shorten

# kind of tensor -> dtypes it may have in the file
NORM, DENSE, EXPERT, PACKED, ROWS = "norm", "dense", "expert", "packed", "rows"

_HF_TOP = {
    "embed": ("model.embed_tokens.weight", "V d", DENSE),
    "final_norm": ("model.norm.weight", "d", NORM),
    "unembed": ("lm_head.weight", "V d", DENSE),
}
_COMPACT_TOP = {
    "embed": ("model.embed_tokens.rows", "R d", DENSE),
    "final_norm": ("model.norm.weight", "d", NORM),
    "unembed": ("lm_head.rows", "R d", DENSE),
    "row_of_token": ("row_of_token", "V", ROWS),
}
_HF_LAYER = {
    "attn_norm": ("input_layernorm.weight", "d", NORM),
    "q_weight": ("self_attn.q_proj.weight", "q d", DENSE),
    "q_bias": ("self_attn.q_proj.bias", "q", DENSE),
    "k_weight": ("self_attn.k_proj.weight", "kv d", DENSE),
    "k_bias": ("self_attn.k_proj.bias", "kv", DENSE),
    "v_weight": ("self_attn.v_proj.weight", "kv d", DENSE),
    "v_bias": ("self_attn.v_proj.bias", "kv", DENSE),
    "o_weight": ("self_attn.o_proj.weight", "d q", DENSE),
    "o_bias": ("self_attn.o_proj.bias", "d", DENSE),
    "sinks": ("self_attn.sinks", "H", DENSE),
    "mlp_norm": ("post_attention_layernorm.weight", "d", NORM),
    "router_weight": ("mlp.router.weight", "E d", DENSE),
    "router_bias": ("mlp.router.bias", "E", DENSE),
    "gate_up_bias": ("mlp.experts.gate_up_proj_bias", "E 2F", DENSE),
    "down_bias": ("mlp.experts.down_proj_bias", "E d", DENSE),
}
_HF_PACKED = {
    "gate_up_blocks": ("mlp.experts.gate_up_proj_blocks", "E 2F d/32 16", PACKED),
    "gate_up_scales": ("mlp.experts.gate_up_proj_scales", "E 2F d/32", PACKED),
    "down_blocks": ("mlp.experts.down_proj_blocks", "E d F/32 16", PACKED),
    "down_scales": ("mlp.experts.down_proj_scales", "E d F/32", PACKED),
}
_HF_UNPACKED = {  # (expert, in, out): the other way round from the packed form
    "gate_up": ("mlp.experts.gate_up_proj", "E d 2F", EXPERT),
    "down": ("mlp.experts.down_proj", "E F d", EXPERT),
}
_ORIGINAL_TOP = {
    "embed": ("embedding.weight", "V d", DENSE),
    "final_norm": ("norm.scale", "d", NORM),
    "unembed": ("unembedding.weight", "V d", DENSE),
}
_ORIGINAL_LAYER = {
    "attn_norm": ("attn.norm.scale", "d", NORM),
    "qkv_weight": ("attn.qkv.weight", "qkv d", DENSE),
    "qkv_bias": ("attn.qkv.bias", "qkv", DENSE),
    "o_weight": ("attn.out.weight", "d q", DENSE),
    "o_bias": ("attn.out.bias", "d", DENSE),
    "sinks": ("attn.sinks", "H", DENSE),
    "mlp_norm": ("mlp.norm.scale", "d", NORM),
    "router_weight": ("mlp.gate.weight", "E d", DENSE),
    "router_bias": ("mlp.gate.bias", "E", DENSE),
    "gate_up_blocks": ("mlp.mlp1_weight.blocks", "E 2F d/32 16", PACKED),
    "gate_up_scales": ("mlp.mlp1_weight.scales", "E 2F d/32", PACKED),
    "gate_up_bias": ("mlp.mlp1_bias", "E 2F", DENSE),
    "down_blocks": ("mlp.mlp2_weight.blocks", "E d F/32 16", PACKED),
    "down_scales": ("mlp.mlp2_weight.scales", "E d F/32", PACKED),
    "down_bias": ("mlp.mlp2_bias", "E d", DENSE),
}

# Names that give away a relative of gpt-oss we do not read, and what to say about it.
_RELATIVES = (
    (r"lora_[AB]|^base_model\.", "a LoRA adapter: merge it into its base model and save that"),
    (r"experts\.(gate_up_projs|down_projs)\.\d", "one Linear per expert (bitsandbytes export)"),
    (r"\.quant_state|\.absmax", "bitsandbytes quantisation"),
    (r"experts\.(\d+\.)?(gate_proj|up_proj)", "separate gate and up projections (MLX export)"),
    (r"weight_scale|input_scale", "fp8 quantisation"),
    (r"\.(qweight|qzeros|g_idx)$", "GPTQ or AWQ quantisation"),
)
_LAYER_NUMBER = re.compile(r"^(?:model\.layers|block)\.(\d{1,9})\.")


class Sizes(NamedTuple):
    """The numbers that every tensor shape follows from."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    intermediate_size: int
    vocab_size: int
    rows: int  # stored rows of the vocabulary matrices: vocab_size unless the layout is compact

    @classmethod
    def of(cls, config: ModelConfig, rows: int | None = None) -> Sizes:
        values = [getattr(config, name) for name in cls._fields[:-1]]
        return cls(*values, rows=config.vocab_size if rows is None else rows)

    def dims(self) -> dict[str, int]:
        """Letter of a dimension -> its length."""
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            "d": self.hidden_size, "d/32": self.hidden_size // 32, "16": 16,
            "H": self.num_attention_heads, "q": q, "kv": kv, "qkv": q + 2 * kv,
            "E": self.num_local_experts, "F/32": self.intermediate_size // 32,
            "F": self.intermediate_size, "2F": 2 * self.intermediate_size,
            "V": self.vocab_size, "R": self.rows,
        }


class Slot(NamedTuple):
    """One expected tensor: the part it plays, its name in the file, its shape and allowed dtypes."""

    field: str
    name: str
    shape: tuple[int, ...]
    kind: str
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """A way to write a gpt-oss model down.

    Attributes:
        original: OpenAI's names (``block.N``), else Hugging Face's (``model.layers.N``).
        packed: experts in MXFP4, else one dense matrix each, stored (expert, in, out).
        compact: the vocabulary matrices hold distinct rows only, with ``row_of_token`` beside them.
    """

    original: bool
    packed: bool
    compact: bool

    def __str__(self) -> str:
        owner = "OpenAI" if self.original else "Hugging Face"
        experts = "MXFP4 experts" if self.packed else "unpacked experts"
        return f"{owner} names, {experts}" + (", compact vocabulary" if self.compact else "")

    def dtypes(self, kind: str) -> tuple[str, ...]:
        """Dtypes the file may hold for this kind of tensor. Published weights are bfloat16 throughout;
        float32 is found in re-exports and in compact models."""
        if kind == PACKED:
            return ("U8",)
        if kind == ROWS:
            return ("U16", "I32", "I64")
        return ("BF16", "F32") if self.compact or not self.packed else ("BF16",)

    def top(self, sizes: Sizes) -> list[Slot]:
        """Tensors outside the layers."""
        table = _ORIGINAL_TOP if self.original else _COMPACT_TOP if self.compact else _HF_TOP
        return list(self._slots(table, "", sizes.dims()))

    def layer(self, index: int, sizes: Sizes) -> list[Slot]:
        """Tensors of one layer."""
        if self.original:
            return list(self._slots(_ORIGINAL_LAYER, f"block.{index}.", sizes.dims()))
        experts = _HF_PACKED if self.packed else _HF_UNPACKED
        return list(self._slots({**_HF_LAYER, **experts}, f"model.layers.{index}.", sizes.dims()))

    def all(self, sizes: Sizes) -> list[Slot]:
        """The closed set of tensors that a checkpoint of these sizes consists of."""
        layers = range(sizes.num_hidden_layers)
        return self.top(sizes) + [slot for index in layers for slot in self.layer(index, sizes)]

    def _slots(self, table: Mapping[str, tuple[str, str, str]], prefix: str, dims: dict[str, int]
               ) -> Iterator[Slot]:
        for field, (name, letters, kind) in table.items():
            shape = tuple(dims[letter] for letter in letters.split())
            yield Slot(field, prefix + name, shape, kind, self.dtypes(kind))


def detect(names: Collection[str], folder: str) -> Layout:
    """Tell the layout from the tensor names.

    Raises:
        CheckpointError: when the names are of no layout, or of two at once.
    """
    def starts(*prefixes: str) -> str | None:
        return next((name for name in names if name.startswith(prefixes)), None)

    def ends(*suffixes: str) -> str | None:
        return next((name for name in names if name.endswith(suffixes)), None)

    original, hugging = starts("block.", "embedding."), starts("model.", "lm_head.")
    packed = ends("_blocks", "_scales", "_weight.blocks", "_weight.scales")
    unpacked = ends(".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")
    for pattern, what in _RELATIVES:
        found = next((name for name in names if re.search(pattern, name)), None)
        if found:
            raise CheckpointError("this kind of checkpoint is not read", file=folder, tensor=shorten(found),
                                  expected="MXFP4 or bfloat16 weights of gpt-oss", got=what)
    for one, other in ((original, hugging), (packed, unpacked)):
        if one and other:
            raise CheckpointError("the folder mixes two checkpoint layouts", file=folder,
                                  expected="one layout", got=f"{shorten(one)} beside {shorten(other)}",
                                  hint="keep one set of safetensors files in the folder")
    if not (original or hugging) or not (packed or unpacked):
        some = ", ".join(shorten(name) for name in sorted(names)[:3]) or "no tensor at all"
        raise CheckpointError("these are not the weights of a gpt-oss model", file=folder,
                              expected="tensors named model.layers.N... or block.N..., with mlp experts",
                              got=some)
    blocks = ends("_blocks", "_weight.blocks")
    if blocks and not ends("_scales", "_weight.scales"):
        raise CheckpointError("packed experts without any scales", file=folder, tensor=shorten(blocks),
                              expected="a tensor of scales beside each one of blocks",
                              got="blocks alone: unpacked experts under the names of packed ones, if transformers "
                              "saved them after dequantize=True", hint="take _blocks off their names")
    compact = "row_of_token" in names or ends(".embed_tokens.rows", "lm_head.rows") is not None
    return Layout(original=original is not None, packed=packed is not None, compact=compact)


def implied_sizes(layout: Layout, shapes: Mapping[str, tuple[int, ...]], declared: Sizes) -> Sizes | None:
    """The sizes that the tensors' shapes speak of, or None when they contradict each other.

    A few tensors of the first layer are asked; the result counts only if it then explains every tensor.
    """
    numbers = {int(found[1]) for name in shapes if (found := _LAYER_NUMBER.match(name))}
    if not numbers or max(numbers) + 1 != len(numbers):
        return None
    slots = layout.top(declared) + layout.layer(0, declared)
    first = {slot.field: shapes.get(slot.name, ()) for slot in slots}
    try:
        heads = first["sinks"][0]
        head_dim = first["o_weight"][1] // heads
        kv = (first["qkv_bias"][0] // head_dim - heads) // 2 if layout.original \
            else first["k_bias"][0] // head_dim
        sizes = Sizes(
            num_hidden_layers=len(numbers),
            hidden_size=first["final_norm"][0],
            num_attention_heads=heads,
            num_key_value_heads=kv,
            head_dim=head_dim,
            num_local_experts=first["router_bias"][0],
            intermediate_size=first["gate_up_bias"][1] // 2,
            vocab_size=first["row_of_token" if layout.compact else "embed"][0],
            rows=first["embed"][0],
        )
    except (IndexError, ZeroDivisionError):
        return None
    return sizes if {slot.name: slot.shape for slot in layout.all(sizes)} == dict(shapes) else None
