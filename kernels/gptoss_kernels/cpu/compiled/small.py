"""What happens between the products, one row at a time: norms, rotation, SwiGLU, the weighted sum of experts.

Each is a task (see ``tasks``) that rounds where ``reference`` rounds. torch does the same in several calls, and after
each product has swept the processor's caches a call costs tens of microseconds.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gptoss_kernels.cpu.compiled.machine import address, float_of, take
from gptoss_kernels.cpu.compiled.tasks import FIELDS, at_number, function
from gptoss_kernels.cpu.compiled.values import ONE, WIDE, carray, exponential, load, once, store


def normed(way: int, keep: bool) -> Any:
    """x + delta, if there is a delta, and its norm. See ``small.add_norm``."""
    wide = way == WIDE

    @function(keep)
    def task(at):
        a = carray(at, (FIELDS,), np.int64)
        width, eps, added = a[7], float_of(np.uint32(a[8])), a[3] != 0
        size = 4 if wide else 2
        scale = carray(address(a[4]), (width,), np.float32)
        values = np.empty(width, np.float32)
        counter = at_number(a)
        while True:
            row = take(counter)
            if row >= a[1]:
                return
            start = row * width * size
            x, delta, total, norm = a[2] + start, a[3] + start, a[5] + start, a[6] + start
            squares = 0.0
            for i in range(width):
                value = load(wide, x, i)
                if added:
                    value = once(wide, value + load(wide, delta, i))
                    store(wide, total, i, value)
                values[i] = value
                squares += np.float64(value) * np.float64(value)
            factor = np.float32(1.0) / np.sqrt(np.float32(squares / width) + eps)
            for i in range(width):
                store(wide, norm, i, values[i] * factor * scale[i])
    return task


def rotated(way: int, keep: bool) -> Any:
    """All heads of a token turned by its angles. See ``small.apply_rope``."""
    wide = way == WIDE

    @function(keep)
    def task(at):
        a = carray(at, (FIELDS,), np.int64)
        heads, half = a[6], a[7]
        size = 4 if wide else 2
        counter = at_number(a)
        while True:
            token = take(counter)
            if token >= a[1]:
                return
            x, out = a[2] + token * heads * half * 2 * size, a[5] + token * heads * half * 2 * size
            at_cos, at_sin = a[3] + token * half * size, a[4] + token * half * size
            for head in range(heads):
                for i in range(half):
                    one, two = 2 * half * head + i, 2 * half * head + half + i
                    first, second = load(wide, x, one), load(wide, x, two)
                    cos, sin = load(wide, at_cos, i), load(wide, at_sin, i)
                    store(wide, out, one, once(wide, first * cos) - once(wide, second * sin))
                    store(wide, out, two, once(wide, second * cos) + once(wide, first * sin))
    return task


def combined(way: int, keep: bool) -> Any:
    """A token's experts, weighted and summed. See ``small.combine_experts``."""
    wide = way == WIDE

    @function(keep)
    def task(at):
        a = carray(at, (FIELDS,), np.int64)
        slots, width = a[5], a[6]
        size = 4 if wide else 2
        sums = np.empty(width, np.float32)
        counter = at_number(a)
        while True:
            token = take(counter)
            if token >= a[1]:
                return
            parts, weights = a[2] + token * slots * width * size, a[3] + token * slots * size
            sums[:] = 0
            for slot in range(slots):
                weight = load(wide, weights, slot)
                for i in range(width):
                    sums[i] += weight * load(wide, parts + slot * width * size, i)
            for i in range(width):
                store(wide, a[4] + token * width * size, i, sums[i])
    return task


def gated(way: int, keep: bool) -> Any:
    """Clamped SwiGLU of rows whose gate and up may lie between each other. See ``small.swiglu``."""
    wide = way == WIDE

    @function(keep)
    def task(at):
        a = carray(at, (FIELDS,), np.int64)
        width, apart, step = a[5], a[6], a[7]
        alpha, limit = float_of(np.uint32(a[8])), float_of(np.uint32(a[9]))
        size = 4 if wide else 2
        gate, up = np.empty(width, np.float32), np.empty(width, np.float32)
        counter = at_number(a)
        while True:
            row = take(counter)
            if row >= a[1]:
                return
            gates, ups = a[2] + row * apart * size, a[3] + row * apart * size
            if step == 2:  # as the two come out of an expert; a constant, for the compiler
                for i in range(width):
                    gate[i], up[i] = load(wide, gates, 2 * i), load(wide, ups, 2 * i)
            else:
                for i in range(width):
                    gate[i], up[i] = load(wide, gates, i * step), load(wide, ups, i * step)
            for i in range(width):
                g = limit if gate[i] > limit else gate[i]  # a NaN stays one
                u = limit if up[i] > limit else -limit if up[i] < -limit else up[i]
                share = once(wide, ONE / (ONE + exponential(-once(wide, alpha * g))))
                gate[i] = once(wide, g * share) * once(wide, u + ONE)
            for i in range(width):
                store(wide, a[4] + row * width * size, i, gate[i])
    return task
