"""Kernels for an NVIDIA GPU in Triton, on the checkpoint's own MXFP4 bytes.

The functions are those of ``gptoss_kernels.reference``, which also takes what these kernels do not: calls that autograd
watches (but for the experts, which have a backward pass here), float64, dense experts. Activations in bfloat16 or
float32, every sum in float32, rounded where the reference rounds.

Under ``TRITON_INTERPRET=1``, set before triton is imported, the kernels run on the processor, slowly: for tests.
"""

from __future__ import annotations

import torch

from gptoss_kernels.reference import rope_tables, split_gate_up, visible_keys, yarn_frequencies
from gptoss_kernels.triton.activation import combine_experts, swiglu
from gptoss_kernels.triton.attention_by_shape import attention, attention_shown
from gptoss_kernels.triton.attention_pieces import attention_scores, attention_values, softmax_with_sink
from gptoss_kernels.triton.columns import store_kv
from gptoss_kernels.triton.common import DTYPES, INTERPRETED
from gptoss_kernels.triton.dense import linear, project_qkv
from gptoss_kernels.triton.experts import expert_linear, expert_mixture
from gptoss_kernels.triton.norm import add_norm, rms_norm
from gptoss_kernels.triton.rope import apply_rope
from gptoss_kernels.triton.router import choose_experts, expert_weights, route

__all__ = [
    "add_norm", "apply_rope", "attention", "attention_scores", "attention_shown", "attention_values",
    "choose_experts", "combine_experts", "expert_linear", "expert_mixture", "expert_weights", "linear", "missing",
    "name", "not_recorded", "project_qkv", "rms_norm", "rope_tables", "route", "softmax_with_sink", "split_gate_up",
    "store_kv", "swiglu", "visible_keys", "yarn_frequencies",
]

name = "triton"

_OLDEST = (8, 0)  # the first with bfloat16 in its matrix units


def missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot compute there; None when they can."""
    if dtype not in DTYPES:
        return f"bfloat16 or float32 only, not {str(dtype).removeprefix('torch.')}"
    if INTERPRETED:
        return None if device.type == "cpu" else "TRITON_INTERPRET=1 runs them on the processor"
    if device.type != "cuda":
        return f"for an NVIDIA GPU, not for {device.type}"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU"
    if torch.cuda.get_device_capability(device) < _OLDEST:
        return "the GPU is older than compute capability 8.0"
    return None


def not_recorded(dtype: torch.dtype, rows: int) -> str | None:
    """Why a step of so many prompts can't be recorded: with packed experts it always can. No call waits for the GPU
    or reads from it, so that a CUDA graph can hold all of them."""
    return None
