"""Tokens sorted by expert and cut into tiles, without asking the GPU how many there are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Groups:
    """A plan for one matrix product of every chosen expert.

    A pair is a token with one of its slots, numbered token * k + slot. A tile is a few pairs of one expert.

    Attributes:
        order: (pairs,) int32, the pairs sorted by expert, those of an expert in their own order.
        tiles: (n, 3) int32 per tile: its expert, and from where to where in ``order``. There are as many rows as
            there could be tiles at most; those beyond are empty and have expert -1.
        height: pairs of a full tile.
    """

    order: Tensor
    tiles: Tensor
    height: int


def group(experts: Tensor, count: int, height: int) -> Groups:
    """Plan the pairs ``experts`` (N, k) int64 of ``count`` experts in tiles of ``height`` pairs.

    Nothing here waits for the GPU, so it may be part of a CUDA graph.
    """
    flat = experts.reshape(-1)
    order = flat.argsort(stable=True)
    members = torch.zeros(count, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))
    last = members.cumsum(0)
    tiles_of = (members + height - 1) // height
    last_tile = tiles_of.cumsum(0)
    number = torch.arange(flat.numel() // height + min(count, flat.numel()), device=flat.device)
    expert = torch.searchsorted(last_tile, number, right=True)
    owner = expert.clamp(max=count - 1)
    start = last[owner] - members[owner] + (number - last_tile[owner] + tiles_of[owner]) * height
    stop = torch.minimum(start + height, last[owner])
    rows = torch.stack((torch.where(expert < count, expert, -1), start, stop), dim=1)
    return Groups(order.int(), rows.int(), height)


def tile_height(pairs: int, count: int) -> int:
    """How many pairs a tile holds: about as many as an expert can expect, 16 (the least) to 64."""
    return min(64, max(16, triton.next_power_of_2(triton.cdiv(pairs, count))))
