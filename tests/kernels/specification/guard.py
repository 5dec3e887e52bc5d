"""Tensors between canaries: a write beyond the ends of one is found, a read beyond them poisons the result."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

MARGIN = 512  # values on each side

_POISON = {torch.uint8: 0xFF, torch.int32: -0x5A5A5A5A, torch.int64: -0x5A5A5A5A}


def poison(dtype: torch.dtype) -> float | int:
    """NaN, or for integers a value that makes no sense: the largest scale, a negative index."""
    return _POISON.get(dtype, float("nan"))


def fenced(shape: tuple[int, ...], dtype: torch.dtype, device: Any) -> tuple[Tensor, Tensor]:
    """A tensor full of poison, and the larger one that it is the middle of."""
    count = torch.Size(shape).numel()
    whole = torch.full((MARGIN + count + MARGIN,), poison(dtype), dtype=dtype, device=device)
    return whole[MARGIN:MARGIN + count].view(shape), whole


def in_fence(x: Tensor) -> Tensor:
    """The same values with poison in front and behind."""
    inside, _ = fenced(tuple(x.shape), x.dtype, x.device)
    return inside.copy_(x)


class Guard:
    """Puts fences around what launchers allocate by ``torch.empty`` and ``torch.empty_like``."""

    def __init__(self) -> None:
        self.fences: list[tuple[Tensor, int]] = []

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = torch.empty

        def empty(*shape: Any, dtype: torch.dtype | None = None, device: Any = None, **rest: Any) -> Tensor:
            caller = sys._getframe(1).f_globals["__name__"]
            if not caller.startswith("gptoss_kernels.") or dtype not in (torch.float32, torch.bfloat16, torch.int64):
                return original(*shape, dtype=dtype, device=device, **rest)
            size = tuple(shape[0]) if shape and isinstance(shape[0], tuple | list) else shape
            inside, whole = fenced(size, dtype, device)
            self.fences.append((whole, inside.numel()))
            return inside

        def empty_like(x: Tensor, **rest: Any) -> Tensor:
            inside, whole = fenced(tuple(x.shape), rest.get("dtype", x.dtype), x.device)
            self.fences.append((whole, inside.numel()))
            return inside

        monkeypatch.setattr(torch, "empty", empty)
        monkeypatch.setattr(torch, "empty_like", empty_like)

    def check(self) -> None:
        for whole, count in self.fences:
            for side in (whole[:MARGIN], whole[MARGIN + count:]):
                bits = side.view(torch.uint8)
                alive = torch.full_like(side, poison(side.dtype)).view(torch.uint8)
                assert torch.equal(bits, alive), f"something was written beyond a tensor of {count} values"
