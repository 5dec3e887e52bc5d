"""Random inputs of the expert kernels, and sums in float64 to hold their outputs to."""

from __future__ import annotations

import torch
from torch import Tensor

from gptoss_kernels import cpu
from gptoss_kernels.mxfp4 import Mxfp4Tensor
from tests.factories import unpack
from tests.tolerances import BF16_STEP, CPU_KERNEL_F32, ROUNDING_BF16


def packed(experts: int, rows: int, length: int, seed: int = 0, low: int = 118, high: int = 126) -> Mxfp4Tensor:
    g = torch.Generator().manual_seed(seed)
    return Mxfp4Tensor(torch.randint(0, 256, (experts, rows, length // 32, 16), generator=g, dtype=torch.uint8),
                       torch.randint(low, high, (experts, rows, length // 32), generator=g, dtype=torch.uint8))


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some(tokens: int, k: int, experts: int, seed: int = 2) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(experts, generator=g)[:k] for _ in range(tokens)])


def exact(x: Tensor, chosen: Tensor, weight: Mxfp4Tensor) -> tuple[Tensor, Tensor]:
    """In float64, from another decoder: the products, and their size if each block's activations were its largest."""
    dense = unpack(weight.blocks, weight.scales).double()
    rows = (x[:, None].expand(-1, chosen.shape[1], -1) if x.dim() == 2 else x).double()
    largest = rows.abs().unflatten(-1, (-1, 32)).amax(-1, keepdim=True).expand(*rows.shape[:-1], -1, 32).flatten(-2)
    return (torch.einsum("nki,nkoi->nko", rows, dense[chosen]),
            torch.einsum("nki,nkoi->nko", largest, dense[chosen].abs()))


def check_experts(x: Tensor, chosen: Tensor, weight: Mxfp4Tensor, bias: Tensor) -> Tensor:
    """In float32 within rounding of the exact sum; in bfloat16 each of the two roundings may add half a step."""
    got = cpu.expert_linear(x, chosen, weight, bias)
    product, size = exact(x, chosen, weight)
    wanted = product + bias[chosen].double()
    allowed = CPU_KERNEL_F32 * size + 2.0**-120
    if x.dtype == torch.bfloat16:
        allowed = allowed * (1 + BF16_STEP) + ROUNDING_BF16 * (product.abs() * (1 + BF16_STEP) + wanted.abs())
    else:
        allowed = allowed + 2.0**-23 * wanted.abs()
    assert got.dtype == x.dtype and got.shape == (*chosen.shape, weight.shape[1])
    off = (got.double() - wanted).abs()
    assert (off <= allowed).all(), f"{float((off / allowed).max())} times what is allowed"
    return got
