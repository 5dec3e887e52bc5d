"""The CPU kernels on every path: against sums in float64, against the reference, and at the edges of memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptoss_kernels import cpu, reference
from gptoss_kernels.cpu import choice, compiling, matmul, paths, products, team
from gptoss_kernels.cpu.engine import Engine
from gptoss_kernels.mxfp4 import Mxfp4Tensor, dequantize
from tests.kernels.cpu_cases import check_experts, drawn, exact, packed, some
from tests.tolerances import BF16_STEP, CPU_KERNEL_F32

pytest.importorskip("numba")

MANY = matmul.many()
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
SHAPES = [(1, 32), (1, 64), (7, 32), (33, 96), (5, 160), (64, 256), (500, 64), (3, 2880)]


@pytest.fixture(scope="module", params=[*paths.PATHS, "avx512_bf16 emulated", "torch"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every path in turn, taken by all products; the best one is also run with its two instructions spelled out."""
    name, _, emulated = request.param.partition(" ")
    if emulated:
        yield from _emulated(name)
        return
    reason = paths.why_not(name)
    if reason:
        pytest.skip(f"{name}: {reason}")
    with choice.forced(name):
        yield name


def _emulated(name: str) -> Iterator[str]:
    """Compiled anew and not kept: what the disk holds is for the real instructions."""
    from gptoss_kernels.cpu.compiled import rows
    from tests.kernels.avx512 import Emulated

    def address(kind: str, way: int) -> int:
        if (kind, way) not in made:
            made[kind, way] = compiling.maker(kind)(way, False)
        return made[kind, way].address

    made: dict[tuple[str, int], object] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "Emit", Emulated)
        patch.setattr(products, "task", address)
        patch.setattr(choice, "_chosen", dict.fromkeys((torch.bfloat16, torch.float32), Engine(paths.PATHS[name])))
        yield name


@DTYPES
@pytest.mark.parametrize(("rows", "length"), SHAPES)
@pytest.mark.parametrize("per_slot", [False, True], ids=["shared rows", "rows of each slot"])
def test_experts(path: str, rows: int, length: int, dtype: torch.dtype, per_slot: bool) -> None:
    weight, bias = packed(6, rows, length), drawn(6, rows, dtype=dtype, seed=3)
    for tokens, k in ((1, 1), (1, 4), (2, 4), (MANY + 1, 3)):
        x = drawn(tokens, *((k,) if per_slot else ()), length, dtype=dtype)
        check_experts(x, some(tokens, k, 6), weight, bias)


@DTYPES
@pytest.mark.parametrize("count", [MANY - 1, MANY, MANY + 1, 67])
def test_experts_that_few_and_that_many_chose(path: str, count: int, dtype: torch.dtype) -> None:
    """Expert 2 serves ``count`` tokens, around the number from which on torch multiplies; expert 0 one, 1 none."""
    weight, bias = packed(4, 485, 96), drawn(4, 485, dtype=dtype, seed=3)  # more rows than the scratch holds
    chosen = torch.full((count, 1), 2)
    chosen[count // 2] = 0
    chosen = torch.cat((chosen, torch.full((1, 1), 2)))
    check_experts(drawn(count + 1, 96, dtype=dtype), chosen, weight, bias)


def test_within_one_step_of_the_reference(path: str) -> None:
    """Without a bias that could cancel the product, a result is the reference's or its neighbour."""
    for tokens in (1, 20):
        weight, x, chosen = packed(2, 100, 2880), drawn(tokens, 2880, dtype=torch.bfloat16), some(tokens, 1, 2)
        none = torch.zeros(2, 100, dtype=torch.bfloat16)
        got, wanted = (kernels.expert_linear(x, chosen, weight, none) for kernels in (cpu, reference))
        steps = (ordinal(got) - ordinal(wanted)).abs()
        near = exact(x, chosen, weight)[1] * 2.0**-22 > wanted.abs() * 2.0**-9  # all but cancelled
        assert (steps[~near] <= 1).all() and near.float().mean() < 0.02
        assert (steps == 0).float().mean() > 0.9


def ordinal(x: Tensor) -> Tensor:
    """Numbers of bfloat16 values in order: neighbours differ by one."""
    bits = x.contiguous().view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 9), groups=st.integers(1, 5), tokens=st.integers(1, 12),
       lowest=st.integers(0, 252), spread=st.integers(1, 40), size=st.integers(-30, 20), outlier=st.booleans(),
       dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_codes_scales_and_activations(
    path: str, seed: int, rows: int, groups: int, tokens: int, lowest: int, spread: int, size: int, outlier: bool,
    dtype: torch.dtype,
) -> None:
    """Scales over the whole range in which no code overflows; activations of any size, zeros and outliers."""
    weight = packed(3, rows, 32 * groups, seed, lowest, min(lowest + spread, 253))
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 32 * groups, generator=g) * 2.0**size * torch.exp2(
        torch.randint(-12, 1, (tokens, 32 * groups), generator=g).float())
    x[torch.rand(x.shape, generator=g) < 0.2] = 0
    if outlier:
        x[:, 0] = 1000 * 2.0**size
    if exact(x, torch.zeros(tokens, 1, dtype=torch.int64), weight)[1].max() > 1e37:
        x = x * 2.0**-100
    check_experts(x.to(dtype), some(tokens, 2, 3, seed), weight, torch.zeros(3, rows, dtype=dtype))


