"""Packing bfloat16 matrices to 12 bits a value, and products with them. What a packed row is stands in ``packed``."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from gptoss_kernels.cpu.compiled import packed, prepare, rows
from gptoss_kernels.cpu.compiled.machine import address, take
from gptoss_kernels.cpu.compiled.tasks import FIELDS, STREAMS, at_number, following, function
from gptoss_kernels.cpu.compiled.values import carray, rounded, widened

ORDER = np.array(packed.ORDER)
PLACES = np.argsort(ORDER)
"""Where each value of a record stands."""

ESCAPE = 16
"""Instead of a code, for upper bytes that have none."""


def packing(_: int, keep: bool) -> Any:
    """Rows to records, or, where there is no room for records yet, a count of each row's escapes. See ``packing.pack``.
    """
    @function(keep)
    def task(at):
        a = carray(at, (FIELDS,), np.int64)
        matrix, out, height, length, per_item = a[2], a[3], a[6], a[7], a[8]
        codes_of = carray(address(a[4]), (256,), np.uint8)
        starts = carray(address(a[5]), (height + 1,), np.int64)
        columns, values = carray(address(a[9]), (1,), np.int64), carray(address(a[10]), (1,), np.uint16)
        codes = np.empty(32, np.uint8)
        counter = at_number(a)
        while True:
            start = take(counter) * per_item
            if start >= height:
                return
            for row in range(start, min(start + per_item, height)):
                bits = carray(address(matrix + row * length * 2), (length,), np.uint16)
                if out == 0:
                    escapes = 0
                    for i in range(length):
                        escapes += codes_of[bits[i] >> 8] == ESCAPE
                    starts[row + 1] = escapes
                    continue
                escape = starts[row]
                for block in range(length // 32):
                    record = carray(address(out + (row * (length // 32) + block) * packed.RECORD), (packed.RECORD,),
                                    np.uint8)
                    for place in range(32):
                        i = 32 * block + ORDER[place]
                        code, rest = codes_of[bits[i] >> 8], bits[i] & 255
                        if code == ESCAPE:
                            # in the order of ``prepare.as_floats``: the even ones of 32 first
                            columns[escape], values[escape] = 32 * block + (i % 2) * 16 + i % 32 // 2, bits[i]
                            escape += 1
                            code, rest = 0, 0
                        codes[place], record[place] = code, rest
                    for place in range(16):
                        record[32 + place] = codes[place] | (codes[16 + place] << 4)
    return task


@numba.njit(inline="always")
def with_escapes(row, total, starts, columns, values, x):
    """A row's sum and what its escapes add."""
    for i in range(starts[row], starts[row + 1]):
        total += widened(values[i]) * x[columns[i]]
    return total


def packed_rows(_: int, keep: bool) -> Any:
    """Products of activations with all rows of a packed matrix, plus bias. See ``packing.rows``."""
    @function(keep)
    def task(at):
        a = carray(at, (FIELDS,), np.int64)
        matrix, x_at, bias_at, out_at, table = a[2], a[3], a[4], a[5], a[6]
        height, steps, per_item, vectors = a[7], a[8], a[9], a[10]
        starts = carray(address(a[11]), (height + 1,), np.int64)
        columns = carray(address(a[12]), (starts[height],), np.int64)
        values = carray(address(a[13]), (starts[height],), np.uint16)
        bias, out = carray(address(bias_at), (1,), np.uint16), carray(address(out_at), (1,), np.uint16)
        counter, length = at_number(a), steps * 32
        own = np.empty(vectors * length, np.float32)  # each thread for itself: sooner done than handed round
        prepare.as_floats(False, x_at, own)
        x = at_number(own)
        while True:
            start = take(counter) * per_item
            if start >= height:
                return
            stop = min(start + per_item, height)
            apart = (stop - start) // STREAMS
            row = start
            while row < stop:
                here = matrix + row * steps * packed.RECORD
                for j in range(vectors):
                    mine = own[j * length:(j + 1) * length]
                    if row < start + apart:
                        several = rows.packed_dots(STREAMS, here, apart, x + j * length * 4, table, steps)
                        for i in range(STREAMS):
                            place = row + i * apart
                            total = with_escapes(place, several[i], starts, columns, values, mine)
                            added = widened(bias[place]) if bias_at else np.float32(0.0)
                            out[j * height + place] = rounded(total + added)
                    else:
                        alone = rows.packed_dots(1, here, 0, x + j * length * 4, table, steps)
                        total = with_escapes(row, alone[0], starts, columns, values, mine)
                        added = widened(bias[row]) if bias_at else np.float32(0.0)
                        out[j * height + row] = rounded(total + added)
                row = following(row, start, apart)
    return task
