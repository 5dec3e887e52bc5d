"""Kernels for a processor, from pip alone, on the checkpoint's own bytes: nothing is repacked, unless somebody asks for
a smaller copy of the bfloat16 matrices (``packing``).

The functions are those of ``gptoss_kernels.reference``. With one query in each row they are compiled tasks from end to
end, which a ``recording`` plays without Python; with many rows the ones that read weights are. numba is imported, and
code compiled, when the first product is asked for; later processes find the compiled code on disk (``codecache``).
Several paths lead through them (``paths``); the best that the processor can run is taken once it has passed a test
(``choice``), and ``describe`` tells which and why.

Activations in bfloat16 and float32, sums in float32. Where the reference overflows on the way (scale bytes from 253 on)
these products may still be finite.
"""

from __future__ import annotations

import torch

from gptoss_kernels.cpu import matmul
from gptoss_kernels.cpu.attend import (
    attention,
    attention_scores,
    attention_shown,
    attention_values,
    softmax_with_sink,
    store_kv,
    visible_keys,
)
from gptoss_kernels.cpu.choice import chosen, describe, forced, outlook
from gptoss_kernels.cpu.fused import expert_mixture, project_qkv
from gptoss_kernels.cpu.routing import choose_experts, expert_weights, route
from gptoss_kernels.cpu.small import add_norm, apply_rope, combine_experts, rms_norm, swiglu
from gptoss_kernels.cpu.weights import DTYPES, expert_linear, linear
from gptoss_kernels.reference import rope_tables, split_gate_up, yarn_frequencies

__all__ = [
    "add_norm", "apply_rope", "attention", "attention_scores", "attention_shown", "attention_values", "choose_experts",
    "combine_experts", "describe", "expert_linear", "expert_mixture", "expert_weights", "forced", "linear", "missing",
    "name", "not_recorded", "outlook", "project_qkv", "rms_norm", "rope_tables", "route", "softmax_with_sink",
    "split_gate_up", "store_kv", "swiglu", "visible_keys", "yarn_frequencies",
]

name = "cpu"


def missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot compute there; None when they can."""
    if device.type != "cpu":
        return f"for a processor, not for {device.type}"
    if dtype not in DTYPES:
        return f"bfloat16 or float32 only, not {str(dtype).removeprefix('torch.')}"
    return None


def not_recorded(dtype: torch.dtype, rows: int) -> str | None:
    """Why a step of so many prompts can't be recorded; None when it can."""
    if chosen(dtype) is None:
        return "without compiled code the experts of each token are read back"
    if rows >= matmul.many():
        return f"the experts of {matmul.many()} prompts or more are read back"
    return None
