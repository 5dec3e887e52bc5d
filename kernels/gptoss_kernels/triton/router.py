"""Which experts serve a token, and with what weight. One program a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptoss_kernels import reference
from gptoss_kernels.triton.common import falls_back_to, power_of_two, rounded


@triton.jit
def route_kernel(
    logits, experts, weights, EXPERTS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr, CHOOSE: tl.constexpr,
):
    """logits (tokens, EXPERTS), experts (tokens, SLOTS) int64, written when CHOOSE, read otherwise; weights alike."""
    token = tl.program_id(0).to(tl.int64)
    expert, slot = tl.arange(0, BLOCK), tl.arange(0, BLOCK_SLOTS)
    logit = tl.load(logits + token * EXPERTS + expert, mask=expert < EXPERTS, other=float("-inf")).to(tl.float32)
    if CHOOSE:
        order = tl.where(logit == logit, logit, float("inf"))  # torch ranks NaN above everything
        free = expert < EXPERTS
        chosen = tl.zeros((BLOCK_SLOTS,), tl.int32)
        for i in tl.static_range(SLOTS):
            best = tl.max(tl.where(free, order, float("-inf")), 0)
            first = tl.min(tl.where(free & (order == best), expert, EXPERTS - 1), 0)
            chosen = tl.where(slot == i, first, chosen)
            free = free & (expert != first)
        tl.store(experts + token * SLOTS + slot, chosen.to(tl.int64), mask=slot < SLOTS)
    else:
        chosen = tl.load(experts + token * SLOTS + slot, mask=slot < SLOTS, other=0).to(tl.int32)
    picked = tl.sum(tl.where(chosen[:, None] == expert[None, :], logit[None, :], 0.0), 1)
    picked = tl.where(slot < SLOTS, picked, float("-inf"))
    share = tl.exp(picked - tl.max(picked, 0))
    share = share / tl.sum(share, 0)
    dtype: tl.constexpr = weights.dtype.element_ty
    tl.store(weights + token * SLOTS + slot, rounded(share, dtype).to(dtype), mask=slot < SLOTS)


@falls_back_to(reference.route)
def route(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As ``reference.route``. Among equal logits the lower index goes first.

    torch leaves the order of ties open (its code for processors mixes them). Where no two logits are equal, the
    result is the reference's.
    """
    experts = torch.empty(*logits.shape[:-1], k, dtype=torch.int64, device=logits.device)
    return experts, _launch(logits, experts, choose=True)


def choose_experts(logits: Tensor, k: int) -> Tensor:
    """As ``reference.choose_experts``, ties as in ``route``."""
    return route(logits.detach(), k)[0]


@falls_back_to(reference.expert_weights)
def expert_weights(logits: Tensor, experts: Tensor) -> Tensor:
    """As ``reference.expert_weights``, with the bits of ``route``."""
    return _launch(logits, experts.contiguous(), choose=False)


def _launch(logits: Tensor, experts: Tensor, choose: bool) -> Tensor:
    logits = logits.contiguous()
    count, slots = logits.shape[-1], experts.shape[-1]
    weights = torch.empty(experts.shape, dtype=logits.dtype, device=logits.device)
    if weights.numel():
        route_kernel[(weights.numel() // slots,)](logits, experts, weights, count, slots, power_of_two(count),
                                                  power_of_two(slots), choose, num_warps=1)
    return weights
