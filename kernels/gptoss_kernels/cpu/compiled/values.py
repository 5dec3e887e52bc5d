"""Numbers at an address, float32 or bfloat16 as a flag says: read, rounded and written. All arithmetic is float32.

Where the flag is a constant of the task, chosen by its way, the compiler has no choice left inside the loops.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from gptoss_kernels.cpu.compiled.machine import address, bits_of, float_of

WIDE = 1
"""The way of float32 in tasks that compute in bfloat16 too."""

carray: Any = numba.carray  # type: ignore[attr-defined]


@numba.njit(inline="always")
def rounded(x):
    """float32 -> bits of the nearest bfloat16, ties to even."""
    bits = bits_of(x)
    near = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.uint16(near if x == x else np.uint32(0x7FC0))  # no jump: loops stay in vectors


@numba.njit(inline="always")
def widened(bits):
    """Bits of a bfloat16 -> float32."""
    return float_of(np.uint32(bits) << np.uint32(16))


@numba.njit(inline="always")
def once(wide, x):
    """What one rounding to the dtype leaves of a float32: all of it where numbers are float32 (``wide``)."""
    return x if wide else widened(rounded(x))


@numba.njit(inline="always")
def load(wide, at, i):
    """The i-th number from an address on."""
    return carray(address(at), (1,), np.float32)[i] if wide else widened(carray(address(at), (1,), np.uint16)[i])


@numba.njit(inline="always")
def store(wide, at, i, x):
    """Write the i-th number from an address on, rounded once."""
    if wide:
        carray(address(at), (1,), np.float32)[i] = x
    else:
        carray(address(at), (1,), np.uint16)[i] = rounded(x)


LOG2_E, LOWEST, HIGHEST = np.float32(1.44269504), np.float32(-87.33), np.float32(88.02)
LN2_UPPER, LN2_LOWER = np.float32(0.693359375), np.float32(-2.12194440e-4)
ONE, HALF = np.float32(1.0), np.float32(0.5)
SERIES = tuple(np.float32(one) for one in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2,
                                           1.6666665459e-1, 5.0000001201e-1))


@numba.njit(inline="always")
def exponential(x):
    """e ** x of a float32, off by at most two units in the last place; 0 where it would be subnormal, infinite from
    2 ** 127 on.

    x = n ln 2 + r, and a polynomial of r (the coefficients of expf in S. Moshier's Cephes library). Only arithmetic
    that the compiler puts into vectors; the one of the C library is called once for each number.
    """
    inside = min(max(x, LOWEST), HIGHEST)
    n = np.floor(inside * LOG2_E + HALF)
    r = inside - n * LN2_UPPER - n * LN2_LOWER
    series = SERIES[0]
    series = series * r + SERIES[1]
    series = series * r + SERIES[2]
    series = series * r + SERIES[3]
    series = series * r + SERIES[4]
    series = series * r + SERIES[5]
    found = (series * r * r + r + ONE) * float_of(np.uint32((np.int32(n) + np.int32(127)) << np.int32(23)))
    found = np.float32(0.0) if x < LOWEST else np.float32(np.inf) if x > HIGHEST else found
    return x if x != x else found
