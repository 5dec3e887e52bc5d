"""bfloat16 matrix products of many rows, on processors that multiply bfloat16 and on those that do not.

Without instructions for bfloat16 torch falls to about 4 GFLOP/s a core, a thirtieth of its float32. There a stretch of
the matrix is made float32 at a time, in a scratch that stays in the cache. Products of bfloat16 values are exact in
float32 and the sums are float32 either way, so only the order of the additions differs.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

STRETCH = 1 << 20
"""Values made float32 at a time."""


@cache
def native() -> bool:
    """Whether torch has a fast bfloat16 product here (oneDNN with avx512, AMX or Arm's bf16)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def many() -> int:
    """Rows of activations from which on torch's product beats one product a row. Measured on Zen 4 and Zen 3."""
    return 8 if native() else 16


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As ``torch.nn.functional.linear`` for bfloat16 x (M, K) and weight (R, K): one rounding, at the end."""
    if native():
        return F.linear(x, weight, bias)
    x, height = x.float(), weight.shape[0]
    out = torch.empty(len(x), height, dtype=torch.bfloat16)
    step = max(1, STRETCH // weight.shape[1])
    for start in range(0, height, step):
        part = slice(start, start + step)
        wide = None if bias is None else bias[part].float()
        out[:, part] = F.linear(x, weight[part].float(), wide)
    return out


def matmul(one: Tensor, other: Tensor) -> Tensor:
    """As ``torch.matmul``, in the operands' dtype."""
    if one.dtype != torch.bfloat16 or native():
        return torch.matmul(one, other)
    return torch.matmul(one.float(), other.float()).to(torch.bfloat16)
