"""Tiny random gpt-oss checkpoints in every layout that the workbench reads.

One set of values, drawn from a seed, is written down by each function in its own way, so that loading any two
of the folders must give the same model bit for bit. All values are exact in bfloat16. The unpacked experts
hold what the packed ones decode to, by a decoder of this file's own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

TINY: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 96,  # not the hidden size: a transposed expert must not go unseen
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 8,
    "num_experts_per_tok": 4,
    "vocab_size": 512,
    "sliding_window": 8,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 4096, "truncate": False,
}
SHARED_ROW = 0.25  # the part of the vocabulary that shares one row, in a model made for the compact layout


@dataclass(frozen=True)
class TinyModel:
    """Values of one model: a config in the Hugging Face form, and tensors under the names of that layout.

    ``tensors`` has the experts packed and the vocabulary matrices in full.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]


def tiny_model(seed: int = 0, **sizes: Any) -> TinyModel:
    """Draw a model. ``sizes`` override ``TINY`` or any other key of the configuration.

    The last quarter of the vocabulary shares one row in each of the two vocabulary matrices, as in a model
    that can be written compactly.
    """
    config: dict[str, Any] = {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_act": "silu",
        "attention_bias": True, "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "rope_theta": 150000.0,
        "rope_scaling": dict(YARN), "swiglu_limit": 7.0, "max_position_embeddings": 131072,
        **TINY, **sizes,
    }
    layers = config["num_hidden_layers"]
    config.setdefault("layer_types", [("sliding_attention", "full_attention")[i % 2] for i in range(layers)])
    return TinyModel(config, _draw(config, torch.Generator().manual_seed(seed)))


def _draw(config: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
    d, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads, head = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    experts = config["num_local_experts"]

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale + mean).to(torch.bfloat16)

    def matrix(rows: int, columns: int) -> Tensor:
        return normal(rows, columns, scale=columns**-0.5)

    def packed(name: str, rows: int, columns: int) -> dict[str, Tensor]:
        groups = columns // 32
        blocks = torch.randint(0, 256, (experts, rows, groups, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(121, 125, (experts, rows, groups), generator=generator, dtype=torch.uint8)
        return {f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_bias": normal(experts, rows)}

    tensors = {"model.embed_tokens.weight": normal(vocab, d)}
    for index in range(config["num_hidden_layers"]):
        layer: dict[str, Tensor] = {"input_layernorm.weight": normal(d, scale=0.1, mean=1.0)}
        for name, out, wide in (("q", heads * head, d), ("k", kv_heads * head, d), ("v", kv_heads * head, d),
                                ("o", d, heads * head)):
            layer[f"self_attn.{name}_proj.weight"] = matrix(out, wide)
            layer[f"self_attn.{name}_proj.bias"] = normal(out, scale=0.1)
        layer["self_attn.sinks"] = normal(heads)
        layer["post_attention_layernorm.weight"] = normal(d, scale=0.1, mean=1.0)
        layer["mlp.router.weight"] = matrix(experts, d)
        layer["mlp.router.bias"] = normal(experts, scale=0.1)
        layer |= packed("mlp.experts.gate_up_proj", 2 * inner, d) | packed("mlp.experts.down_proj", d, inner)
        tensors |= {f"model.layers.{index}.{name}": tensor for name, tensor in layer.items()}
    tensors["model.norm.weight"] = normal(d, scale=0.1, mean=1.0)
    tensors["lm_head.weight"] = matrix(vocab, d)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name][_unshared(vocab):] = tensors[name][-1]
    return tensors


def _unshared(vocab: int) -> int:
    return vocab - max(1, int(vocab * SHARED_ROW))


def unpack(blocks: Tensor, scales: Tensor) -> Tensor:
    """(E, out, in/32, 16) and (E, out, in/32) -> bfloat16 (E, out, in), from the bit fields."""
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2).to(torch.float64)
    sign = torch.where(codes >= 8, -1.0, 1.0)
    exponent, mantissa = (codes % 8) // 2, codes % 2
    magnitude = torch.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2 ** (exponent - 1))
    values = sign * magnitude * torch.exp2(scales.to(torch.float64) - 127).unsqueeze(-1)
    return values.flatten(-2).to(torch.bfloat16)


# -- writing ------------------------------------------------------------------------------------------------


def write_hf(folder: Path, model: TinyModel, shards: int = 1) -> Path:
    """Hugging Face layout with MXFP4 experts; more than one shard comes with an index."""
    return _write(folder, _hf_config(model, packed=True), model.tensors, shards)