@DTYPES
@pytest.mark.parametrize("tokens", [1, 2 * MANY])
def test_every_scale_byte_with_every_code(path: str, dtype: torch.dtype, tokens: int) -> None:
    """One code at a time: row s has scale byte s; from 253 on a code may be infinite or what it should be."""
    for code in range(16):
        blocks = torch.full((1, 256, 1, 16), code * 17, dtype=torch.uint8)
        weight = Mxfp4Tensor(blocks, torch.arange(256, dtype=torch.uint8).view(1, 256, 1))
        x = torch.zeros(tokens, 32, dtype=dtype)
        x[:, 5] = 1
        bias = torch.zeros(1, 256, dtype=dtype)
        got = cpu.expert_linear(x, torch.zeros(tokens, 1, dtype=torch.int64), weight, bias)[:, 0]
        wanted = dequantize(weight, dtype)[0, :, 5]
        assert torch.equal(got[:, 2:253], wanted[2:253].expand(tokens, -1))
        assert torch.allclose(got[:, :2].float(), wanted[:2].float(), rtol=0, atol=2.0**-126)  # subnormal
        value = float(dequantize(weight[:, 127:128], torch.float32)[0, 0, 5])
        top = got[:, 253:].double()
        right = value * torch.exp2(torch.arange(126.0, 129.0, dtype=torch.float64))
        assert (~top.isfinite() | (top == right)).all()


@DTYPES
def test_an_infinity_or_nan_is_not_lost(path: str, dtype: torch.dtype) -> None:
    weight, bias = packed(1, 9, 96), torch.zeros(1, 9, dtype=dtype)
    for bad in (float("inf"), float("-inf"), float("nan")):
        x = drawn(1, 96, dtype=dtype)
        x[0, 40] = bad
        assert not cpu.expert_linear(x, torch.zeros(1, 1, dtype=torch.int64), weight, bias).isfinite().any()


@pytest.mark.parametrize(("rows", "length"), [*SHAPES, (201, 4096), (40, 48)])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_matrices(path: str, rows: int, length: int, bias: bool) -> None:
    """48 columns are no whole number of blocks of 32: torch's turn."""
    weight = drawn(rows, length, dtype=torch.bfloat16, seed=5)
    added = drawn(rows, dtype=torch.bfloat16, seed=6) if bias else None
    for shape in ((1, length), (1, 1, length), (2, 3, length), (MANY, length), (1, 70, length)):
        x = drawn(*shape, dtype=torch.bfloat16)
        got = cpu.linear(x, weight, added)
        wanted = x.double() @ weight.double().T + (0 if added is None else added.double())
        size = x.double().abs() @ weight.double().abs().T
        assert got.dtype == torch.bfloat16 and got.shape == (*shape[:-1], rows)
        allowed = BF16_STEP * wanted.abs() + CPU_KERNEL_F32 * size
        assert ((got.double() - wanted).abs() <= allowed).all()


