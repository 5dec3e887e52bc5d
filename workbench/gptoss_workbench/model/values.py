"""What the values of a checkpoint's tensors give away: MXFP4 scales out of range, numbers that are not finite.

Everything works on a part at a time, so that a mapped tensor of gigabytes costs megabytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

OVERFLOW = 253
"""From this scale byte on, 2 ** (byte - 127) times the larger MXFP4 codes passes the largest finite float32."""
NOT_A_NUMBER = 255
"""The scale byte that the OCP format keeps for NaN."""

_MAGNITUDES = 0x77
"""A byte of two codes without their sign bits; -0 is a zero too."""
_PART = 1 << 22


@dataclass(frozen=True)
class ScaleFindings:
    """The scale bytes of one or more MXFP4 tensors.

    Attributes:
        low, high: smallest and largest byte; 255 and 0 when there was none.
        nans: how many are 255, the format's NaN.
        overflows: how many are 253 or more on a block that holds anything but zeros.
        first: index of the first such byte in the flattened tensor, None when there is none.
    """

    low: int
    high: int
    nans: int = 0
    overflows: int = 0
    first: int | None = None

    @property
    def ok(self) -> bool:
        return not self.nans and not self.overflows


def scale_findings(scales: Tensor, blocks: Tensor) -> ScaleFindings:
    """Look through the scales of one MXFP4 tensor.

    Args:
        scales: uint8 (..., out, in / 32).
        blocks: uint8 (..., out, in / 32, 16); read only where a scale is 253 or more.
    """
    scales, blocks = scales.reshape(-1), blocks.reshape(-1, blocks.shape[-1])
    if not len(scales):
        return ScaleFindings(255, 0)
    low, high = (int(edge) for edge in torch.aminmax(scales))
    if high < OVERFLOW:
        return ScaleFindings(low, high)
    nans = overflows = 0
    first = None
    for start in range(0, len(scales), _PART):
        part = scales[start:start + _PART]
        at = torch.nonzero(part >= OVERFLOW).flatten()
        filled = _holds_values(blocks, at + start)
        bad = at[filled | (part[at] == NOT_A_NUMBER)]
        nans += int((part == NOT_A_NUMBER).sum())
        overflows += int(filled.sum())
        if first is None and len(bad):
            first = start + int(bad[0])
    return ScaleFindings(low, high, nans, overflows, first)


def _holds_values(blocks: Tensor, at: Tensor) -> Tensor:
    """Which of the blocks (block, 16) at these indices hold anything but zeros."""
    parts = [(blocks[some] & _MAGNITUDES != 0).any(-1) for some in at.split(max(1, _PART // 64))]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool, device=blocks.device)


def non_finite(tensor: Tensor) -> tuple[int, tuple[int, ...] | None]:
    """How many values are NaN or infinite, and the index of the first one (None when all are finite)."""
    if not tensor.is_floating_point():
        return 0, None
    flat = tensor.reshape(-1)
    count, first = 0, None
    for start in range(0, len(flat), _PART):
        part = flat[start:start + _PART]
        # A NaN wins over any number in aminmax, so that the two edges tell of sound parts without a mask.
        if all(math.isfinite(float(edge)) for edge in torch.aminmax(part)):
            continue
        wrong = torch.nonzero(~torch.isfinite(part)).flatten()
        count += len(wrong)
        if first is None:
            first = start + int(wrong[0])
    if first is None:
        return 0, None
    return count, tuple(int(index) for index in np.unravel_index(first, tuple(tensor.shape)))
