"""What a scale byte means, looked up instead of computed: exact from the subnormals to the largest byte.

The tables are made by the decoder that every kernel is held to (``gptoss_kernels.mxfp4``).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from gptoss_kernels.mxfp4 import Mxfp4Tensor, dequantize


@cache
def powers() -> Tensor:
    """float32 (256, 4), four times 2 ** (byte - 128): half of the scale, because row products double the codes.

    2 ** 128 is no float32. Four times, so that one load fills a vector.
    """
    return torch.exp2(torch.arange(256, dtype=torch.float64) - 128).float()[:, None].repeat(1, 4).contiguous()


@cache
def words() -> Tensor:
    """int16 (256, 16): bits in bfloat16 of each code at each scale byte."""
    codes = torch.arange(16, dtype=torch.uint8).expand(256, 1, 16).contiguous()
    scales = torch.arange(256, dtype=torch.uint8).view(256, 1)
    return dequantize(Mxfp4Tensor(codes, scales))[:, ::2].contiguous().view(torch.int16)


@cache
def halves() -> Tensor:
    """uint8 (256, 2, 16): the upper bytes of ``words``, then the lower ones."""
    bits = words().to(torch.int32)
    return torch.stack((bits >> 8 & 255, bits & 255), dim=1).to(torch.uint8).contiguous()
