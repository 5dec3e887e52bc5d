"""A training checkpoint as a gpt-oss file: `python -m gptoss_workbench.nano.export CHECKPOINT FOLDER`.

Names and packing are those of the published gpt-oss checkpoints. The one difference is the vocabulary: only
distinct rows are stored, and `row_of_token` says which row each of the 201,088 ids uses.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from gptoss_workbench.nano.batching import Rows
from gptoss_workbench.nano.corpus import VOCABULARY_SIZE
from gptoss_workbench.nano.quant import pack
from gptoss_workbench.nano.training_model import Config

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class Checkpoint(NamedTuple):
    """What `train` saved: sizes, rows, and the float32 tensors of the training form."""

    config: Config
    rows: Rows
    state: dict[str, Tensor]
    step: int
    tokens: int


def read_checkpoint(path: Path) -> Checkpoint:
    saved = torch.load(path, weights_only=True, map_location="cpu")
    rows = Rows(tuple(saved["rows"]))
    return Checkpoint(Config(**saved["config"]), rows, saved["model"], saved["step"], saved["tokens"])


def layer_tensors(config: Config, state: dict[str, Tensor], index: int, packed: bool) -> dict[str, Tensor]:
    """The tensors of one layer under their published names: bfloat16, experts in MXFP4 where `packed`."""
    part = {name.removeprefix(f"layers.{index}."): tensor for name, tensor in state.items()
            if name.startswith(f"layers.{index}.")}
    query, both = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    tensors = {
        "input_layernorm.weight": part["attention_norm"],
        "post_attention_layernorm.weight": part["mlp_norm"],
        "self_attn.o_proj.weight": part["out"],
        "self_attn.o_proj.bias": part["out_bias"],
        "self_attn.sinks": part["sinks"],
        "mlp.router.weight": part["router"],
        "mlp.router.bias": part["router_bias"],
        "mlp.experts.gate_up_proj_bias": interleave(part["up_bias"]),
        "mlp.experts.down_proj_bias": part["down_bias"],
    }
    for what, suffix in (("qkv", "weight"), ("qkv_bias", "bias")):
        pieces = zip("qkv", part[what].split([query, both, both]), strict=True)
        tensors.update({f"self_attn.{letter}_proj.{suffix}": piece for letter, piece in pieces})
    tensors = {name: tensor.bfloat16().contiguous() for name, tensor in tensors.items()}
    for name, weight in (("gate_up_proj", interleave(part["up"])), ("down_proj", part["down"])):
        if packed:
            blocks, scales = pack(weight)
            tensors |= {f"mlp.experts.{name}_blocks": blocks, f"mlp.experts.{name}_scales": scales}
        else:  # unpacked experts are published (expert, in, out)
            tensors[f"mlp.experts.{name}"] = weight.bfloat16().transpose(1, 2).contiguous()
    return {f"model.layers.{index}.{name}": tensor for name, tensor in tensors.items()}


def interleave(gate_then_up: Tensor) -> Tensor:
    """[E, 2F, ...] with all gate rows first -> gate and up rows in turn, as gpt-oss stores them."""
    gate, up = gate_then_up.chunk(2, 1)
    return torch.stack((gate, up), 2).flatten(1, 2)


def compact_tensors(checkpoint: Checkpoint, packed: bool = True) -> dict[str, Tensor]:
    """All tensors of the compact file."""
    state = checkpoint.state
    tensors = {
        "model.norm.weight": state["final_norm"].bfloat16(),
        "model.embed_tokens.rows": state["embedding"].bfloat16(),
        "lm_head.rows": state["unembedding"].bfloat16(),
        "row_of_token": torch.from_numpy(checkpoint.rows.of_token()).to(torch.uint16),
    }
    for index in range(checkpoint.config.num_hidden_layers):
        tensors |= layer_tensors(checkpoint.config, state, index, packed)
    return tensors


def published_config(config: Config, packed: bool = True) -> dict[str, Any]:
    """config.json with the keys of the published gpt-oss checkpoints."""
    kinds = ("sliding_attention", "full_attention")
    published: dict[str, Any] = {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": 200_002,
        "experts_per_token": config.num_experts_per_tok,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initial_context_length": config.original_context,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "layer_types": [kinds[index % 2] for index in range(config.num_hidden_layers)],
        "max_position_embeddings": int(config.original_context * config.rope_factor),
        "model_type": "gpt_oss",
        "num_attention_heads": config.num_attention_heads,
        "num_experts_per_tok": config.num_experts_per_tok,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "num_local_experts": config.num_local_experts,
        "output_router_logits": False,
        "pad_token_id": 199_999,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": {
            "beta_fast": config.beta_fast,
            "beta_slow": config.beta_slow,
            "factor": config.rope_factor,
            "original_max_position_embeddings": config.original_context,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": int(config.rope_theta),
        "router_aux_loss_coef": 0.9,
        "sliding_window": config.sliding_window,
        "swiglu_limit": config.swiglu_limit,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": VOCABULARY_SIZE,
    }
    if packed:
        published["quantization_config"] = {
            "modules_to_not_convert": [
                "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
            ],
            "quant_method": "mxfp4",
        }
    return published


def export(checkpoint: Checkpoint, folder: Path, packed: bool = True) -> str:
    """Write the compact folder; returns the sha256 of its weights, which also goes into SHA256."""
    folder.mkdir(parents=True, exist_ok=True)
    # The header names the format: some readers refuse a file without it.
    weights = save(compact_tensors(checkpoint, packed), metadata={"format": "pt"})
    (folder / WEIGHTS).write_bytes(weights)
    text = json.dumps(published_config(checkpoint.config, packed), indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n")
    digest = hashlib.sha256(weights).hexdigest()
    (folder / "SHA256").write_text(f"{digest}  {WEIGHTS}\n")
    return digest


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--experts", choices=("mxfp4", "bfloat16"), default="mxfp4")
    options = parser.parse_args(arguments)
    checkpoint = read_checkpoint(options.checkpoint)
    digest = export(checkpoint, options.folder, packed=options.experts == "mxfp4")
    print(f"step {checkpoint.step}, {checkpoint.tokens} tokens, sha256 {digest}")


if __name__ == "__main__":
    main()
