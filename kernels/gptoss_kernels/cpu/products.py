"""Products with packed experts and with bfloat16 matrices, made of compiled tasks; values in, values out.

Shapes: M rows, K inputs, R outputs, E experts. Every tensor is on the CPU and contiguous.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from gptoss_kernels.cpu import recording, tables, team
from gptoss_kernels.cpu.compiling import FIELDS, task
from gptoss_kernels.mxfp4 import BLOCK, Mxfp4Tensor

PAIRS, DIGITS, FLOATS, DENSE_FLOATS = 0, 1, 2, 20
"""As in ``rows``, which is not imported before something must be compiled: it brings numba."""

ITEM_BYTES = 1 << 20
"""Bytes of weights that a thread takes at a time, at most: it reads them in four streams, which should be far apart."""

TILE_TOKENS = 16
"""As in ``tiles``."""

TILE_BYTES = 288 << 10
"""Of rows decoded to float32 at a time: they stay in a core's own cache."""


def run(task: int, items: int, *fields: int) -> None:
    """Run a task over items. The fields go where the task looks for them, after the counter and the number of items."""
    told = array("q", (0, items, *fields, *[0] * (FIELDS - 2 - len(fields))))
    recording.note(task, told)
    team.run(task, told.buffer_info()[0], items)


def stretch(row_bytes: int, height: int) -> int:
    """Rows that a thread takes at a time: few enough that all threads get some turns."""
    several = -(-height // (4 * torch.get_num_threads()))
    return max(1, min(ITEM_BYTES // row_bytes, several))


def prepare(x: Tensor, way: int) -> Tensor:
    """x (M, K) float32 or bfloat16 -> uint8 (M, bytes), in the form in which the products of ``way`` read it."""
    count, length = x.shape
    groups = length // BLOCK
    step = {PAIRS: (groups + 1) // 2 * 128, DIGITS: (groups + 1) // 2 * 256, FLOATS: groups * 128}[way]
    out = torch.empty(count, step, dtype=torch.uint8)
    run(task("prepared", way), count, x.data_ptr(), out.data_ptr(), length, step, int(x.dtype == torch.float32))
    return out


def grouped(experts: Tensor, count: int, per_row: int) -> tuple[Tensor, Tensor]:
    """Places put together by expert, those of one expert in their order.

    Args:
        experts: (M,) int64. Places with experts that do not exist are left out.
        count: how many experts exist.
        per_row: so many places in turn have the same row.

    Returns:
        Two int64 tensors as ``expert_rows`` reads them: groups (2 + 3 * M,) and jobs (M, 2).
    """
    groups = torch.empty(2 + 3 * len(experts), dtype=torch.int64)
    jobs = torch.empty(len(experts), 2, dtype=torch.int64)
    run(task("grouped", 0), 1, experts.data_ptr(), groups.data_ptr(), jobs.data_ptr(), len(experts), count, per_row)
    return groups, jobs


def expert_rows(x: Tensor, groups: Tensor, jobs: Tensor, weight: Mxfp4Tensor, bias: Tensor, out: Tensor, way: int
                ) -> None:
    """Each row times the matrix of its expert, plus bias, straight from the packed bytes.

    Args:
        x: (M, K) float32 or bfloat16.
        groups: int64, how many groups there are and how many places were left out, then three numbers each: an expert
            and a stretch of the jobs. Its matrix is read once for all of them. There may be room for more groups.
        jobs: int64 (., 2), a row of x and a row of ``out``.
        weight: (E, R, K). bias: (E, R) in x's dtype.
        out: (., R) in x's dtype, written where the jobs say. In bfloat16 the product is rounded, then the sum with the
            bias is: as in the published code.
    """
    height, width = weight.scales.shape[1:]
    ready = prepare(x, way)
    per_item = stretch(width * 17, height)
    most = (len(groups) - 2) // 3
    run(task("mxfp4_rows", way), most * -(-height // per_item), weight.blocks.data_ptr(), weight.scales.data_ptr(),
        groups.data_ptr(), jobs.data_ptr(), ready.data_ptr(), bias.data_ptr(), out.data_ptr(),
        tables.powers().data_ptr(), height, width, ready.shape[1], per_item, int(x.dtype == torch.float32))


def panels(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of x (M, K), float32 or bfloat16, in float32 panels (P, K, TILE_TOKENS), tokens side by side.

    Args:
        rows: (P * TILE_TOKENS,) int64, the row of each token; -1 for a token of zeros.
    """
    out = torch.empty(len(rows) // TILE_TOKENS, x.shape[1], TILE_TOKENS)
    run(task("panelled", 0), len(out), x.data_ptr(), rows.data_ptr(), out.data_ptr(), x.shape[1],
        int(x.dtype == torch.float32))
    return out


def seat(found: Tensor, rows: Tensor, matrices: Tensor, bias: Tensor | None, out: Tensor, twice: bool) -> None:
    """Products in panels (P, R, TILE_TOKENS), plus bias, back to rows of ``out`` (., R), float32 or bfloat16.

    Args:
        rows: (P * TILE_TOKENS,) int64, where each token belongs; -1 for nowhere.
        matrices: (P,) int64, which row of ``bias`` (., R) each panel has; in the dtype of ``out``.
        twice: the product is rounded before the bias is added, as the published code does with experts.
    """
    run(task("seated", 0), len(found), found.data_ptr(), rows.data_ptr(), matrices.data_ptr(),
        0 if bias is None else bias.data_ptr(), out.data_ptr(), found.shape[1], int(out.dtype == torch.float32),
        int(twice))


def expert_tiles(panels: Tensor, groups: Sequence[int], weight: Mxfp4Tensor, way: int) -> Tensor:
    """Panels of activations times the matrices of their experts, in float32.

    Args:
        panels: float32 (P, K, TILE_TOKENS), tokens side by side.
        groups: three numbers each, an expert and a stretch of the panels; its matrix is decoded once for all of them.
        weight: (E, R, K).

    Returns:
        float32 (P, R, TILE_TOKENS).
    """
    height, width = weight.scales.shape[1:]
    table = {DIGITS: tables.halves, FLOATS: tables.powers}[way]()
    return _tiles(panels, groups, way + 10, weight.blocks.data_ptr(), weight.scales.data_ptr(), table.data_ptr(),
                  height, width, width * BLOCK // 2)


def dense_tiles(panels: Tensor, weight: Tensor) -> Tensor:
    """Panels of activations, see ``expert_tiles``, times a bfloat16 matrix (R, K) -> float32 (P, R, TILE_TOKENS)."""
    height, length = weight.shape
    return _tiles(panels, (0, 0, len(panels)), DENSE_FLOATS, weight.data_ptr(), 0, 0, height, length // BLOCK,
                  2 * length)


def _tiles(panels: Tensor, groups: Sequence[int], way: int, rows: int, scales: int, table: int, height: int, width: int,
           row_bytes: int) -> Tensor:
    out = torch.empty(len(panels), height, TILE_TOKENS)
    per_item = min(height, max(6, TILE_BYTES // (width * BLOCK * 4) // 6 * 6))
    count = len(groups) // 3
    items = count * -(-height // per_item)
    scratch = torch.empty(max(1, min(torch.get_num_threads(), items)) * per_item * width * BLOCK)
    groups_told, seats = array("q", groups), array("q", (0,))
    run(task("tiled", way), items, rows, scales, groups_told.buffer_info()[0], panels.data_ptr(), out.data_ptr(), table,
        scratch.data_ptr(), seats.buffer_info()[0], height, width, per_item, count, width * BLOCK * TILE_TOKENS * 4,
        TILE_TOKENS * 4, row_bytes)
    return out


def dense_rows(x: Tensor, weight: Tensor, bias: Tensor | None, way: int) -> Tensor:
    """x (M, K) times a bfloat16 matrix (R, K), plus bias (R,) -> (M, R); summed in float32, rounded once at the end."""
    height, length = weight.shape
    out = torch.empty(len(x), height, dtype=torch.bfloat16)
    per_item = stretch(length * 2, height)
    run(task("dense_rows", way), -(-height // per_item), weight.data_ptr(), x.data_ptr(),
        0 if bias is None else bias.data_ptr(), out.data_ptr(), height, length // BLOCK, length * 2, per_item, len(x))
    return out


def unpack(weight: Mxfp4Tensor, out: Tensor, way: int) -> None:
    """Decode a stretch (R, K) of one expert into ``out``, float32 or bfloat16."""
    height, width = weight.scales.shape
    wide = out.dtype == torch.float32
    table = {PAIRS: tables.words, DIGITS: tables.halves, FLOATS: tables.powers}[way]()
    per_item = stretch(width * BLOCK * out.itemsize, height)
    run(task("mxfp4_scratch", way + 10 * wide), -(-height // per_item), weight.blocks.data_ptr(),
        weight.scales.data_ptr(), out.data_ptr(), table.data_ptr(), height, width, per_item, out.itemsize)
