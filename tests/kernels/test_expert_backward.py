"""The backward pass through packed experts: right by finite differences and by dense autograd, small by count."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.multiprocessing.reductions import StorageWeakRef

from gptoss_kernels import dense, reference
from gptoss_kernels import experts as room
from gptoss_kernels.mxfp4 import Mxfp4Tensor
from tests.factories import unpack
from tests.tolerances import EXPERT_GRADIENT_F32, ROUNDING_BF16

F64 = torch.float64


def packed(experts: int, out: int, wide: int, seed: int = 0) -> Mxfp4Tensor:
    """Random codes with scales around 1/16, so that products have unit size."""
    g = torch.Generator().manual_seed(seed)
    return Mxfp4Tensor(torch.randint(0, 256, (experts, out, wide // 32, 16), generator=g, dtype=torch.uint8),
                       torch.randint(121, 125, (experts, out, wide // 32), generator=g, dtype=torch.uint8))


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_einsum(x: Tensor, chosen: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Every token's own copies of its experts, in one contraction: nothing is grouped, nothing packed."""
    rows = x[:, None].expand(-1, chosen.shape[1], -1) if x.dim() == 2 else x
    return torch.einsum("nki,nkoi->nko", rows, weight[chosen]) + bias[chosen]


class Ledger:
    """Every decoded tensor, and how many bytes of them are alive whenever another is about to be made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kept: list[tuple[StorageWeakRef, int]] = []
        self.peak, self.matrices, decode = 0, 0, room.dequantize

        def counted(weights: Mxfp4Tensor, dtype: torch.dtype) -> Tensor:
            decoded = decode(weights, dtype)
            self.kept.append((StorageWeakRef(decoded.untyped_storage()), decoded.nbytes))
            self.matrices += len(decoded)
            self.peak = max(self.peak, self.alive())
            return decoded

        monkeypatch.setattr(room, "dequantize", counted)

    def alive(self) -> int:
        return sum(size for reference, size in self.kept if not reference.expired())


@pytest.mark.parametrize("per_slot", [False, True], ids=["shared rows", "rows of each slot"])
@pytest.mark.parametrize("form", ["packed", "dense"])
def test_gradcheck_in_float64(form: str, per_slot: bool) -> None:
    weight = packed(5, 3, 32)
    held = weight if form == "packed" else unpack(weight.blocks, weight.scales).to(F64)
    chosen = torch.tensor([[0, 3], [3, 1], [3, 0], [1, 4]])  # expert 2 serves nobody
    x = drawn(4, *((2,) if per_slot else ()), 32, dtype=F64).requires_grad_()
    bias = drawn(5, 3, dtype=F64, seed=2).requires_grad_()

    def linear(x: Tensor, bias: Tensor) -> Tensor:
        return reference.expert_linear(x, chosen, held, bias)

    assert gradcheck(linear, (x, bias))
    assert gradgradcheck(linear, (x, bias))


def test_gradcheck_of_the_pieces_around_it() -> None:
    """The rest of a layer is plain torch; it too must be differentiable where the backward pass goes through it."""
    def leaf(*shape: int, seed: int) -> Tensor:
        return drawn(*shape, dtype=F64, seed=seed).requires_grad_()

    visible = torch.ones(2, 3, 3, dtype=torch.bool).tril()
    chosen = torch.tensor([[0, 2], [3, 1]])
    cos, sin = reference.rope_tables(torch.arange(3)[None], torch.tensor([1.0, 0.1]), 1.3, F64)
    assert gradcheck(lambda q, k: reference.attention_scores(q, k, visible).masked_fill(~visible[:, None], 0.0),
                     (leaf(2, 3, 4, 4, seed=1), leaf(2, 3, 2, 4, seed=2)))
    assert gradcheck(reference.softmax_with_sink, (leaf(2, 4, 3, 3, seed=3), leaf(4, seed=4)))
    assert gradcheck(reference.attention_values, (leaf(2, 4, 3, 4, seed=5), leaf(2, 3, 2, 4, seed=6)))
    assert gradcheck(lambda x: reference.apply_rope(x, cos, sin), (leaf(1, 3, 2, 4, seed=7),))
    assert gradcheck(lambda x: reference.expert_weights(x, chosen), (leaf(2, 4, seed=8),))
    assert gradcheck(lambda gate, up: reference.swiglu(gate, up, 1.702, 0.5), (leaf(5, 6, seed=9), leaf(5, 6, seed=10)))
    assert gradcheck(reference.combine_experts, (leaf(2, 3, 5, seed=11), leaf(2, 3, seed=12)))


def test_a_masked_key_gets_no_gradient_and_makes_no_nan() -> None:
    q, k = (drawn(1, 4, 2, 8, seed=s).requires_grad_() for s in (1, 2))
    nothing = torch.zeros(1, 4, 4, dtype=torch.bool)
    nothing[0, 1:, 1] = True  # query 0 sees no key at all, keys 0, 2 and 3 are seen by nobody
    pattern = reference.softmax_with_sink(reference.attention_scores(q, k, nothing), torch.zeros(2))
    gq, gk = torch.autograd.grad(pattern[..., 1].sum(), (q, k))
    assert gq.isfinite().all() and gk.isfinite().all()
    assert (gq[0, 0] == 0).all() and (gk[0, [0, 2, 3]] == 0).all() and (gk[0, 1] != 0).any()


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 7), st.integers(1, 6), st.integers(1, 3), st.booleans())
def test_gradients_equal_dense_autograd(seed: int, tokens: int, experts: int, groups: int, per_slot: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    k = int(torch.randint(1, experts + 1, (), generator=g))
    chosen = torch.stack([torch.randperm(experts, generator=g)[:k] for _ in range(tokens)])
    weight = packed(experts, 5, 32 * groups, seed)
    decoded = unpack(weight.blocks, weight.scales).float()
    x = drawn(tokens, *((k,) if per_slot else ()), 32 * groups, seed=seed).requires_grad_()
    bias = drawn(experts, 5, seed=seed + 1).requires_grad_()
    pull = drawn(tokens, k, 5, seed=seed + 2)
    ours = torch.autograd.grad(reference.expert_linear(x, chosen, weight, bias), (x, bias), pull)
    theirs = torch.autograd.grad(by_einsum(x, chosen, decoded, bias), (x, bias), pull)
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=EXPERT_GRADIENT_F32, atol=EXPERT_GRADIENT_F32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_asking_for_gradients_changes_no_bit_of_the_result(dtype: torch.dtype) -> None:
    weight, bias = packed(6, 40, 64), drawn(6, 40, dtype=dtype)
    chosen = torch.randint(6, (30, 3), generator=torch.Generator().manual_seed(3))
    x = drawn(30, 64, dtype=dtype)
    with torch.no_grad():
        bare = reference.expert_linear(x, chosen, weight, bias)
    live = reference.expert_linear(x.requires_grad_(), chosen, weight, bias)
    assert live.requires_grad and torch.equal(bare, live)


def test_bfloat16_gradients_round_a_few_times_only() -> None:
    """A slot's gradient rounds once and so does the sum over slots, each by at most 2 ** -8 of what it rounds."""
    weight = packed(6, 64, 64)
    chosen = torch.randint(6, (20, 3), generator=torch.Generator().manual_seed(3))
    x, pull = drawn(20, 64, dtype=torch.bfloat16).requires_grad_(), drawn(20, 3, 64, dtype=torch.bfloat16, seed=5)
    got, = torch.autograd.grad(reference.expert_linear(x, chosen, weight, torch.zeros(6, 64).bfloat16()), x, pull)
    decoded = unpack(weight.blocks, weight.scales).double()
    slots = torch.einsum("nko,nkoi->nki", pull.double(), decoded[chosen])
    assert got.dtype == torch.bfloat16
    assert ((got.double() - slots.sum(1)).abs() <= 2 * ROUNDING_BF16 * slots.abs().sum(1) + EXPERT_GRADIENT_F32).all()


