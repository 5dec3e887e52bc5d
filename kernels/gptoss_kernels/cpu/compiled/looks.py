"""Attention of one query in each row, as in decoding: scores of its keys, and values by its pattern.

An item is one key/value head of one row: its keys are read once for all the query heads that share them. The sums are
float32, rounded once, as ``reference`` has it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gptoss_kernels.cpu.compiled.machine import address, float_of, take
from gptoss_kernels.cpu.compiled.tasks import FIELDS, at_number, function
from gptoss_kernels.cpu.compiled.values import WIDE, carray, exponential, load, once, store

REORDER = {"reassoc", "contract"}
"""What the compiler may do to a sum, so that it runs in vectors: the order is then the same in every run."""


def revealed(_: int, keep: bool) -> Any:
    """Which keys one query of each row may look at. See ``attend.visible_keys``."""
    @function(keep)
    def task(at):
        a = carray(at, (FIELDS,), np.int64)
        keys, window = a[5], a[6]
        counter = at_number(a)
        while True:
            row = take(counter)
            if row >= a[1]:
                return
            query = carray(address(a[2]), (a[1],), np.int64)[row]
            positions = carray(address(a[3] + row * keys * 8), (keys,), np.int64)
            visible = carray(address(a[4] + row * keys), (keys,), np.uint8)
            for s in range(keys):
                distance = query - positions[s]
                visible[s] = distance >= 0 and positions[s] >= 0 and (window < 0 or distance < window)
    return task


def softened(way: int, keep: bool) -> Any:
    """The pattern of one query's scores, with the sink. See ``attend.softmax_with_sink``."""
    wide = way == WIDE

    @function(keep, fastmath=REORDER)
    def task(at):
        a = carray(at, (FIELDS,), np.int64)
        heads, keys = a[5], a[6]
        size = 4 if wide else 2
        share = np.empty(keys, np.float32)
        counter = at_number(a)
        while True:
            item = take(counter)
            if item >= a[1]:
                return
            scores, pattern = a[2] + item * keys * size, a[4] + item * (keys + 1) * size
            end = keys  # columns not filled yet take no part, so that the bits do not depend on how many there are
            while end > 0 and load(wide, scores, end - 1) == -np.inf:
                end -= 1
            sink = load(wide, a[3], item % heads)
            highest = sink
            for s in range(end):
                share[s] = load(wide, scores, s)
                highest = max(highest, share[s])
            total = np.float32(0.0)
            for s in range(end):
                share[s] = exponential(share[s] - highest)
                total += share[s]
            sink = exponential(sink - highest)
            total += sink
            for s in range(end):
                store(wide, pattern, s, share[s] / total)
            for s in range(end, keys):
                store(wide, pattern, s, np.float32(0.0))
            store(wide, pattern, keys, sink / total)
    return task


def stored(_: int, keep: bool) -> Any:
    """One column of keys and values written into their buffers. See ``attend.store_kv``."""
    @function(keep)
    def task(at):
        a = carray(at, (FIELDS,), np.int64)
        columns, width = a[7], a[8]  # width in bytes
        column = carray(address(a[6]), (1,), np.int64)[0]
        counter = at_number(a)
        while True:
            row = take(counter)
            if row >= a[1] or column < 0 or column >= columns:
                return
            place = (row * columns + column) * width
            keys, values = carray(address(a[2] + place), (width,), np.uint8), carray(address(a[3] + place), (width,),
                                                                                    np.uint8)
            k, v = carray(address(a[4] + row * width), (width,), np.uint8), carray(address(a[5] + row * width),
                                                                                 (width,), np.uint8)
            for i in range(width):
                keys[i], values[i] = k[i], v[i]
    return task


def scored(way: int, keep: bool) -> Any:
    """Scores of one query for each key. See ``attend.attention_scores``."""
    wide = way == WIDE

    @function(keep, fastmath=REORDER)
    def task(at):
        a = carray(at, (FIELDS,), np.int64)
        kv_heads, groups, width, keys = a[6], a[7], a[8], a[9]
        k_row, k_key, factor = a[10], a[11], float_of(np.uint32(a[12]))
        size = 4 if wide else 2
        query, key = np.empty((groups, width), np.float32), np.empty(width, np.float32)
        counter = at_number(a)
        while True:
            item = take(counter)
            if item >= a[1]:
                return
            row, head = item // kv_heads, item % kv_heads
            q = a[2] + item * groups * width * size
            for g in range(groups):
                for i in range(width):
                    query[g, i] = load(wide, q, g * width + i)
            visible = carray(address(a[4] + row * keys), (keys,), np.uint8)
            out = a[5] + item * groups * keys * size
            for s in range(keys):
                if visible[s] == 0:
                    for g in range(groups):
                        store(wide, out, g * keys + s, np.float32(-np.inf))
                    continue
                k = a[3] + (row * k_row + s * k_key + head * width) * size
                for i in range(width):
                    key[i] = load(wide, k, i)
                for g in range(groups):
                    total = np.float32(0.0)
                    for i in range(width):
                        total += query[g, i] * key[i]
                    store(wide, out, g * keys + s, once(wide, total) * factor)
    return task


def mixed(way: int, keep: bool) -> Any:
    """Values of the keys, mixed by one query's pattern. See ``attend.attention_values``."""
    wide = way == WIDE

    @function(keep, fastmath=REORDER)
    def task(at):
        a = carray(at, (FIELDS,), np.int64)
        kv_heads, groups, width, keys, v_row, v_key = a[5], a[6], a[7], a[8], a[9], a[10]
        size = 4 if wide else 2
        sums, value = np.empty((groups, width), np.float32), np.empty(width, np.float32)
        counter = at_number(a)
        while True:
            item = take(counter)
            if item >= a[1]:
                return
            row, head = item // kv_heads, item % kv_heads
            weights = a[2] + item * groups * (keys + 1) * size  # the last column is the sink's
            sums[:] = 0
            for s in range(keys):
                counts = False
                for g in range(groups):
                    counts |= load(wide, weights, g * (keys + 1) + s) != 0
                if not counts:  # hidden, or not filled yet
                    continue
                v = a[3] + (row * v_row + s * v_key + head * width) * size
                for i in range(width):
                    value[i] = load(wide, v, i)
                for g in range(groups):
                    weight = load(wide, weights, g * (keys + 1) + s)
                    for i in range(width):
                        sums[g, i] += weight * value[i]
            out = a[4] + item * groups * width * size
            for g in range(groups):
                for i in range(width):
                    store(wide, out, g * width + i, sums[g, i])
    return task
