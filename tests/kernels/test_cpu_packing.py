"""Matrices packed to 12 bits a value: every bit comes back, and products are those of the matrix."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptoss_kernels import cpu
from gptoss_kernels.cpu import choice, packing, paths
from gptoss_kernels.cpu.packing import Packed
from tests.kernels.cpu_cases import drawn
from tests.tolerances import BF16_STEP, CPU_KERNEL_F32

pytest.importorskip("numba")

ORDER = [*range(8), *range(16, 24), *range(8, 16), *range(24, 32)]
"""Written down again: which value of 32 stands at each place."""


@pytest.fixture(autouse=True)
def avx2() -> None:
    reason = paths.why_not("avx2")
    if reason:
        pytest.skip(reason)


def spread(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers of sizes that differ from row to row, a few far outside, zeros of both signs."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * torch.exp2(torch.randint(-1, 2, (shape[0], 1), generator=g).float())
    odd = torch.rand(shape, generator=g)
    x = torch.where(odd < 0.001, x * 1e9, torch.where(odd < 0.01, x * 0, x))
    return x.to(torch.bfloat16)


def unpacked(found: Packed) -> Tensor:
    """By torch alone: records and escapes back to bits, int64 (R, K)."""
    lower = found.records[..., :32].long()
    codes = torch.cat((found.records[..., 32:] & 15, found.records[..., 32:] >> 4), dim=-1).long()
    bits = torch.empty_like(lower)
    bits[..., ORDER] = found.table[codes].long() << 8 | lower
    bits = bits.flatten(1)
    for row in range(len(bits)):
        part = slice(int(found.starts[row]), int(found.starts[row + 1]))
        for place, value in zip(found.columns[part].tolist(), found.values[part].view(torch.int16).tolist()):
            column = place // 32 * 32 + (place % 16) * 2 + place % 32 // 16
            assert bits[row, column] == 0, "an escape counts nothing in its row"
            bits[row, column] = value & 0xFFFF
    return bits


@settings(max_examples=80, deadline=None)
@given(rows=st.integers(1, 9), groups=st.integers(1, 4), seed=st.integers(0, 2**31), wild=st.booleans())
def test_every_bit_comes_back(rows: int, groups: int, seed: int, wild: bool) -> None:
    """Any bits at all, NaN and infinity among them; mostly escapes then."""
    g = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 1 << 16, (rows, 32 * groups), generator=g) if wild else \
        spread(rows, 32 * groups, seed=seed).view(torch.int16).long() & 0xFFFF
    weight = torch.where(bits < 1 << 15, bits, bits - (1 << 16)).to(torch.int16).view(torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "MOST_ESCAPES", 1.0)
        found = packing.pack(weight)
    assert found is not None and torch.equal(unpacked(found), bits)


@pytest.mark.parametrize(("rows", "length"), [(1, 32), (7, 96), (130, 64), (501, 2880), (3, 4096)])
@pytest.mark.parametrize("tokens", [1, 3])
def test_products(rows: int, length: int, tokens: int) -> None:
    weight, bias, x = spread(rows, length), drawn(rows, dtype=torch.bfloat16), drawn(tokens, length,
                                                                                    dtype=torch.bfloat16)
    found = packing.pack(weight)
    assert found is not None
    for added in (None, bias):
        got, plain = packing.rows(x, found, added), cpu.linear(x, weight, added)
        wanted = x.double() @ weight.double().T + (0 if added is None else added.double())
        size = x.double().abs() @ weight.double().abs().T
        assert ((got.double() - wanted).abs() <= BF16_STEP * wanted.abs() + CPU_KERNEL_F32 * size).all()
        without = (found.starts[1:] == found.starts[:-1])
        if choice.chosen(torch.bfloat16).path.name == "avx2":  # type: ignore[union-attr]
            assert torch.equal(got[:, without], plain[:, without]), "the same sums where nothing escapes"


def test_a_packed_matrix_is_read_until_somebody_writes_into_it() -> None:
    weight, x = spread(64, 256), drawn(1, 256, dtype=torch.bfloat16)
    plain = cpu.linear(x, weight)
    assert packing.of(weight) is None and list(packing.keep([weight])) == [packing.of(weight).nbytes]  # type: ignore[union-attr]
    copy = packing.of(weight)
    assert copy is not None and copy.nbytes < 0.8 * weight.nbytes + 4096
    copy.records.zero_()
    copy.values.zero_()
    assert not torch.equal(cpu.linear(x, weight), plain), "read from the copy"
    weight[0] *= 2
    assert packing.of(weight) is None
    changed = cpu.linear(x, weight)
    assert torch.equal(changed[:, 1:], plain[:, 1:]) and torch.equal(changed[:, 0], 2 * plain[:, 0])


def test_a_copy_goes_with_its_matrix() -> None:
    weight = spread(64, 256)
    list(packing.keep([weight]))
    gone = weakref.ref(packing.of(weight))  # type: ignore[arg-type]
    del weight
    gc.collect()
    assert gone() is None


def test_what_gains_nothing_is_not_packed() -> None:
    wild = torch.randint(-(1 << 15), 1 << 15, (64, 256)).to(torch.int16).view(torch.bfloat16)
    for weight in (wild, drawn(8, 48, dtype=torch.bfloat16), drawn(8, 64), spread(64, 8).T):
        assert packing.pack(weight) is None
        assert list(packing.keep([weight])) == [0] and packing.of(weight) is None


def test_a_processor_without_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "features", frozenset)
    with pytest.raises(RuntimeError, match="lacks avx2"):
        list(packing.keep([spread(8, 32)]))


def test_a_wrong_product_is_found_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = packing.rows
    monkeypatch.setattr(packing, "rows", lambda *args: right(*args) * 1.1)
    packing.flaw.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="off by"):
            list(packing.keep([spread(8, 32)]))
    finally:
        packing.flaw.cache_clear()
