"""What happens to one token after the other: norms, rotation, router, SwiGLU, weighted sum, dense products."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from gptoss_kernels import reference
from tests.kernels.specification.common import Draw, agree

WIDTHS = pytest.mark.parametrize("width", [31, 64, 65])


@WIDTHS
def test_rms_norm(kernels: ModuleType, device: torch.device, dtype: torch.dtype, width: int) -> None:
    draw = Draw(device)
    x, delta = (draw.normal(2, 3, width, dtype=dtype, scale=5) for _ in range(2))
    scale = draw.normal(width) + 1
    agree(kernels.rms_norm(x, scale, 1e-5), reference.rms_norm(x, scale, 1e-5))
    total, normed = kernels.add_norm(x, delta, scale, 1e-5)
    assert torch.equal(total, x + delta)
    assert torch.equal(normed, kernels.rms_norm(total, scale, 1e-5)), "the same bits, fused or not"
    agree(kernels.rms_norm(x * 0, scale, 1e-5), reference.rms_norm(x * 0, scale, 1e-5))


@pytest.mark.parametrize("size", [2, 16, 64])
@pytest.mark.parametrize("heads", [1, 5, 8])
def test_rope(kernels: ModuleType, device: torch.device, dtype: torch.dtype, heads: int, size: int) -> None:
    draw = Draw(device)
    x = draw.normal(2, 3, heads, size, dtype=dtype)
    positions = torch.tensor([[0, 1, 131071], [0, 0, 7]], device=device)
    frequencies = torch.logspace(0, -4, size // 2, device=device)
    cos, sin = kernels.rope_tables(positions, frequencies, 1.3, dtype)
    agree(kernels.apply_rope(x, cos, sin), reference.apply_rope(x, cos, sin))


@pytest.mark.parametrize(("experts", "k"), [(4, 1), (31, 3), (32, 4), (33, 4), (128, 4), (5, 5)])
def test_route(kernels: ModuleType, device: torch.device, dtype: torch.dtype, experts: int, k: int) -> None:
    logits = torch.stack([torch.randperm(experts) for _ in range(5)]).to(dtype).to(device) / 4  # no two alike
    logits[1, :experts - k] = -torch.inf  # as many are left as there are slots
    chosen, weights = kernels.route(logits, k)
    assert torch.equal(chosen, reference.choose_experts(logits, k))
    assert torch.equal(chosen, kernels.choose_experts(logits, k))
    agree(weights, reference.expert_weights(logits, chosen))
    assert torch.equal(weights, kernels.expert_weights(logits, chosen)), "the same bits, chosen here or given"
    turned = chosen.flip(-1)
    agree(kernels.expert_weights(logits, turned), reference.expert_weights(logits, turned))


def test_route_with_ties(kernels: ModuleType, device: torch.device, dtype: torch.dtype) -> None:
    """Which of several equal experts is taken is open; that the best values are taken, each once, is not."""
    logits = torch.randint(0, 4, (12, 32), generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    chosen, weights = kernels.route(logits, 4)
    assert torch.equal(logits.gather(-1, chosen), torch.topk(logits, 4).values)
    assert all(len(set(row)) == 4 for row in chosen.tolist())
    agree(weights, reference.expert_weights(logits, chosen))


def test_a_nan_is_not_hidden(kernels: ModuleType, device: torch.device) -> None:
    logits = torch.zeros(2, 8, device=device)
    logits[0, 5] = torch.nan
    chosen, weights = kernels.route(logits, 2)
    assert chosen[0, 0] == 5 and weights[0].isnan().all()
    assert weights[1].isfinite().all() and int(chosen.max()) < 8
    x = torch.tensor([[1.0, torch.nan]], device=device)
    assert kernels.swiglu(x, x.flip(-1), 1.702, 7.0).isnan().all()


@pytest.mark.parametrize("width", [1, 1023, 1025])
def test_swiglu(kernels: ModuleType, device: torch.device, dtype: torch.dtype, width: int) -> None:
    interleaved = Draw(device).normal(3, 2 * width, dtype=dtype, scale=6)
    gate, up = kernels.split_gate_up(interleaved)
    assert width == 1 or ((gate > 7).any() and (up.abs() > 7).any())
    want = reference.swiglu(gate, up, 1.702, 7.0)
    agree(kernels.swiglu(gate, up, 1.702, 7.0), want)
    agree(kernels.swiglu(gate.contiguous(), up.contiguous(), 1.702, 7.0), want)
    agree(kernels.swiglu(gate, up.contiguous(), 1.702, 7.0), want)


def test_swiglu_of_rows_with_gaps(kernels: ModuleType, device: torch.device, dtype: torch.dtype) -> None:
    gate, up = Draw(device).normal(2, 3, 1, 8, 36, dtype=dtype, scale=6)[:, :, :, :4]
    agree(kernels.swiglu(gate, up, 1.702, 7.0), reference.swiglu(gate, up, 1.702, 7.0))


@pytest.mark.parametrize(("slots", "width"), [(1, 7), (4, 511), (4, 513)])
def test_combine_experts(
    kernels: ModuleType, device: torch.device, dtype: torch.dtype, slots: int, width: int,
) -> None:
    draw = Draw(device)
    outputs, weights = draw.normal(3, slots, width, dtype=dtype), draw.normal(3, slots, dtype=dtype).softmax(-1)
    agree(kernels.combine_experts(outputs, weights), reference.combine_experts(outputs, weights))


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize(("height", "width"), [(7, 64), (8, 511), (9, 512), (17, 520)])
def test_linear(
    kernels: ModuleType, device: torch.device, dtype: torch.dtype, height: int, width: int, tokens: int,
) -> None:
    draw = Draw(device)
    x, weight, bias = (draw.normal(*shape, dtype=dtype) for shape in ((1, tokens, width), (height, width), (height,)))
    agree(kernels.linear(x, weight, bias), reference.linear(x, weight, bias))
    agree(kernels.linear(x[0], weight), reference.linear(x[0], weight))


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("size", [8, 16, 36])
def test_project_qkv(kernels: ModuleType, device: torch.device, dtype: torch.dtype, size: int, tokens: int) -> None:
    draw = Draw(device)
    x = draw.normal(1, tokens, 96, dtype=dtype)
    q, k, v = ((draw.normal(heads * size, 96, dtype=dtype, scale=0.1), draw.normal(heads * size, dtype=dtype))
               for heads in (4, 2, 2))
    frequencies = torch.logspace(0, -2, size // 2, device=device)
    cos, sin = kernels.rope_tables(torch.arange(9, 9 + tokens, device=device)[None], frequencies, 1.3, dtype)
    for got, want in zip(kernels.project_qkv(x, q, k, v, cos, sin), reference.project_qkv(x, q, k, v, cos, sin)):
        agree(got, want)


@pytest.mark.parametrize(("kv_heads", "size"), [(1, 16), (8, 64), (3, 171)])  # 16, 512 and 513 values a row
def test_store_kv(
    kernels: ModuleType, device: torch.device, dtype: torch.dtype, kv_heads: int, size: int,
) -> None:
    draw = Draw(device)
    for column in (0, 2):
        keys, values = (draw.normal(2, 3, kv_heads, size, dtype=dtype) for _ in range(2))
        k, v = (draw.normal(2, 1, kv_heads, size, dtype=dtype) for _ in range(2))
        want = keys.clone(), values.clone()
        reference.store_kv(*want, k, v, torch.tensor([column], device=device))
        kernels.store_kv(keys, values, k, v, torch.tensor([column], device=device))
        assert torch.equal(keys, want[0]) and torch.equal(values, want[1])
        assert torch.equal(keys[:, column], k[:, 0]) and torch.equal(values[:, column], v[:, 0])


@pytest.mark.parametrize("size", [16, 36])
def test_project_qkv_has_the_bits_of_its_pieces(
    kernels: ModuleType, device: torch.device, dtype: torch.dtype, size: int,
) -> None:
    draw = Draw(device)
    x = draw.normal(1, 1, 96, dtype=dtype)
    q, k, v = ((draw.normal(heads * size, 96, dtype=dtype, scale=0.1), draw.normal(heads * size, dtype=dtype))
               for heads in (4, 2, 2))
    cos, sin = kernels.rope_tables(torch.tensor([[9]], device=device), torch.logspace(0, -2, size // 2, device=device),
                                   1.3, dtype)
    whole = kernels.project_qkv(x, q, k, v, cos, sin)
    for got, (weight, bias), turned in zip(whole, (q, k, v), (True, True, False)):
        y = kernels.linear(x, weight, bias).view(1, 1, -1, size)
        assert torch.equal(got, kernels.apply_rope(y, cos, sin) if turned else y)
