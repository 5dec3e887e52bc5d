"""What every Triton kernel here shares: how it rounds, and when a call leaves Triton for the reference."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)
"""Computed here. Anything else (float64, for checks of gradients) is the reference's."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""True when Triton runs the kernels in Python, on tensors of the processor. Decided when triton is imported."""

_INTERPRETED = tl.constexpr(INTERPRETED)

_ROUND_PAIR = tl.constexpr("""{
    .reg .b32 pair, low, high;
    cvt.rn.bf16x2.f32 pair, $3, $2;
    shl.b32 low, pair, 16;
    and.b32 high, pair, 0xFFFF0000;
    mov.b32 $0, low;
    mov.b32 $1, high;
}""")

Function = TypeVar("Function", bound=Callable[..., Any])


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Float32 values rounded to what ``dtype`` can hold, still as float32; ties to even.

    The interpreter's own cast cuts bits off instead of rounding, so there the bits are rounded by hand.
    """
    if dtype == tl.bfloat16:
        if _INTERPRETED:
            bits = x.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            x = bits.to(tl.float32, bitcast=True)
        else:
            x = x.to(tl.bfloat16).to(tl.float32)
    return x


@triton.jit
def rounded_tile(x, dtype: tl.constexpr):
    """``rounded`` for large tiles in the middle of a kernel: two values an instruction, where one alone is slow."""
    if dtype == tl.bfloat16 and not _INTERPRETED:
        x = tl.inline_asm_elementwise(_ROUND_PAIR, "=f,=f,f,f", [x], dtype=tl.float32, is_pure=True, pack=2)
    else:
        x = rounded(x, dtype)
    return x


def falls_back_to(plain: Callable[..., Any]) -> Callable[[Function], Function]:
    """Send a call to the reference when autograd watches it or its dtype is not computed here.

    Only the experts have a backward pass of their own; the rest of a layer is small enough for plain torch. The
    launch happens on the device of the first tensor.
    """
    def decorate(launch: Function) -> Function:
        @functools.wraps(launch)
        def call(*args: Any, **named: Any) -> Any:
            first, *others = [one for one in (*args, *named.values()) if isinstance(one, Tensor)]
            if first.dtype not in DTYPES or needs_gradient(first, *others):
                return plain(*args, **named)
            with torch.cuda.device_of(first):
                return launch(*args, **named)

        return call  # type: ignore[return-value]

    return decorate


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether autograd will want to go back through a function of these tensors."""
    return torch.is_grad_enabled() and any(one.requires_grad for one in tensors)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n: the length of a block that holds n values."""
    return triton.next_power_of_2(n)


def dot_type(dtype: torch.dtype) -> Any:
    """The type of the factors of a matrix product: the interpreter multiplies bfloat16 wrongly, so float32 there."""
    return tl.bfloat16 if dtype == torch.bfloat16 and not INTERPRETED else tl.float32
