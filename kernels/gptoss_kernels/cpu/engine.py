"""``expert_linear`` and ``linear`` on one path: which rows go through which product.

An expert that few rows chose is multiplied straight from its bytes; for one that many chose, a stretch of it at a time
is decoded into a scratch that stays in the cache, and torch multiplies.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gptoss_kernels import reference
from gptoss_kernels.cpu import matmul, packing, products, recording
from gptoss_kernels.cpu.paths import Path
from gptoss_kernels.experts import ExpertWeight
from gptoss_kernels.mxfp4 import BLOCK, Mxfp4Tensor

SCRATCH_ROWS = {torch.float32: 96, torch.bfloat16: 480}
"""Rows decoded at a time, by the scratch's dtype: 1.1 and 2.8 MB of a published expert."""


@dataclass(frozen=True)
class Engine:
    """The two functions that read weights, on one path."""

    path: Path

    def expert_linear(self, x: Tensor, experts: Tensor, weight: ExpertWeight, bias: Tensor) -> Tensor:
        """As ``reference.expert_linear``, which also computes what these kernels do not: gradients, dense or scattered
        weights, other dtypes and devices."""
        if not isinstance(weight, Mxfp4Tensor) or not self._suits_experts(x, experts, weight, bias):
            recording.refuse("the reference's product with experts")
            return reference.expert_linear(x, experts, weight, bias)
        n, k = experts.shape
        per_slot, x, bias = x.dim() == 3, x.contiguous().view(-1, x.shape[-1]), bias.contiguous()
        out = torch.empty(n * k, weight.blocks.shape[1], dtype=x.dtype)
        if n < matmul.many():
            self._all_few(x, experts.contiguous().view(-1), 1 if per_slot else k, weight, bias, out)
            return out.view(n, k, -1)
        recording.refuse(f"experts of {n} tokens at a time")
        served = _by_expert(experts.reshape(-1).tolist(), len(weight.blocks))
        few = {expert: places for expert, places in served.items() if len(places) < matmul.many()}
        if few:
            self._few(x, few, 1 if per_slot else k, weight, bias, out)
        many = {expert: places for expert, places in served.items() if expert not in few}
        if many and self._in_tiles(x.dtype):
            self._tiles(x, many, 1 if per_slot else k, weight, bias, out)
        else:
            for expert, places in many.items():
                where = torch.tensor(places)
                rows = x[where if per_slot else where // k]
                self._many(rows, weight[expert], bias[expert], out, where)
        return out.view(n, k, -1)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """As ``reference.linear``."""
        if not self._suits_dense(x, weight, bias):
            return F.linear(x, weight, bias)
        rows = x.contiguous().view(-1, x.shape[-1])
        whole = x.shape[-1] % BLOCK == 0
        if whole and len(rows) >= matmul.many() and not matmul.native():
            out = _dense_tiles(rows, weight, bias)
        elif whole and len(rows) < matmul.many():
            bias, packed = None if bias is None else bias.contiguous(), packing.of(weight)
            out = (products.dense_rows(rows, weight, bias, self.path.dense) if packed is None
                   else packing.rows(rows, packed, bias))
        else:
            out = matmul.linear(rows, weight, bias)
        return out.view(*x.shape[:-1], weight.shape[0])

    def _suits_experts(self, x: Tensor, experts: Tensor, weight: Mxfp4Tensor, bias: Tensor) -> bool:
        """Whether the kernels can take it; where shapes do not fit, torch says so better."""
        blocks, scales, dtype = weight.blocks, weight.scales, x.dtype
        if blocks.dim() != 4 or experts.dim() != 2 or x.numel() == 0:
            return False
        rows = (*experts.shape, scales.shape[2] * BLOCK) if x.dim() == 3 else (len(experts), scales.shape[2] * BLOCK)
        return (dtype in self.path.experts and bias.dtype == dtype and experts.dtype == torch.int64
                and x.shape == rows and bias.shape == scales.shape[:2]
                and blocks.is_contiguous() and scales.is_contiguous()
                and _on_cpu(x, experts, blocks, scales, bias) and not _wants_gradient(x, bias))

    def _suits_dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        tensors = [x, weight] if bias is None else [x, weight, bias]
        return (_on_cpu(*tensors) and weight.is_contiguous() and x.numel() > 0 and weight.dim() == 2
                and all(tensor.dtype == torch.bfloat16 for tensor in tensors) and x.shape[-1:] == weight.shape[1:]
                and (bias is None or bias.shape == weight.shape[:1]) and not _wants_gradient(*tensors))

    def _all_few(self, x: Tensor, experts: Tensor, slots: int, weight: Mxfp4Tensor, bias: Tensor, out: Tensor) -> None:
        """All rows of so few tokens that no expert serves many. Nothing is read back, unless it can be an error.
        ``slots`` as in ``_few``."""
        groups, jobs = products.grouped(experts, len(weight.blocks), slots)
        if not recording.active() and groups[1]:
            raise _no_such_expert(experts, len(weight.blocks))
        products.expert_rows(x, groups, jobs, weight, bias, out, self.path.experts[x.dtype])

    def _few(self, x: Tensor, served: dict[int, list[int]], slots: int, weight: Mxfp4Tensor, bias: Tensor, out: Tensor
             ) -> None:
        """Experts with few rows each, all at once. ``slots`` rows of ``out`` in turn belong to one row of x."""
        places = [place for several in served.values() for place in several]
        sources = [place // slots for place in places]
        if len(places) < len(out):  # not every row is needed
            needed = sorted(set(sources))
            position = {source: number for number, source in enumerate(needed)}
            x, sources = x[torch.tensor(needed)], [position[source] for source in sources]
        groups, start = [len(served), 0], 0
        for expert, several in served.items():
            groups += (expert, start, start + len(several))
            start += len(several)
        jobs = torch.tensor(list(zip(sources, places)))
        products.expert_rows(x, torch.tensor(groups), jobs, weight, bias, out, self.path.experts[x.dtype])

    def _in_tiles(self, dtype: torch.dtype) -> bool:
        """Whether many rows are multiplied in float32, by the tiles of ``products.expert_tiles``."""
        return dtype == torch.float32 or not matmul.native()

    def _tiles(self, x: Tensor, served: dict[int, list[int]], slots: int, weight: Mxfp4Tensor, bias: Tensor, out: Tensor
               ) -> None:
        """Experts with many rows each: out = rounded(rows @ expert.T) + bias. Tokens that fill up a panel are dropped.
        """
        seats, experts, groups = [], [], []
        for expert, places in served.items():
            first = len(experts)
            seats += places + [-1] * (-len(places) % products.TILE_TOKENS)
            experts += [expert] * (len(seats) // products.TILE_TOKENS - first)
            groups += (expert, first, len(experts))
        at = torch.tensor(seats)
        panels = products.panels(x, at.div(slots, rounding_mode="floor"))
        found = products.expert_tiles(panels, groups, weight, self.path.scratch[torch.float32])
        products.seat(found, at, torch.tensor(experts), bias, out, twice=True)

    def _many(self, rows: Tensor, weight: Mxfp4Tensor, bias: Tensor, out: Tensor, where: Tensor) -> None:
        """One expert with many rows: out[where] = rounded(rows @ expert.T) + bias."""
        dtype = rows.dtype
        rows = rows if dtype == torch.float32 or matmul.native() else rows.float()
        height, width = weight.shape
        scratch, way = _scratch(rows.dtype, width), self.path.scratch[rows.dtype]
        product = torch.empty(len(rows), height, dtype=rows.dtype)
        for start in range(0, height, len(scratch)):
            stop = min(start + len(scratch), height)
            decoded = scratch[: stop - start]
            products.unpack(weight[start:stop], decoded, way)
            torch.mm(rows, decoded.T, out=product[:, start:stop])
        out[where] = product.to(dtype) + bias


def _dense_tiles(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Many rows times a bfloat16 matrix, plus bias, in float32; one rounding at the end."""
    missing = -len(rows) % products.TILE_TOKENS
    at = F.pad(torch.arange(len(rows)), (0, missing), value=-1)
    found = products.dense_tiles(products.panels(rows, at), weight)
    out = torch.empty(len(rows), len(weight), dtype=rows.dtype)
    bias = None if bias is None else bias.contiguous()
    products.seat(found, at, torch.zeros(len(found), dtype=torch.int64), bias, out, twice=False)
    return out


def _on_cpu(*tensors: Tensor) -> bool:
    return all(tensor.device.type == "cpu" for tensor in tensors)


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _by_expert(chosen: list[int], experts: int) -> dict[int, list[int]]:
    """Expert -> where it was chosen, both in rising order."""
    served: dict[int, list[int]] = {}
    for place, expert in enumerate(chosen):
        served.setdefault(expert, []).append(place)
    ordered = sorted(served)
    if ordered[0] < 0 or ordered[-1] >= experts:
        raise _no_such_expert(torch.tensor(ordered), experts)
    return {expert: served[expert] for expert in ordered}


def _no_such_expert(chosen: Tensor, experts: int) -> IndexError:
    return IndexError(f"experts must be from 0 to {experts - 1}, got {int(chosen.min())} to {int(chosen.max())}")


_own = threading.local()


def _scratch(dtype: torch.dtype, width: int) -> Tensor:
    """(rows, width), one for each thread, dtype and width: new memory costs more than filling old."""
    kept = _own.__dict__.setdefault("scratch", {})
    if (dtype, width) not in kept:
        kept[dtype, width] = torch.empty(SCRATCH_ROWS[dtype], width, dtype=dtype)
    return kept[dtype, width]