def write_hf_bf16(folder: Path, model: TinyModel, shards: int = 1) -> Path:
    """Hugging Face layout with the experts unpacked, each matrix stored (expert, in, out)."""
    tensors = dict(model.tensors)
    for name in [name for name in tensors if name.endswith("_blocks")]:
        plain = name.removesuffix("_blocks")
        dense = unpack(tensors.pop(name), tensors.pop(f"{plain}_scales"))
        tensors[plain] = dense.transpose(1, 2).contiguous()
    return _write(folder, _hf_config(model, packed=False), tensors, shards)


def write_original(folder: Path, model: TinyModel, shards: int = 1) -> Path:
    """OpenAI's layout: other names, and query, key and value in one matrix. Its reader needs no index, so
    none is written."""
    tensors = dict(model.tensors)
    for index in range(model.config["num_hidden_layers"]):
        for what in ("weight", "bias"):
            parts = [tensors.pop(f"model.layers.{index}.self_attn.{p}_proj.{what}") for p in "qkv"]
            tensors[f"block.{index}.attn.qkv.{what}"] = torch.cat(parts)
    renamed = {_original_name(name): tensor for name, tensor in tensors.items()}
    return _write(folder, _original_config(model), renamed, shards, index=False)


def write_compact(folder: Path, model: TinyModel) -> Path:
    """The embedded model's layout: distinct vocabulary rows, and the row of each token."""
    vocab = model.config["vocab_size"]
    keep = _unshared(vocab)
    tensors = dict(model.tensors)
    for name, rows in (("model.embed_tokens", "model.embed_tokens.rows"), ("lm_head", "lm_head.rows")):
        tensors[rows] = tensors.pop(f"{name}.weight")[: keep + 1].clone()
    tensors["row_of_token"] = torch.arange(vocab).clamp(max=keep).to(torch.uint16)
    return _write(folder, _hf_config(model, packed=True), tensors, 1)


LAYOUTS = {
    "hf": write_hf,
    "hf-sharded": lambda folder, model: write_hf(folder, model, shards=3),
    "hf-bf16": write_hf_bf16,
    "hf-bf16-sharded": lambda folder, model: write_hf_bf16(folder, model, shards=2),
    "original": write_original,
    "original-sharded": lambda folder, model: write_original(folder, model, shards=2),
    "compact": write_compact,
}
"""Layout name -> function (folder, model) -> folder."""


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], shards: int, index: bool = True
           ) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        part = names[shard * len(names) // shards:(shard + 1) * len(names) // shards]
        numbered = f"model-{shard:05d}-of-{shards - 1:05d}.safetensors"  # from zero, as published
        file = numbered if shards > 1 else "model.safetensors"
        save_file({name: tensors[name].contiguous() for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if shards > 1 and index:
        total = sum(tensor.nbytes for tensor in tensors.values())
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1))
    return folder


def _hf_config(model: TinyModel, packed: bool) -> dict[str, Any]:
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]}
    return {**model.config, **({"quantization_config": quantization} if packed else {})}


def _original_config(model: TinyModel) -> dict[str, Any]:
    hf, rope = model.config, model.config["rope_scaling"]
    same = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim",
            "num_key_value_heads", "vocab_size", "sliding_window", "swiglu_limit", "rope_theta")
    return {
        **{name: hf[name] for name in same},
        "num_experts": hf["num_local_experts"], "experts_per_token": hf["num_experts_per_tok"],
        "initial_context_length": rope["original_max_position_embeddings"],
        "rope_scaling_factor": rope["factor"],
        "rope_ntk_alpha": rope["beta_slow"], "rope_ntk_beta": rope["beta_fast"],
    }


_RENAME = (  # in this order
    ("model.embed_tokens.", "embedding."), ("lm_head.", "unembedding."), ("model.norm.weight", "norm.scale"),
    ("model.layers.", "block."), ("input_layernorm.weight", "attn.norm.scale"),
    ("post_attention_layernorm.weight", "mlp.norm.scale"), ("self_attn.sinks", "attn.sinks"),
    ("self_attn.o_proj.", "attn.out."), ("mlp.router.", "mlp.gate."),
    ("mlp.experts.gate_up_proj_bias", "mlp.mlp1_bias"), ("mlp.experts.down_proj_bias", "mlp.mlp2_bias"),
    ("mlp.experts.gate_up_proj_", "mlp.mlp1_weight."), ("mlp.experts.down_proj_", "mlp.mlp2_weight."),
)


def _original_name(name: str) -> str:
    for old, new in _RENAME:
        name = name.replace(old, new)
    return name
