"""Activations in the form in which a row product reads them: numba functions, one vector at a time."""

from __future__ import annotations

import numba
import numpy as np

from gptoss_kernels.cpu.compiled.machine import bits_of
from gptoss_kernels.cpu.compiled.values import load

LIMIT = np.float64(127.49 * 65536)
"""About the largest integer, of either sign, that three digits from -128 to 127 can write in base 256."""


@numba.njit
def as_floats(wide, at, out):
    """Numbers at an address (see ``values``) -> out float32 (n,), n a multiple of 32: in every 32 the even ones first,
    then the odd ones."""
    for block in range(len(out) // 32):
        for j in range(16):
            out[32 * block + j] = load(wide, at, 32 * block + 2 * j)
            out[32 * block + 16 + j] = load(wide, at, 32 * block + 2 * j + 1)


@numba.njit
def as_pairs(x, out):
    """x bfloat16 bits (n,) uint16 -> in every 64 the even ones first, then the odd ones; padded with 0."""
    out[:] = 0
    for block in range(len(x) // 32):
        start = 64 * (block // 2) + 16 * (block % 2)
        for j in range(16):
            out[start + j] = x[32 * block + 2 * j]
            out[start + 32 + j] = x[32 * block + 2 * j + 1]


@numba.njit
def as_digits(wide, at, length, digits, off, factors):
    """Numbers at an address -> the records of ``digits.PAIR`` bytes, seen as int8, int32 and float32.

    A block with an infinity or a NaN gets the factor NaN, so that every product with it is NaN.
    """
    digits[:] = 0
    x, numbers = np.empty(32, np.float32), np.empty(32, np.int32)
    for block in range(length // 32):
        largest = np.float32(0.0)
        finite = True
        for j in range(32):
            x[j] = load(wide, at, 32 * block + j)
            size = abs(x[j])
            finite &= size <= np.float32(3.4028235e38)
            largest = max(largest, size)
        exponent = max(int(bits_of(largest) >> np.uint32(23)), 1) - 126  # largest < 2 ** exponent
        up = min(2.0 ** (25 - exponent), 2.0**149)  # 2 ** -149 is the smallest float32
        while largest * up > LIMIT:
            up *= 0.5
        for j in range(32):
            numbers[j] = np.int32(np.rint(x[j] * up)) if finite else 0
        pair, half = block // 2, block % 2
        for j in range(32):
            place = 256 * pair + 96 * (j & 1) + 16 * half + (j >> 1)
            number = numbers[j]
            low = ((number + 128) & 255) - 128
            number = (number - low) >> 8
            middle = ((number + 128) & 255) - 128
            digits[place] = low
            digits[place + 32] = middle
            digits[place + 64] = (number - middle) >> 8
        for lane in range(4):
            total = 0
            for j in range(8):
                total += numbers[8 * lane + j]
            off[64 * pair + 48 + 4 * half + lane] = 12 * total
            factors[64 * pair + 56 + 4 * half + lane] = np.float32(1.0 / up) if finite else np.float32(np.nan)