@pytest.mark.parametrize("scratch", [1, 2 * 40 * 64, 5 * 40 * 64 + 7], ids=["one at a time", "two", "five"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64], ids=str)
def test_decoded_values_never_pile_up(scratch: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through two layers of experts and back, with the whole graph alive: never more than the scratch is decoded."""
    monkeypatch.setattr(room, "SCRATCH_VALUES", scratch)
    ledger = Ledger(monkeypatch)
    up, down = packed(16, 40, 64), packed(16, 64, 32, seed=9)
    chosen = torch.randint(12, (50, 4), generator=torch.Generator().manual_seed(3))  # experts 12 to 15 serve nobody
    x = drawn(50, 64, dtype=dtype).requires_grad_()
    inner = reference.expert_linear(x, chosen, up, drawn(16, 40, dtype=dtype))[..., :32]
    outer = reference.expert_linear(inner, chosen, down, drawn(16, 64, dtype=dtype))
    assert ledger.alive() == 0, "decoded weights must not wait in the graph"
    torch.autograd.grad(outer.square().sum(), x)
    bytes_each = 4 if dtype == F64 else dtype.itemsize
    assert 0 < ledger.peak <= max(scratch, 40 * 64) * bytes_each
    assert ledger.alive() == 0
    assert ledger.matrices == 4 * chosen.unique().numel(), "each expert that served, twice forward and twice backward"


@pytest.mark.parametrize("bias", [None, drawn(48, dtype=F64, seed=7)], ids=["no bias", "bias"])
def test_gradcheck_of_the_dense_product(bias: Tensor | None) -> None:
    x, weight = drawn(2, 3, 32, dtype=F64).requires_grad_(), drawn(48, 32, dtype=F64, seed=2)
    assert gradcheck(lambda x: dense.linear(x, weight, bias), (x,))
    assert gradgradcheck(lambda x: dense.linear(x, weight, bias), (x,))


def test_gradcheck_of_the_product_of_activations() -> None:
    factors = (drawn(2, 3, 4, dtype=F64).requires_grad_(), drawn(2, 4, 5, dtype=F64, seed=2).requires_grad_())
    assert gradcheck(dense._Matmul.apply, factors)
    assert gradgradcheck(dense._Matmul.apply, factors)


@pytest.mark.parametrize("part", [1, 7 * 32, 1 << 20], ids=["a row at a time", "seven rows", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_dense_product_and_its_gradient(dtype: torch.dtype, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The product is F.linear's bit for bit, the gradient is the true one rounded once."""
    monkeypatch.setattr(dense, "PART_VALUES", part)
    x, weight, bias = drawn(5, 6, 32, dtype=dtype), drawn(48, 32, dtype=dtype, seed=2), drawn(48, dtype=dtype, seed=3)
    pull = drawn(5, 6, 48, dtype=dtype, seed=4)
    out = dense.linear(x.requires_grad_(), weight, bias)
    assert torch.equal(out, F.linear(x, weight, bias))
    got, = torch.autograd.grad(out, x, pull)
    want, roundings = pull.double() @ weight.double(), pull.double().abs() @ weight.double().abs()
    assert got.dtype == dtype
    once = ROUNDING_BF16 if dtype == torch.bfloat16 else 0
    assert ((got.double() - want).abs() <= once * want.abs() + EXPERT_GRADIENT_F32 * roundings).all()


def test_bfloat16_products_of_two_activations_have_gradients_rounded_once() -> None:
    a, b = (drawn(*shape, dtype=torch.bfloat16).requires_grad_() for shape in ((2, 5, 9), (2, 9, 4)))
    pull = drawn(2, 5, 4, dtype=torch.bfloat16, seed=3)
    out = dense.matmul(a, b)
    assert torch.equal(out, torch.matmul(a, b)) and out.dtype == torch.bfloat16
    got = torch.autograd.grad(out, (a, b), pull)
    for one, want in zip(got, (pull.double() @ b.double().mT, a.double().mT @ pull.double()), strict=True):
        assert ((one.double() - want).abs() <= ROUNDING_BF16 * want.abs() + EXPERT_GRADIENT_F32).all()
    only, = torch.autograd.grad(dense.matmul(a.detach(), b), b, pull)
    assert torch.equal(only, got[1])


def test_a_weight_that_learns_gets_its_gradient() -> None:
    x, weight, bias = (drawn(*shape).requires_grad_() for shape in ((4, 32), (8, 32), (8,)))
    ours = torch.autograd.grad(dense.linear(x, weight, bias).sin().sum(), (x, weight, bias))
    theirs = torch.autograd.grad(F.linear(x, weight, bias).sin().sum(), (x, weight, bias))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_the_default_scratch_is_small() -> None:
    """A decoded expert of the published models is larger than the scratch; a layer of them is 32 or 128 times that."""
    gate_up = 5760 * 2880
    assert room.SCRATCH_VALUES * 4 <= 2**22 < gate_up
    assert math.ceil(gate_up / room.SCRATCH_VALUES) == 16
