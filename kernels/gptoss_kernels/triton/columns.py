"""Keys and values of one token into a cache's buffers, at a column that only the GPU knows; one launch for both."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 512


@triton.jit
def store_kernel(k, v, keys, values, column, capacity, ROW: tl.constexpr, BLOCK: tl.constexpr):
    """k, v (batch, ROW) -> keys, values (batch, capacity, ROW) at ``column`` (1,)."""
    batch = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    to = (batch * capacity + tl.load(column)) * ROW + i
    tl.store(keys + to, tl.load(k + batch * ROW + i, mask=i < ROW), mask=i < ROW)
    tl.store(values + to, tl.load(v + batch * ROW + i, mask=i < ROW), mask=i < ROW)


def store_kv(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, column: Tensor) -> None:
    """As ``reference.store_kv``; the buffers must be contiguous."""
    batch, capacity, kv_heads, size = keys.shape
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError("store_kv writes into contiguous buffers only")
    if k.numel():
        with torch.cuda.device_of(keys):
            store_kernel[(batch, triton.cdiv(kv_heads * size, _BLOCK))](
                k.contiguous(), v.contiguous(), keys, values, column, capacity, kv_heads * size, _BLOCK)
