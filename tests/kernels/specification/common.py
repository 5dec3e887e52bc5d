"""What the specification's files share: how values are drawn and what counts as agreement."""

from __future__ import annotations

import torch
from torch import Tensor

from gptoss_kernels.mxfp4 import Mxfp4Tensor
from tests.kernels.specification.guard import in_fence
from tests.tolerances import BF16_STEP, KERNEL_BF16_L2, KERNEL_F32


class Draw:
    """Random values on a device, each tensor between poisoned margins."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.device, self._generator = device, torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=self._generator) * scale
        return in_fence(values.to(dtype).to(self.device))

    def packed(self, experts: int, out: int, wide: int) -> Mxfp4Tensor:
        """Any codes, scales around 1/16: products of unit vectors have unit size."""
        def integers(low: int, high: int, *shape: int) -> Tensor:
            drawn = torch.randint(low, high, shape, generator=self._generator, dtype=torch.uint8)
            return in_fence(drawn.to(self.device))

        return Mxfp4Tensor(integers(0, 256, experts, out, wide // 32, 16), integers(121, 125, experts, out, wide // 32))

    def choices(self, tokens: int, slots: int, experts: int) -> Tensor:
        """(tokens, slots) int64, different experts for each token."""
        rows = [torch.randperm(experts, generator=self._generator)[:slots] for _ in range(tokens)]
        return in_fence(torch.stack(rows).to(self.device))


def agree(got: Tensor, want: Tensor) -> None:
    """Equal but for the order of sums: in float32 to units of the largest entry, in bfloat16 to one step of it."""
    assert got.shape == want.shape and got.dtype == want.dtype
    a, b = got.double(), want.double()
    assert torch.equal(a.isfinite(), b.isfinite())
    difference, largest = (a - b)[b.isfinite()], b[b.isfinite()].abs().max()
    if got.dtype == torch.float32:
        assert difference.abs().max() <= KERNEL_F32 * largest
    else:
        assert difference.abs().max() <= BF16_STEP * largest
        assert difference.norm() <= KERNEL_BF16_L2 * b[b.isfinite()].norm()
