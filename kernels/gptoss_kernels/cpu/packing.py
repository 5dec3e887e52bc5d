"""A second copy of a bfloat16 matrix for decoding, packed without loss to 12 bits a value: fewer bytes to read.

The values are all there (``compiled.packed``), so a product is one of the same numbers; the sums start the same, and
the few values that the packing has no room for are added last. The matrix itself stays where it is: for prompts, for
gradients, for whoever looks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from gptoss_kernels.cpu import products
from gptoss_kernels.cpu.paths import why_not
from gptoss_kernels.mxfp4 import BLOCK

RECORD, ESCAPE = 48, 16
"""As in ``compiled.packed`` and ``compiled.packing``."""

MOST_ESCAPES = 0.005
"""Of a matrix's values: with more, adding them takes what reading fewer bytes saves."""

SAMPLE = 1 << 22
"""Values of a matrix among which the frequent upper bytes are found."""


@dataclass(frozen=True, eq=False)
class Packed:
    """R rows of K values.

    Attributes:
        records: uint8 (R, K / 32, RECORD).
        table: uint8 (32,), see ``compiled.packed.widened``.
        starts: int64 (R + 1,), where each row's escapes begin.
        columns: int64, where each escape's activation lies for the products.
        values: bfloat16, the escapes.
        version: of the matrix when it was packed.
    """

    records: Tensor
    table: Tensor
    starts: Tensor
    columns: Tensor
    values: Tensor
    version: int

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.records, self.starts, self.columns, self.values))


_packed = WeakTensorKeyDictionary()


def of(weight: Tensor) -> Packed | None:
    """The packed copy of a matrix, if there is one and nobody has written into the matrix since."""
    found = _packed.get(weight) if _packed else None
    return found if found is not None and found.version == weight._version else None


def keep(weights: Iterable[Tensor]) -> Iterator[int]:
    """Pack matrices, from now on used by ``linear`` for few rows -> the bytes that each has become; 0 where packing
    gains nothing. A copy goes with its matrix.

    Raises:
        RuntimeError: the processor can't read packed matrices, or reads them wrongly.
    """
    reason = why_not("avx2") or flaw()
    if reason is not None:
        raise RuntimeError(f"packed matrices can't be used: {reason}")
    for weight in weights:
        found = of(weight) or pack(weight)
        if found is not None:
            _packed[weight] = found
        yield found.nbytes if found is not None else 0


@cache
def flaw() -> str | None:
    """What is wrong with packed products here, None when nothing is; as ``selftest.flaw`` for the others."""
    weight = torch.randn(37, 96, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    weight[5, 7], x = 1e30, torch.ones(1, 96, dtype=torch.bfloat16)
    found = pack(weight)
    if found is None:
        return "it does not pack what it should"
    got, wanted = rows(x, found, None).float(), weight.float().sum(dim=1)
    off = float(((got - wanted).abs() / weight.float().abs().sum(dim=1)).max())
    return None if off <= 2.0**-8 else f"products are off by {off:.3g} of their size"


def pack(weight: Tensor) -> Packed | None:
    """weight (R, K) bfloat16, K a multiple of 32 -> its packed copy; None where too many values would be escapes."""
    height, length = weight.shape
    if weight.dtype != torch.bfloat16 or length % BLOCK or not weight.is_contiguous() or weight.numel() == 0:
        return None
    step = max(1, weight.numel() // SAMPLE)
    frequent = torch.bincount(weight[::step].reshape(-1).view(torch.uint8)[1::2].int(), minlength=256)
    frequent[0] = frequent.sum() + 1  # of zero, which stands in an escape's place
    chosen = frequent.topk(16).indices.sort().values
    codes = torch.full((256,), ESCAPE, dtype=torch.uint8)
    codes[chosen] = torch.arange(16, dtype=torch.uint8)
    table = chosen.to(torch.uint8).repeat(2)
    starts = torch.zeros(height + 1, dtype=torch.int64)
    nothing = torch.empty(1, dtype=torch.int64)

    def go(records: int, columns: Tensor, values: Tensor) -> None:
        per_item = products.stretch(length * 2, height)
        products.run(products.task("packing", 0), -(-height // per_item), weight.data_ptr(), records, codes.data_ptr(),
                     starts.data_ptr(), height, length, per_item, columns.data_ptr(), values.data_ptr())

    go(0, nothing, nothing)
    starts = starts.cumsum(0)
    escapes = int(starts[-1])
    if escapes > MOST_ESCAPES * weight.numel():
        return None
    records = torch.empty(height, length // BLOCK, RECORD, dtype=torch.uint8)
    columns = torch.empty(escapes, dtype=torch.int64)
    values = torch.empty(escapes, dtype=torch.bfloat16)
    go(records.data_ptr(), columns, values)
    return Packed(records, table, starts, columns, values, weight._version)


def rows(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """x (M, K) bfloat16 times a packed matrix (R, K), plus bias (R,) -> (M, R); as ``products.dense_rows``."""
    height, groups = weight.records.shape[:2]
    out = torch.empty(len(x), height, dtype=torch.bfloat16)
    per_item = products.stretch(groups * RECORD, height)
    products.run(products.task("packed_rows", 0), -(-height // per_item), weight.records.data_ptr(), x.data_ptr(),
                 0 if bias is None else bias.data_ptr(), out.data_ptr(), weight.table.data_ptr(), height, groups,
                 per_item, len(x), weight.starts.data_ptr(), weight.columns.data_ptr(), weight.values.data_ptr())
    return out
