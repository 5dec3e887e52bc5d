"""Whole products as functions of one address, which any number of threads may run at the same time.

The address is that of 20 int64: first the number of the next item, then how many there are, then what the task needs.
Threads take items until none is left. The results do not depend on how many threads there are: an item is a stretch of
rows, and each row is computed by one thread in one order.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types

from gptoss_kernels.cpu.compiled import prepare, rows
from gptoss_kernels.cpu.compiled.machine import address, take
from gptoss_kernels.cpu.compiled.values import carray, load, once, rounded, store, widened

FIELDS = 20

STREAMS = 4
"""Rows that are read at the same time, each a quarter of a thread's stretch from the next. One thread reads memory at
17 GB/s in one stream and at 24 in four that are far apart (Zen 3): each stream is fetched ahead for itself."""

SIGNATURE = types.void(types.voidptr)


def function(keep: bool, **options: Any) -> Any:
    """Compile a function of one address. A division by zero gives what IEEE 754 says: looking for one would keep loops
    out of vectors."""
    return numba.cfunc(SIGNATURE, cache=keep, error_model="numpy", **options)


def mxfp4_rows(way: int, keep: bool) -> Any:
    """Products of prepared activations with rows of their experts, plus bias. See ``products.expert_rows``."""
    @function(keep)
    def task(at):
        a = carray(at, (FIELDS,), np.int64)
        blocks, scales, groups_at, jobs_at, x, bias, out, powers = a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9]
        height, width, step, per_item, wide = a[10], a[11], a[12], a[13], a[14]
        groups = carray(address(groups_at), (1,), np.int64)[0]
        if groups == 0:
            return
        group = carray(address(groups_at + 16), (groups, 3), np.int64)
        job = carray(address(jobs_at), (group[groups - 1, 2], 2), np.int64)
        stretches = (height + per_item - 1) // per_item
        counter = at_number(a)
        while True:
            item = take(counter)
            if item >= groups * stretches:
                return
            g, start = item // stretches, item % stretches * per_item
            expert, first, last = group[g, 0], group[g, 1], group[g, 2]
            stop = min(start + per_item, height)
            apart = (stop - start) // STREAMS
            row = start
            while row < stop:
                place = expert * height + row
                here, scale = blocks + place * width * 16, scales + place * width
                for j in range(first, last):
                    activations, target = x + job[j, 0] * step, job[j, 1] * height + row
                    if row < start + apart:
                        several = rows.mxfp4_dots(way, STREAMS, here, scale, apart, activations, powers, width)
                        for i in range(STREAMS):
                            added = once(wide, several[i]) + load(wide, bias, place + i * apart)
                            store(wide, out, target + i * apart, added)
                    else:
                        alone = rows.mxfp4_dots(way, 1, here, scale, 0, activations, powers, width)
                        store(wide, out, target, once(wide, alone[0]) + load(wide, bias, place))
                row = following(row, start, apart)
    return task


@numba.njit(inline="always")
def following(row, start, apart):
    """The row after this one: those of the other streams are done when the first stream ends."""
    return row + 1 if row + 1 != start + apart else start + STREAMS * apart


def dense_rows(way: int, keep: bool) -> Any:
    """Products of activations with all rows of a bfloat16 matrix, plus bias. See ``products.dense_rows``.

    What reads float32 wants it in the order of ``prepare.as_floats``.
    """
    widening = way == rows.FLOATS

    @function(keep)
    def task(at):
        a = carray(at, (FIELDS,), np.int64)
        matrix, x, bias_at, out_at = a[2], a[3], a[4], a[5]
        height, steps, step, per_item, vectors = a[6], a[7], a[8], a[9], a[10]
        bias, out = carray(address(bias_at), (1,), np.uint16), carray(address(out_at), (1,), np.uint16)
        counter, length = at_number(a), steps * 32
        own = np.empty(vectors * length if widening else 1, np.float32)
        if widening:  # each thread for itself: sooner done than handed round
            prepare.as_floats(False, x, own)
            x, step = at_number(own), length * 4
        while True:
            start = take(counter) * per_item
            if start >= height:
                return
            stop = min(start + per_item, height)
            apart = (stop - start) // STREAMS
            row = start
            while row < stop:
                for j in range(vectors):
                    if row < start + apart:
                        several = rows.dense_dots(way, STREAMS, matrix + row * steps * 64, apart, x + j * step, steps)
                        for i in range(STREAMS):
                            added = widened(bias[row + i * apart]) if bias_at else np.float32(0.0)
                            out[j * height + row + i * apart] = rounded(several[i] + added)
                    else:
                        alone = rows.dense_dots(way, 1, matrix + row * steps * 64, 0, x + j * step, steps)
                        added = widened(bias[row]) if bias_at else np.float32(0.0)
                        out[j * height + row] = rounded(alone[0] + added)
                row = following(row, start, apart)
    return task


def mxfp4_scratch(way: int, keep: bool) -> Any:
    """Rows of one expert decoded into a scratch. See ``products.unpack``."""
    @function(keep)
    def task(at):
        a = carray(at, (FIELDS,), np.int64)
        blocks, scales, out, tables, height, width, per_item, size = a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9]
        counter = at_number(a)
        while True:
            start = take(counter) * per_item
            if start >= height:
                return
            for row in range(start, min(start + per_item, height)):
                rows.mxfp4_unpack(way, blocks + row * width * 16, scales + row * width,
                                  out + row * width * 32 * size, tables, width)
    return task


def tiled(way: int, keep: bool) -> Any:
    """Products of panels of activations with all rows of some matrices. See ``products.expert_tiles``."""
    @function(keep)
    def task(at):
        a = carray(at, (FIELDS,), np.int64)
        blocks, scales, groups_at, x, out, tables, scratch, seats_at = a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9]
        height, width, per_item, groups, panel_step, out_step = a[10], a[11], a[12], a[13], a[14], a[15]
        row_bytes = a[16]
        group = carray(address(groups_at), (groups, 3), np.int64)
        stretches = (height + per_item - 1) // per_item
        length = width * 32
        counter = at_number(a)
        mine = scratch + take(seats_at) * per_item * length * 4
        while True:
            item = take(counter)
            if item >= a[1]:
                return
            g, start = item // stretches, item % stretches * per_item
            expert, first, last = group[g, 0], group[g, 1], group[g, 2]
            stop = min(start + per_item, height)
            for row in range(start, stop):
                place = expert * height + row
                rows.mxfp4_unpack(way, blocks + place * row_bytes, scales + place * width,
                                  mine + (row - start) * length * 4, tables, width)
            for panel in range(first, last):
                here = out + (panel * height + start) * out_step
                row = 0
                while row + 6 <= stop - start:
                    rows.tile(6, mine + row * length * 4, x + panel * panel_step, here + row * out_step, length,
                              out_step)
                    row += 6
                while row < stop - start:
                    rows.tile(1, mine + row * length * 4, x + panel * panel_step, here + row * out_step, length,
                              out_step)
                    row += 1
    return task


def prepared(way: int, keep: bool) -> Any:
    """Vectors of activations in the order that a way reads. See ``products.prepare``."""
    if way == rows.PAIRS:
        @function(keep)
        def task(at):
            a = carray(at, (FIELDS,), np.int64)
            counter, length, step = at_number(a), a[4], a[5]
            while True:
                i = take(counter)
                if i >= a[1]:
                    return
                prepare.as_pairs(carray(address(a[2] + i * length * 2), (length,), np.uint16),
                                 carray(address(a[3] + i * step), (step // 2,), np.uint16))
    elif way == rows.DIGITS:
        @function(keep)
        def task(at):
            a = carray(at, (FIELDS,), np.int64)
            counter, length, step = at_number(a), a[4], a[5]
            while True:
                i = take(counter)
                if i >= a[1]:
                    return
                place = a[3] + i * step
                prepare.as_digits(a[6], a[2] + i * length * (4 if a[6] else 2), length,
                                  carray(address(place), (step,), np.int8),
                                  carray(address(place), (step // 4,), np.int32),
                                  carray(address(place), (step // 4,), np.float32))
    else:
        @function(keep)
        def task(at):
            a = carray(at, (FIELDS,), np.int64)
            counter, length, step = at_number(a), a[4], a[5]
            while True:
                i = take(counter)
                if i >= a[1]:
                    return
                prepare.as_floats(a[6], a[2] + i * length * (4 if a[6] else 2),
                                  carray(address(a[3] + i * step), (length,), np.float32))
    return task


@numba.njit(inline="always")
def at_number(array):
    """The address of an array's first element."""
    return array.ctypes.data
