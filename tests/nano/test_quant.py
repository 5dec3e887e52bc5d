"""MXFP4: what is written is on the grid, near what was meant, and stays itself when written again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptoss_workbench.nano.quant import BLOCK, MAGNITUDES, StraightThrough, pack, quantize, round_to_mxfp4, unpack

values = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
blocks = st.lists(st.lists(values, min_size=BLOCK, max_size=BLOCK), min_size=1, max_size=4)


@given(blocks)
def test_writing_twice_changes_nothing(rows) -> None:
    once = unpack(*pack(torch.tensor(rows)))
    assert torch.equal(unpack(*pack(once)), once)


@given(blocks)
def test_values_are_on_the_grid(rows) -> None:
    codes, exponents = quantize(torch.tensor(rows))
    stored = unpack(*pack(torch.tensor(rows))).unflatten(-1, (-1, BLOCK))
    scaled = torch.ldexp(stored.abs(), -exponents[..., None])
    assert bool(torch.isin(scaled, MAGNITUDES).all()) and bool(((codes >= 0) & (codes < 16)).all())
    assert not bool((codes == 8).any()), "one code for one value: no negative zero"


@given(blocks)
def test_the_error_is_bounded_by_the_largest_of_the_block(rows) -> None:
    weight = torch.tensor(rows)
    largest = weight.abs().amax(-1, keepdim=True).clamp_min(2.0**-120)
    # The largest step of the grid is 2 at a scale of at most largest / 4; a clipped value loses less than 2 / 8.
    assert bool(((round_to_mxfp4(weight) - weight).abs() <= largest / 4 + 1e-30).all())


@given(blocks)
def test_signs_survive(rows) -> None:
    weight, stored = torch.tensor(rows), round_to_mxfp4(torch.tensor(rows))
    assert bool((stored * weight >= 0).all())


@pytest.mark.parametrize("exponent", [-100, -3, 0, 5, 90])
def test_grid_values_are_exact(exponent: int) -> None:
    grid = torch.ldexp(torch.cat((MAGNITUDES, -MAGNITUDES)), torch.tensor(exponent)).repeat(2)[None]
    assert torch.equal(round_to_mxfp4(grid), grid)


def test_the_nibbles_lie_as_gpt_oss_has_them() -> None:
    row = torch.zeros(1, BLOCK)
    row[0, 0], row[0, 1] = 6.0, -0.5
    packed, scales = pack(row)
    assert packed.dtype == scales.dtype == torch.uint8 and packed.shape == (1, 1, 16)
    assert packed[0, 0, 0] == 7 + 16 * 9 and scales[0, 0] == 127


def test_the_kernels_decode_what_we_write() -> None:
    from gptoss_kernels.mxfp4 import Mxfp4Tensor, dequantize

    weight = torch.randn(3, 8, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dequantize(Mxfp4Tensor(*pack(weight)), torch.float32), unpack(*pack(weight)))


def test_the_gradient_passes_straight_through() -> None:
    weight = torch.randn(2, 32, requires_grad=True)
    StraightThrough.apply(weight).mul(3.0).sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, torch.full_like(weight, 3.0))
