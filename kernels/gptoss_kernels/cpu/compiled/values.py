"""Numbers at an address, float32 or bfloat16 as a flag says: read, rounded and written. All arithmetic is float32."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from gptoss_kernels.cpu.compiled.machine import address, bits_of, float_of

carray: Any = numba.carray  # type: ignore[attr-defined]


@numba.njit(inline="always")
def rounded(x):
    """float32 -> bits of the nearest bfloat16, ties to even."""
    bits = bits_of(x)
    if x != x:
        return np.uint16(0x7FC0)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


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
