"""What happens between the products, one row at a time: norms, rotation, SwiGLU, the weighted sum of experts.

Each is a task (see ``tasks``) that rounds where ``reference`` rounds. torch does the same in six to nine calls, and
after each product has swept the processor's caches a call costs tens of microseconds: a fifth of a decoding step.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

from gptoss_kernels.cpu.compiled.machine import address, float_of, take
from gptoss_kernels.cpu.compiled.tasks import FIELDS, SIGNATURE, at_number, carray, rounded, widened


@numba.njit(inline="always")
def as_float(wide, floats, words, i):
    """Element i of a float32 or of a bfloat16 array, as float32."""
    return floats[i] if wide else widened(words[i])


@numba.njit(inline="always")
def once(wide, x):
    """What is left of a float32 after one rounding to the dtype."""
    return x if wide else widened(rounded(x))


@numba.njit(inline="always")
def store(wide, floats, words, i, x):
    if wide:
        floats[i] = x
    else:
        words[i] = rounded(x)


def normed(_: int, keep: bool) -> Any:
    """x + delta, if there is a delta, and its norm. See ``small.add_norm``."""
    @numba.cfunc(SIGNATURE, cache=keep)
    def task(at):
        a = carray(at, (FIELDS,), np.int64)
        width, wide, eps, added = a[7], a[8], float_of(np.uint32(a[9])), a[3] != 0
        size = 4 if wide else 2
        scale = carray(address(a[4]), (width,), np.float32)
        values = np.empty(width, np.float32)
        counter = at_number(a)
        while True:
            row = take(counter)
            if row >= a[1]:
                return
            start = row * width * size
            x32, x16 = carray(address(a[2] + start), (width,), np.float32), carray(address(a[2] + start), (width,),
                                                                                   np.uint16)
            d32, d16 = carray(address(a[3] + start), (width,), np.float32), carray(address(a[3] + start), (width,),
                                                                                   np.uint16)
            t32, t16 = carray(address(a[5] + start), (width,), np.float32), carray(address(a[5] + start), (width,),
                                                                                   np.uint16)
            n32, n16 = carray(address(a[6] + start), (width,), np.float32), carray(address(a[6] + start), (width,),
                                                                                   np.uint16)
            squares = 0.0
            for i in range(width):
                value = as_float(wide, x32, x16, i)
                if added:
                    value = once(wide, value + as_float(wide, d32, d16, i))
                    store(wide, t32, t16, i, value)
                values[i] = value
                squares += np.float64(value) * np.float64(value)
            factor = np.float32(1.0) / np.sqrt(np.float32(squares / width) + eps)
            for i in range(width):
                store(wide, n32, n16, i, values[i] * factor * scale[i])
    return task


def rotated(_: int, keep: bool) -> Any:
    """All heads of a token turned by its angles. See ``small.apply_rope``."""
    @numba.cfunc(SIGNATURE, cache=keep)
    def task(at):
        a = carray(at, (FIELDS,), np.int64)
        heads, half, wide = a[6], a[7], a[8]
        size = 4 if wide else 2
        counter = at_number(a)
        while True:
            token = take(counter)
            if token >= a[1]:
                return
            x, out = a[2] + token * heads * half * 2 * size, a[5] + token * heads * half * 2 * size
            x32, x16 = carray(address(x), (1,), np.float32), carray(address(x), (1,), np.uint16)
            o32, o16 = carray(address(out), (1,), np.float32), carray(address(out), (1,), np.uint16)
            at_cos, at_sin = a[3] + token * half * size, a[4] + token * half * size
            c32, c16 = carray(address(at_cos), (1,), np.float32), carray(address(at_cos), (1,), np.uint16)
            s32, s16 = carray(address(at_sin), (1,), np.float32), carray(address(at_sin), (1,), np.uint16)
            for head in range(heads):
                for i in range(half):
                    one, two = 2 * half * head + i, 2 * half * head + half + i
                    first, second = as_float(wide, x32, x16, one), as_float(wide, x32, x16, two)
                    cos, sin = as_float(wide, c32, c16, i), as_float(wide, s32, s16, i)
                    store(wide, o32, o16, one, once(wide, first * cos) - once(wide, second * sin))
                    store(wide, o32, o16, two, once(wide, second * cos) + once(wide, first * sin))
    return task


def gated(_: int, keep: bool) -> Any:
    """Clamped SwiGLU of rows whose elements may lie apart. See ``small.swiglu``."""
    @numba.cfunc(SIGNATURE, cache=keep)
    def task(at):
        a = carray(at, (FIELDS,), np.int64)
        width, wide, alpha, limit = a[9], a[10], float_of(np.uint32(a[11])), float_of(np.uint32(a[12]))
        size, sigmoid = 4 if wide else 2, carray(address(a[13]), (1 << 16,), np.uint16)
        counter = at_number(a)
        while True:
            row = take(counter)
            if row >= a[1]:
                return
            gates, ups, out = a[2] + row * a[3] * size, a[5] + row * a[6] * size, a[8] + row * width * size
            g32, g16 = carray(address(gates), (1,), np.float32), carray(address(gates), (1,), np.uint16)
            u32, u16 = carray(address(ups), (1,), np.float32), carray(address(ups), (1,), np.uint16)
            o32, o16 = carray(address(out), (1,), np.float32), carray(address(out), (1,), np.uint16)
            for i in range(width):
                gate, up = as_float(wide, g32, g16, i * a[4]), as_float(wide, u32, u16, i * a[7])
                if gate > limit:  # written so that a NaN stays one
                    gate = limit
                if up > limit:
                    up = limit
                if up < -limit:
                    up = -limit
                if wide:
                    share = np.float32(1.0) / (np.float32(1.0) + np.float32(math.exp(-alpha * gate)))
                else:
                    share = widened(sigmoid[rounded(alpha * gate)])
                store(wide, o32, o16, i, once(wide, gate * share) * once(wide, up + np.float32(1.0)))
    return task


def combined(_: int, keep: bool) -> Any:
    """A token's experts, weighted and summed. See ``small.combine_experts``."""
    @numba.cfunc(SIGNATURE, cache=keep)
    def task(at):
        a = carray(at, (FIELDS,), np.int64)
        slots, width, wide = a[5], a[6], a[7]
        size = 4 if wide else 2
        sums = np.empty(width, np.float32)
        counter = at_number(a)
        while True:
            token = take(counter)
            if token >= a[1]:
                return
            parts, weights, out = a[2] + token * slots * width * size, a[3] + token * slots * size, a[4]
            w32, w16 = carray(address(weights), (slots,), np.float32), carray(address(weights), (slots,), np.uint16)
            o32, o16 = (carray(address(out + token * width * size), (width,), np.float32),
                        carray(address(out + token * width * size), (width,), np.uint16))
            sums[:] = 0
            for slot in range(slots):
                weight = as_float(wide, w32, w16, slot)
                place = parts + slot * width * size
                p32, p16 = carray(address(place), (width,), np.float32), carray(address(place), (width,), np.uint16)
                for i in range(width):
                    sums[i] += weight * as_float(wide, p32, p16, i)
            for i in range(width):
                store(wide, o32, o16, i, sums[i])
    return task