def test_float32_matrices_are_torchs(path: str) -> None:
    x, weight, bias = drawn(2, 64), drawn(40, 64, seed=5), drawn(40, seed=6)
    assert torch.equal(cpu.linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_decoding_is_the_references_bit_for_bit(path: str, dtype: torch.dtype) -> None:
    if path == "torch":
        pytest.skip("torch's path decodes with the reference")
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 1, 16).repeat(1, 256, 1)
    scales = torch.arange(256, dtype=torch.uint8).repeat(16, 1)
    weight = Mxfp4Tensor(blocks, scales)
    got = torch.empty(16, 256 * 32, dtype=dtype)
    products.unpack(weight, got, paths.PATHS[path].scratch[dtype])
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    assert torch.equal(got.view(bits), dequantize(weight, dtype).view(bits))


@DTYPES
def test_nothing_is_written_outside(path: str, dtype: torch.dtype) -> None:
    """Outputs lie between guards, at odd places."""
    if path == "torch":
        pytest.skip("torch's path writes with torch")
    here = paths.PATHS[path]
    for rows, length in ((1, 32), (7, 96), (130, 64)):
        weight, bias, x = packed(2, rows, length), drawn(2, rows, dtype=dtype), drawn(3, length, dtype=dtype)
        for before in (1, 3):
            guarded = torch.full((before + 4 * rows + 5,), 77.0, dtype=dtype)
            out = guarded[before : before + 4 * rows].view(4, rows)
            products.expert_rows(x, torch.tensor([1, 0, 1, 0, 2]), torch.tensor([[0, 1], [2, 2]]), weight, bias, out,
                                 here.experts[dtype])
            assert (guarded[:before] == 77).all() and (guarded[before + 4 * rows :] == 77).all()
            assert (out[[0, 3]] == 77).all() and not (out[[1, 2]] == 77).all()
            guarded = torch.full((before + rows * length + 5,), 77.0, dtype=dtype)
            inside = guarded[before : before + rows * length].view(rows, length)
            products.unpack(weight[0], inside, here.scratch[dtype])
            assert (guarded[:before] == 77).all() and (guarded[before + rows * length :] == 77).all()
            assert torch.equal(inside, dequantize(weight[0], dtype))


