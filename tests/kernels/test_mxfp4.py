"""MXFP4 decoding against a decoder written from the bit fields, and against transformers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_kernels.mxfp4 import BLOCK, CODE_VALUES, Mxfp4Tensor, dequantize

BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
DTYPES = pytest.mark.parametrize("dtype", list(BITS), ids=str)


def by_hand(code: int, scale: int) -> float:
    """The value of one code from its sign, exponent and mantissa bits, as an exact double."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return math.copysign(math.ldexp(size, scale - 127), -1.0 if sign else 1.0)


def every_byte_and_scale() -> Mxfp4Tensor:
    """scales (256, 16, 1): scale byte s in matrix s; blocks: the 256 bytes spread over 16 rows."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 1, 16).repeat(256, 1, 1, 1)
    scales = torch.arange(256, dtype=torch.uint8).view(256, 1, 1).repeat(1, 16, 1)
    return Mxfp4Tensor(blocks, scales)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equality that tells -0.0 from 0.0."""
    return torch.equal(one.contiguous().view(BITS[one.dtype]), other.contiguous().view(BITS[other.dtype]))


def test_code_table() -> None:
    assert [by_hand(code, 127) for code in range(16)] == list(CODE_VALUES)
    assert math.copysign(1, CODE_VALUES[8]) == -1


@DTYPES
def test_every_byte_with_every_scale(dtype: torch.dtype) -> None:
    got = dequantize(every_byte_and_scale(), dtype)
    wanted = torch.tensor(
        [[by_hand(code, s) for byte in range(256) for code in (byte & 15, byte >> 4)] for s in range(256)],
        dtype=torch.float64,
    ).view(256, 16, BLOCK)
    assert same_bits(got, wanted.to(dtype))
    assert torch.equal(got[:253].double(), wanted[:253])  # up to scale byte 252 nothing is lost at all
    assert got[253].isinf().any()


@DTYPES
def test_every_byte_with_every_scale_as_transformers(dtype: torch.dtype) -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    packed = every_byte_and_scale()
    theirs = mxfp4.convert_moe_packed_tensors(packed.blocks, packed.scales, dtype=dtype)
    assert same_bits(dequantize(packed, dtype), theirs.transpose(1, 2))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 4))
def test_shapes(seed: int, leading: list[int], groups: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (*leading, 3, groups, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(0, 254, (*leading, 3, groups), generator=generator, dtype=torch.uint8)
    packed = Mxfp4Tensor(blocks, scales)
    values = dequantize(packed)
    assert values.shape == packed.shape == (*leading, 3, groups * BLOCK)
    assert packed.nbytes * 32 == values.numel() * 17
    assert same_bits(dequantize(packed[0]), values[0])
    where = tuple(int(torch.randint(0, size, (), generator=generator)) for size in values.shape)
    byte = int(blocks[(*where[:-1], where[-1] // 32, where[-1] % 32 // 2)])
    code = byte >> 4 if where[-1] % 2 else byte & 15
    assert float(values[where]) == by_hand(code, int(scales[(*where[:-1], where[-1] // 32)]))


def test_more_than_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = every_byte_and_scale()
    whole = dequantize(packed)
    monkeypatch.setattr("gptoss_kernels.mxfp4._CPU_CHUNK_BYTES", 7 * 16)
    assert same_bits(dequantize(packed), whole)


def test_a_view_of_a_larger_tensor() -> None:
    packed = every_byte_and_scale()
    turned = Mxfp4Tensor(packed.blocks.transpose(0, 1), packed.scales.transpose(0, 1))
    assert same_bits(dequantize(turned), dequantize(packed).transpose(0, 1))


def test_empty_choice_of_experts() -> None:
    nothing = every_byte_and_scale()[torch.tensor([], dtype=torch.int64)]
    assert dequantize(nothing).shape == (0, 16, BLOCK)


@pytest.mark.parametrize(("blocks", "scales"), [((2, 3, 1, 15), (2, 3, 1)), ((2, 3, 1, 16), (2, 3, 2)),
                                                ((1, 16), (1,))])
def test_shapes_that_do_not_fit(blocks: tuple[int, ...], scales: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        Mxfp4Tensor(torch.zeros(blocks, dtype=torch.uint8), torch.zeros(scales, dtype=torch.uint8))


def test_wrong_dtypes() -> None:
    packed = every_byte_and_scale()
    with pytest.raises(TypeError, match="scales must be uint8"):
        Mxfp4Tensor(packed.blocks, packed.scales.to(torch.int32))
    with pytest.raises(TypeError, match=r"bfloat16 or torch\.float32"):
        dequantize(packed, torch.float16)
