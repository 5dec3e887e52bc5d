"""The experts: for one token, a few, many; forward, fused, and back to their input."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from gptoss_kernels import reference
from gptoss_kernels.mxfp4 import Mxfp4Tensor
from tests.kernels.specification.common import Draw, agree
from tests.tolerances import EXPERT_GRADIENT_F32

ALPHA, LIMIT = 1.702, 7.0

# (tokens, slots, experts, expert width, model width). The Triton kernels change path after 4 tokens, take 16 or 8 rows
# and 32 blocks of 32 values at a time for few tokens, 64 columns, 64 values and 16 to 64 pairs for many.
FEW = [(1, 4, 5, 32, 32), (4, 1, 3, 32, 32), (1, 2, 2, 32, 33 * 32)]
MANY = [(5, 4, 5, 32, 64), (9, 2, 3, 32, 96), (16, 1, 1, 32, 128), (17, 1, 1, 64, 32), (33, 2, 9, 32, 32)]


class Layer:
    """Random weights of a layer of experts, and tokens that come to it."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, tokens: int, slots: int, experts: int, inner: int, width: int,
    ) -> None:
        draw = Draw(device)
        self.x = draw.normal(tokens, width, dtype=dtype)
        self.chosen = draw.choices(tokens, slots, experts)
        self.weights = draw.normal(tokens, slots, dtype=dtype).softmax(-1)
        self.gate_up, self.down = draw.packed(experts, 2 * inner, width), draw.packed(experts, width, inner)
        self.gate_up_bias = draw.normal(experts, 2 * inner, dtype=dtype)
        self.down_bias = draw.normal(experts, width, dtype=dtype)

    def mixture(self, kernels: ModuleType, x: Tensor | None = None) -> Tensor:
        return kernels.expert_mixture(self.x if x is None else x, self.chosen, self.weights, self.gate_up,
                                      self.gate_up_bias, self.down, self.down_bias, ALPHA, LIMIT)

    def in_pieces(self, kernels: ModuleType) -> Tensor:
        gate, up = kernels.split_gate_up(kernels.expert_linear(self.x, self.chosen, self.gate_up, self.gate_up_bias))
        act = kernels.swiglu(gate, up, ALPHA, LIMIT)
        return kernels.combine_experts(kernels.expert_linear(act, self.chosen, self.down, self.down_bias), self.weights)


