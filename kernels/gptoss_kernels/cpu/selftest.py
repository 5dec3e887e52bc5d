"""A small test of an engine against the reference, before it is trusted: a compiler or a processor may surprise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gptoss_kernels import reference
from gptoss_kernels.cpu import matmul
from gptoss_kernels.cpu.engine import Engine
from gptoss_kernels.mxfp4 import Mxfp4Tensor

FLOAT32 = 1e-5
"""Largest difference between float32 results, as a part of the largest sum of products' sizes."""

STEPS = 1
"""Steps of bfloat16 that two results may be apart: each rounds a float32 sum that differs in its last bits."""


def flaw(engine: Engine, dtype: torch.dtype) -> str | None:
    """What is wrong with the products of an engine in a dtype, None when nothing is."""
    try:
        for rows, length in ((5, 32), (37, 96), (64, 256)):  # an odd number of rows and of blocks, and many
            for tokens in (1, 3, 3 * matmul.many()):
                wrong = _experts(engine, dtype, rows, length, tokens) or _dense(engine, dtype, rows, length, tokens)
                if wrong:
                    return wrong
    except Exception as error:  # whatever it is, this path is not for this machine
        return f"{type(error).__name__}: {error}"[:300]
    return None


def _experts(engine: Engine, dtype: torch.dtype, rows: int, length: int, tokens: int) -> str | None:
    g = torch.Generator().manual_seed(rows + tokens)
    weight = Mxfp4Tensor(torch.randint(0, 256, (4, rows, length // 32, 16), generator=g, dtype=torch.uint8),
                         torch.randint(115, 126, (4, rows, length // 32), generator=g, dtype=torch.uint8))
    bias = torch.randn(4, rows, generator=g).to(dtype)
    chosen = torch.randint(0, 4, (tokens, 2), generator=g)
    x = torch.randn(tokens, length, generator=g).to(dtype)
    got = engine.expert_linear(x, chosen, weight, bias)
    wanted = reference.expert_linear(x, chosen, weight, bias)
    sizes = reference.expert_linear(x.float().abs(), chosen, _sizes(weight), bias.float().abs())
    return _compare("experts", got, wanted, sizes)


def _dense(engine: Engine, dtype: torch.dtype, rows: int, length: int, tokens: int) -> str | None:
    g = torch.Generator().manual_seed(rows + tokens)
    weight, bias = torch.randn(rows, length, generator=g).to(dtype), torch.randn(rows, generator=g).to(dtype)
    x = torch.randn(tokens, length, generator=g).to(dtype)
    got, wanted = engine.linear(x, weight, bias), F.linear(x.float(), weight.float(), bias.float()).to(dtype)
    return _compare("matrices", got, wanted, F.linear(x.float().abs(), weight.float().abs(), bias.float().abs()))


def _sizes(weight: Mxfp4Tensor) -> Mxfp4Tensor:
    """The same with every sign gone."""
    return Mxfp4Tensor(weight.blocks & 0x77, weight.scales)


def _compare(what: str, got: Tensor, wanted: Tensor, sizes: Tensor) -> str | None:
    """``sizes``: what the results would be if no term cancelled another; an error is measured against that."""
    allowed = FLOAT32 * sizes
    if wanted.dtype == torch.bfloat16:
        allowed = allowed + STEPS * 2.0**-7 * wanted.float().abs()
    worst = float(((got.float() - wanted.float()).abs() / allowed).nan_to_num(nan=torch.inf).max())
    dtype = str(wanted.dtype).removeprefix("torch.")
    return None if worst <= 1 else f"{what} in {dtype} are off by {worst:.3g} times what is allowed"
