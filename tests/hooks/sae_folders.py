"""Folders with sparse autoencoders, small and random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

D, F, K = 64, 40, 6


def tensors(architecture: str, seed: int = 0, width: int = D) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    made = {"W_enc": normal(width, F) / 8, "W_dec": normal(F, width), "b_dec": normal(width)}
    if architecture == "gated":
        return {**made, "b_gate": normal(F) / 4, "b_mag": normal(F), "r_mag": normal(F) / 4}
    made["b_enc"] = normal(F)
    return {**made, "threshold": normal(F).abs()} if architecture == "jumprelu" else made


def write(folder: Path, architecture: str, values: dict[str, torch.Tensor] | None = None, /, **config: Any) -> Path:
    """A folder as SAELens writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    values = tensors(architecture) if values is None else values
    width, features = values["W_enc"].shape if "W_enc" in values else (D, F)
    said = {"architecture": architecture, "d_in": width, "d_sae": features, "dtype": "float32", "device": "cuda",
            "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
            "metadata": {"hook_name": "blocks.2.hook_resid_post", "model_name": "tiny", "sae_lens_version": "6.54.12"}}
    if architecture == "topk":
        said["k"] = K
    (folder / "cfg.json").write_text(json.dumps({**said, **config}))
    save_file({name: tensor.contiguous() for name, tensor in values.items()}, folder / "sae_weights.safetensors")
    return folder
