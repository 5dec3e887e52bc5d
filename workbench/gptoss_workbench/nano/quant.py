"""MXFP4 from scratch: blocks of 32 four-bit floats (E2M1) that share one power of two (E8M0)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 32
SCALE_BIAS = 127
# The eight magnitudes of E2M1; the sign is bit 3 of the code.
MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
# Halfway points between neighbours: where rounding changes its mind.
_MIDPOINTS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
_LARGEST_EXPONENT = 2  # 6.0 = 1.5 * 2**2


def _round(values: Tensor, exponents: Tensor) -> Tensor:
    """Index of the nearest magnitude of |values| / 2**exponents. [..., 32], [...] -> int64 [..., 32]."""
    return torch.bucketize(torch.ldexp(values.abs(), -exponents[..., None]).contiguous(), _MIDPOINTS)


def _error(values: Tensor, indices: Tensor, exponents: Tensor) -> Tensor:
    """Summed squared error of each block."""
    return (torch.ldexp(MAGNITUDES[indices], exponents[..., None]) - values.abs()).square().sum(-1)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int64 [..., blocks, 32] and exponents int32 [..., blocks] of `weight` [..., blocks * 32].

    The exponent of a block is floor(log2(largest)) - 2, which may clip the largest value at 6, or one more,
    which never clips but is coarser; the one with the smaller squared error is taken.
    """
    values = weight.detach().float().unflatten(-1, (-1, BLOCK))
    largest = values.abs().amax(-1).clamp_min(2.0**-120)
    fine = torch.frexp(largest).exponent - 1 - _LARGEST_EXPONENT
    coarse = fine + 1
    fine_indices, coarse_indices = _round(values, fine), _round(values, coarse)
    better = _error(values, coarse_indices, coarse) < _error(values, fine_indices, fine)
    exponents = torch.where(better, coarse, fine)
    indices = torch.where(better[..., None], coarse_indices, fine_indices)
    # No negative zero: one code for one value.
    negative = (values < 0) & (indices > 0)
    return indices + 8 * negative, exponents


def dequantize(codes: Tensor, exponents: Tensor) -> Tensor:
    """Inverse of `quantize`: float32 [..., blocks * 32]."""
    signs = 1.0 - 2.0 * (codes >= 8)
    return torch.ldexp(signs * MAGNITUDES[codes % 8], exponents[..., None]).flatten(-2)


def round_to_mxfp4(weight: Tensor) -> Tensor:
    """`weight` as the exported file will hold it (float32, same shape)."""
    return dequantize(*quantize(weight))


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(blocks uint8 [..., n, 16], scales uint8 [..., n]) as in gpt-oss: even elements in low nibbles."""
    codes, exponents = quantize(weight)
    codes = codes.to(torch.uint8)
    blocks = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return blocks.contiguous(), (exponents + SCALE_BIAS).to(torch.uint8)


def unpack(blocks: Tensor, scales: Tensor) -> Tensor:
    """Inverse of `pack`: float32 [..., n * 32]."""
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2).long()
    return dequantize(codes, scales.int() - SCALE_BIAS)


class StraightThrough(torch.autograd.Function):
    """MXFP4 rounding in the forward pass, identity in the backward pass."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return round_to_mxfp4(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]
