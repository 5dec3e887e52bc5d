"""The good checkpoints that mutants are made of, and what counts as another model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path

import torch

from gptoss_kernels.mxfp4 import Mxfp4Tensor
from gptoss_workbench.harmony.tokens import CALL, ENDOFTEXT, RETURN
from gptoss_workbench.model.checkpoint import plan_checkpoint, read_checkpoint
from gptoss_workbench.model.config import ModelConfig
from gptoss_workbench.model.manifest import write_manifest
from gptoss_workbench.model.model import EMBEDDED
from gptoss_workbench.model.weights import Weights
from tests.factories import LAYOUTS, tiny_model
from tests.model.bad_checkpoints.case import published, published_original, write_sparse

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 64}
TINY = ("hf", "hf-sharded", "original", "original-sharded")
"""Weights of their own sizes: everything in them is read."""
PUBLISHED = ("20b", "20b-original", "120b")
"""Headers and configuration of the published sizes over a file that is all hole: only planned, never read."""
RECOGNISED = (*PUBLISHED, "embedded")
"""Bases whose constants the table of published configurations knows."""


def make_bases(folder: Path) -> None:
    """Write every base below a folder, and beside the tiny ones a second model of the same sizes and names."""
    for name in TINY:
        LAYOUTS[name](folder / name, tiny_model(seed=1, **SMALL))
        LAYOUTS[name](folder / f"other-{name}", tiny_model(seed=2, **SMALL))
    write_sparse(folder / "20b", published(24, 32))
    write_sparse(folder / "120b", published(36, 128))
    write_sparse(folder / "20b-original", published_original(24, 32), original=True)
    for name in PUBLISHED:
        (folder / name / "generation_config.json").write_text(
            json.dumps({"bos_token_id": 199998, "eos_token_id": [200002, 199999, 200012], "pad_token_id": 199999}))
    (folder / "embedded").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / "embedded" / name).symlink_to(EMBEDDED / name)


def sign(folder: Path) -> None:
    """Give a folder the manifest of its files."""
    write_manifest(folder, sorted(path.name for path in folder.iterdir() if path.name != "SHA256"))


def load(folder: Path, base: str) -> str:
    """Load a folder as a person would, and say by a digest which model came out."""
    if base in PUBLISHED:
        plan = plan_checkpoint(folder)
        table = {name: [tensor.file.name, tensor.dtype, tensor.shape] for name, tensor in plan.tensors.items()}
        return _digest([*constants(plan.config), json.dumps(table)])
    config, weights = read_checkpoint(folder, torch.bfloat16)
    return _digest([*constants(config), *_contents(weights)])


def constants(config: ModelConfig) -> list[str]:
    """The fields of a configuration that change a number or a stop. Padding and the longest context do not, nor do
    stops that end a generation anyway."""
    stops = sorted(set(config.eos_token_ids) - {RETURN, ENDOFTEXT, CALL})
    kept = [field.name for field in fields(config)
            if field.name not in ("pad_token_id", "max_position_embeddings", "eos_token_ids")]
    return [f"{name}={getattr(config, name)!r}" for name in kept] + [f"stops={stops}"]


def _contents(weights: Weights) -> list[str]:
    found = []
    for name, tensor in weights.tensors():
        for part in (tensor.blocks, tensor.scales) if isinstance(tensor, Mxfp4Tensor) else (tensor,):
            raw = part.contiguous().view(torch.uint8).numpy().tobytes()
            found.append(f"{name} {part.dtype} {tuple(part.shape)} {hashlib.sha256(raw).hexdigest()}")
    return found


def _digest(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
