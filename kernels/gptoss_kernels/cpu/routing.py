"""Choosing experts as compiled tasks. Among equal logits the expert with the lower number goes first; torch leaves
that open, and its own code for processors mixes them.

Gradients and processors without numba are left to the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptoss_kernels import reference
from gptoss_kernels.cpu.small import run, suits, wide


def route(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As ``reference.route``."""
    if not suits(logits) or not 0 < k <= logits.shape[-1]:
        return reference.route(logits, k)
    experts = torch.empty(*logits.shape[:-1], k, dtype=torch.int64)
    return experts, _weights(logits, experts, choose=True)


def choose_experts(logits: Tensor, k: int) -> Tensor:
    """As ``reference.choose_experts``."""
    return route(logits.detach(), k)[0]


def expert_weights(logits: Tensor, experts: Tensor) -> Tensor:
    """As ``reference.expert_weights``. A weight is NaN where an expert does not exist."""
    if not suits(logits) or experts.dtype != torch.int64 or experts.numel() == 0 \
            or experts.shape[:-1] != logits.shape[:-1]:
        return reference.expert_weights(logits, experts)
    return _weights(logits, experts.contiguous(), choose=False)


def _weights(logits: Tensor, experts: Tensor, choose: bool) -> Tensor:
    logits, slots = logits.contiguous(), experts.shape[-1]
    weights = torch.empty(experts.shape, dtype=logits.dtype)
    run("routed", weights.numel() // slots, logits.data_ptr(), experts.data_ptr(), weights.data_ptr(), logits.shape[-1],
        slots, int(choose), way=wide(logits))
    return weights