@pytest.mark.parametrize(("dtype", "sizes"), [
    *((torch.float32, sizes) for sizes in FEW + MANY), *((torch.bfloat16, sizes) for sizes in (FEW[1], MANY[1])),
], ids=str)
def test_layer(kernels: ModuleType, device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    layer = Layer(device, dtype, *sizes)
    fused = layer.mixture(kernels)
    agree(fused, layer.mixture(reference))
    assert torch.equal(fused, layer.in_pieces(kernels)), "the same bits, whether or not a hook looks between"


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("height", [1, 7, 9, 15, 17, 63, 65])
def test_rows_at_the_edges_of_blocks(kernels: ModuleType, device: torch.device, height: int, tokens: int) -> None:
    draw = Draw(device, seed=height)
    x, weight, bias = draw.normal(tokens, 32), draw.packed(2, height, 32), draw.normal(2, height)
    chosen = draw.choices(tokens, 1, 2)
    agree(kernels.expert_linear(x, chosen, weight, bias), reference.expert_linear(x, chosen, weight, bias))


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("blocks", [1, 2, 3, 31, 32, 33, 63, 64, 65, 90])
def test_widths_at_the_edges_of_blocks(kernels: ModuleType, device: torch.device, dtype: torch.dtype, blocks: int,
                                       tokens: int) -> None:
    draw = Draw(device, seed=blocks)
    wide = 32 * blocks
    x, weight, bias = draw.normal(tokens, wide, dtype=dtype), draw.packed(2, 10, wide), draw.normal(2, 10, dtype=dtype)
    chosen = draw.choices(tokens, 1, 2)
    agree(kernels.expert_linear(x, chosen, weight, bias), reference.expert_linear(x, chosen, weight, bias))


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("experts", [1, 4])
def test_groups_at_the_edges_of_tiles(kernels: ModuleType, device: torch.device, tokens: int, experts: int) -> None:
    draw = Draw(device, seed=tokens)
    x, weight, bias = draw.normal(tokens, 64), draw.packed(4, 34, 64), draw.normal(4, 34)
    chosen = draw.choices(tokens, 1, experts)  # with one expert the others serve nobody
    agree(kernels.expert_linear(x, chosen, weight, bias), reference.expert_linear(x, chosen, weight, bias))


@pytest.mark.parametrize("tokens", [1, 6])
def test_every_code_with_every_scale(kernels: ModuleType, device: torch.device, tokens: int) -> None:
    """A vector with a single one picks columns of the matrix: they must be what the format says, bit for bit."""
    blocks = torch.arange(256, dtype=torch.uint8, device=device).view(16, 1, 16).repeat(1, 8, 1)
    scales = torch.tensor([[0, 1, 2, 126, 127, 128, 200, 252]] * 16, dtype=torch.uint8, device=device)
    weight = Mxfp4Tensor(blocks[None], scales[None])
    nothing, expert = torch.zeros(1, 16, device=device), torch.zeros(tokens, 1, dtype=torch.int64, device=device)
    for column in (0, 1, 33, 66, 100, 7 + 4 * 32, 8 + 5 * 32, 9 + 6 * 32, 31 + 7 * 32):
        x = torch.zeros(tokens, 256, device=device)
        x[:, column] = 1
        got = kernels.expert_linear(x, expert, weight, nothing)
        assert torch.equal(got, reference.expert_linear(x, expert, weight, nothing))


@pytest.mark.parametrize("tokens", [1, 5])
def test_an_expert_far_behind(kernels: ModuleType, device: torch.device, tokens: int) -> None:
    """All tokens choose the last of many experts, in the last slot too; the others serve nobody."""
    draw = Draw(device)
    x, weight, bias = draw.normal(tokens, 3, 32), draw.packed(40, 6, 32), draw.normal(40, 6)
    chosen = torch.tensor([[39, 0, 39]] * tokens, device=device)
    agree(kernels.expert_linear(x, chosen, weight, bias), reference.expert_linear(x, chosen, weight, bias))


@pytest.mark.parametrize("sizes", [FEW[0], MANY[1], MANY[3]], ids=str)
def test_gradient_of_the_input(kernels: ModuleType, device: torch.device, sizes: tuple[int, ...]) -> None:
    layer = Layer(device, torch.float32, *sizes)
    x = layer.x.clone().requires_grad_()
    pull = Draw(device, seed=5).normal(*x.shape)
    got, = torch.autograd.grad(layer.mixture(kernels, x), x, pull)
    want, = torch.autograd.grad(layer.mixture(reference, x), x, pull)
    torch.testing.assert_close(got, want, rtol=EXPERT_GRADIENT_F32, atol=EXPERT_GRADIENT_F32 * float(want.abs().max()))


def test_gradient_of_the_gradient(kernels: ModuleType, device: torch.device) -> None:
    draw = Draw(device)
    weight, bias, chosen = draw.packed(3, 10, 32), draw.normal(3, 10), draw.choices(4, 2, 3)
    x = draw.normal(4, 32).requires_grad_()

    def twice(room: ModuleType) -> Tensor:
        y = room.expert_linear(x, chosen, weight, bias)
        once, = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(once.square().sum(), x)[0]

    agree(twice(kernels), twice(reference))


def test_experts_that_are_not_packed(kernels: ModuleType, device: torch.device, dtype: torch.dtype) -> None:
    draw = Draw(device)
    x, weight, bias = (draw.normal(*shape, dtype=dtype) for shape in ((3, 32), (4, 6, 32), (4, 6)))
    chosen = draw.choices(3, 2, 4)
    agree(kernels.expert_linear(x, chosen, weight, bias), reference.expert_linear(x, chosen, weight, bias))