@DTYPES
def test_threads_change_no_bit(path: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias, chosen = packed(4, 1000, 96), drawn(4, 1000, dtype=dtype), some(3, 2, 4)
    x, matrix = drawn(3, 96, dtype=dtype), drawn(3000, 96, dtype=dtype)
    before, found = torch.get_num_threads(), []
    monkeypatch.setattr(products, "ITEM_BYTES", 4096)  # many items, whatever the size
    try:
        for threads, openmp in ((1, True), (2, True), (3, True), (2, False)):
            torch.set_num_threads(threads)
            if not openmp:
                monkeypatch.setattr(team, "parallel", lambda: None)
            found.append((cpu.expert_linear(x, chosen, weight, bias), cpu.linear(x[:1], matrix)))
    finally:
        torch.set_num_threads(before)
    for experts, dense in found[1:]:
        if path == "torch":  # the sums are torch's own, which may follow the number of threads
            torch.testing.assert_close(experts, found[0][0])
            continue
        assert torch.equal(experts, found[0][0])
        if dtype == torch.bfloat16:
            assert torch.equal(dense, found[0][1])


@DTYPES
def test_scattered_inputs(path: str, dtype: torch.dtype) -> None:
    """Views with gaps, turned or expanded, give what their copies give."""
    weight, bias = packed(8, 20, 64), drawn(8, 20, dtype=dtype)
    wide = drawn(64, 6, dtype=dtype)
    x, chosen = wide.T, some(6, 4, 8)[:, ::2]
    wanted = cpu.expert_linear(x.contiguous(), chosen.contiguous(), weight, bias)
    assert torch.equal(cpu.expert_linear(x, chosen, weight, bias), wanted)
    half = Mxfp4Tensor(weight.blocks[:, ::2], weight.scales[:, ::2])
    got = cpu.expert_linear(x, chosen, half, bias[:, ::2])
    torch.testing.assert_close(got, wanted[..., ::2], rtol=BF16_STEP if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    ones = drawn(1, 20, dtype=dtype).expand(8, -1)
    assert torch.equal(cpu.expert_linear(x, chosen, weight, ones), cpu.expert_linear(x, chosen, weight, ones.clone()))
    matrix = drawn(64, 20, dtype=dtype).T
    torch.testing.assert_close(cpu.linear(x, matrix), cpu.linear(x, matrix.contiguous()), rtol=BF16_STEP, atol=1e-5)


def test_what_does_not_fit_is_refused(path: str) -> None:
    weight, bias, x = packed(4, 8, 64), drawn(4, 8), drawn(2, 64)
    for wrong in (torch.tensor([[0], [4]]), torch.tensor([[0], [-1]])):
        with pytest.raises((IndexError, RuntimeError)):
            cpu.expert_linear(x, wrong, weight, bias)
    with pytest.raises(RuntimeError):
        cpu.expert_linear(drawn(2, 32), torch.zeros(2, 1, dtype=torch.int64), weight, bias)
    with pytest.raises(RuntimeError):
        cpu.linear(drawn(2, 32, dtype=torch.bfloat16), drawn(8, 64, dtype=torch.bfloat16))


def test_no_rows(path: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert cpu.linear(torch.empty(0, 64, dtype=dtype), drawn(8, 64, dtype=dtype)).shape == (0, 8)


@DTYPES
def test_gradients_are_the_references(path: str, dtype: torch.dtype) -> None:
    weight, bias, chosen = packed(4, 8, 64), drawn(4, 8, dtype=dtype), some(5, 2, 4)
    found = []
    for kernels in (cpu, reference):
        x = drawn(5, 64, dtype=dtype).requires_grad_()
        found.append(torch.autograd.grad(kernels.expert_linear(x, chosen, weight, bias).sum(), x)[0])
    torch.testing.assert_close(found[0], found[1], rtol=2 * BF16_STEP if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    x, matrix = drawn(5, 64, dtype=dtype).requires_grad_(), drawn(8, 64, dtype=dtype)
    torch.autograd.grad(cpu.linear(x, matrix).sum(), x)


def test_dense_experts_are_the_references(path: str) -> None:
    x, chosen, bias = drawn(5, 64), some(5, 2, 4), drawn(4, 8)
    dense = drawn(4, 8, 64)
    assert torch.equal(cpu.expert_linear(x, chosen, dense, bias), reference.expert_linear(x, chosen, dense, bias))


@DTYPES
def test_attention_is_the_references(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (drawn(2, length, heads, 16, dtype=dtype, seed=heads) for length, heads in ((5, 8), (9, 2), (9, 2)))
    visible = torch.rand(2, 5, 9, generator=torch.Generator().manual_seed(0)) < 0.7
    for fast in (True, False):
        monkeypatch.setattr(matmul, "native", lambda fast=fast: fast)
        scores = [kernels.attention_scores(q, k, visible) for kernels in (cpu, reference)]
        pattern = reference.softmax_with_sink(scores[1], drawn(8, dtype=dtype))
        values = [kernels.attention_values(pattern, v) for kernels in (cpu, reference)]
        for got, wanted in (scores, values):
            torch.testing.assert_close(got, wanted, rtol=BF16_STEP if dtype == torch.bfloat16 else 1e-6, atol=1e-5)


@pytest.mark.parametrize("native", [True, False], ids=["with", "without"])
def test_many_rows_with_and_without_bfloat16_instructions(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the processor has them, a scratch is bfloat16; both ways must be right on any machine."""
    monkeypatch.setattr(matmul, "native", lambda: native)
    weight, bias = packed(2, 40, 96), drawn(2, 40, dtype=torch.bfloat16)
    check_experts(drawn(30, 96, dtype=torch.bfloat16), some(30, 1, 2), weight, bias)
