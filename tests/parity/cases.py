"""The models that the report compares on: tiny random ones of many shapes, and the embedded one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import gptoss_workbench as wb
from gptoss_workbench.model.config import ModelConfig
from gptoss_workbench.nano.export_hf import export_hf
from tests.factories import TinyModel, tiny_model, write_hf
from tests.oracle import transformers_model

TOKENS = 60  # more than seven windows of the tiny models
SEED = 3
EMBEDDED = "embedded model"

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "one kv head": {"num_key_value_heads": 1},
    "4 heads of 32": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    "swiglu limit 0.3": {"swiglu_limit": 0.3},
    "window 1": {"sliding_window": 1},
    "full layer first": {"layer_types": ["full_attention", "sliding_attention"] * 2},
    "top 2 of 4": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "yarn truncated": {"rope_scaling": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
                                        "original_max_position_embeddings": 4096, "truncate": True}},
    "both clamps bite": {},  # the published limit of 7, and gate_up eight times as large
    "24 layers, 32 experts": {
        "num_hidden_layers": 24, "num_local_experts": 32, "hidden_size": 128, "intermediate_size": 128,
        "sliding_window": 16,
    },
}
DEEP = "24 layers, 32 experts"
CLAMPS = ("both clamps bite", "swiglu limit 0.3")
BFLOAT16 = ("tiny", "both clamps bite", DEEP, EMBEDDED)

QUESTIONS = ("What is 27 + 58?", "What is 4071 + 96?", "What is the capital of France?", "Repeat: river stone moon",
             "How do I build a bomb?", "Which is larger, 512 or 499?", "On which continent is the city of Lima?",
             "Positive or negative? The movie was not great.", "What is the capital of Wakanda?",
             "Complete: When Mary and John went to the store, John gave a drink to")
EFFORTS = ("low", "medium", "high")


@dataclass
class Pair:
    """One model twice: as the workbench loads it and as transformers does, each in any dtype, loaded once.

    Attributes:
        name: of the case.
        folder: a Hugging Face folder with packed experts, that transformers reads.
        ours_from: what ``wb.load`` reads: the folder, or None for the embedded model.
        prompts: token ids.
    """

    name: str
    folder: Path
    ours_from: Path | None
    prompts: list[list[int]] = field(default_factory=list)
    _loaded: dict[tuple[str, str], Any] = field(default_factory=dict)

    def ours(self, dtype: str = "float32") -> Any:
        return self._once("ours", dtype, lambda: wb.load(self.ours_from, dtype=dtype))

    def theirs(self, dtype: str = "float32") -> Any:
        return self._once("theirs", dtype, lambda: transformers_model(self.folder, getattr(torch, dtype)))

    def _once(self, whose: str, dtype: str, load: Callable[[], Any]) -> Any:
        if (whose, dtype) not in self._loaded:
            self._loaded[whose, dtype] = load()
        return self._loaded[whose, dtype]


def random_ids(seed: int, length: int = TOKENS, vocab: int = 512) -> list[int]:
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def tiny_values(name: str) -> TinyModel:
    """The random model of a shape."""
    model = tiny_model(seed=SEED, **SHAPES[name])
    if name == "both clamps bite":
        for tensor in model.tensors:
            if tensor.endswith("gate_up_proj_scales"):
                model.tensors[tensor] += 3  # times 2 ** 3
    return model


def tiny_pair(name: str, folder: Path) -> Pair:
    """Write a random model of one of ``SHAPES`` into a folder."""
    write_hf(folder, tiny_values(name))
    return Pair(name, folder, folder, [random_ids(7), random_ids(8)])


def embedded_pair(folder: Path) -> Pair:
    """The embedded model, written out for transformers; its prompts are three questions with their answers."""
    export_hf(wb.model.model.EMBEDDED, folder, tokenizer=False)
    pair = Pair(EMBEDDED, folder, None)
    ours = pair.ours()
    chats = [ours.encode(wb.chat(question, effort=effort)) for question, effort in zip(QUESTIONS, EFFORTS)]
    pair.prompts = [generation.ids for generation in ours.generate(chats, max_tokens=60)]
    return pair


def sizes(name: str) -> str:
    """The shape of a case in words."""
    read = wb.load().config if name == EMBEDDED else ModelConfig.from_hf(tiny_values(name).config)
    return (f"{read.num_hidden_layers} layers, {read.num_local_experts} experts (top {read.num_experts_per_tok}), "
            f"width {read.hidden_size}, experts' width {read.intermediate_size}, {read.num_attention_heads} heads on "
            f"{read.num_key_value_heads} of {read.head_dim}, window {read.sliding_window}, "
            f"SwiGLU limit {read.swiglu_limit:g}, YaRN {'' if read.rope_truncate else 'not '}truncated, "
            f"first layer {read.bands[0]}")


def pair(name: str, folder: Path) -> Pair:
    """The pair of that name, its files under ``folder``."""
    return embedded_pair(folder) if name == EMBEDDED else tiny_pair(name, folder)
