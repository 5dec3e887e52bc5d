"""bfloat16 rows packed without loss to 12 bits a value: a quarter fewer bytes to read in decoding.

The upper byte of a bfloat16 is its sign and all of the exponent but its last bit, and a trained matrix has few of them.
So a value is its lower byte as it is, and four bits that choose one of 16 upper bytes. The few values with another one,
the escapes, stand in a list and count nothing in the row.

Thirty-two values are 48 bytes: 32 lower ones, then 16 of codes. The code bytes' low halves belong to the first 16
values, the high halves to the others. The values stand in the order of ``ORDER``, in which AVX2, which mixes bytes only
within halves of a register, puts them in the places of ``dense.dot_floats``. So the sums are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gptoss_kernels.cpu.compiled import dense
from gptoss_kernels.cpu.compiled.emit import I8, I32, Emit, vector

RECORD = 48
"""Bytes of 32 values."""

ORDER = (*range(8), *range(16, 24), *range(8, 16), *range(24, 32))
"""Which value of a record stands at each place."""


def widened(e: Emit, record: Any, table: Any) -> list[Any]:
    """The 32 values of a record as 16 pairs of bfloat16, two <8 x i32>: what lies in a row that is not packed.

    Args:
        record: address.
        table: address of the 16 upper bytes, twice.
    """
    b, bytes32 = e.b, vector(I8, 32)
    half = e.load(vector(I8, 16), e.after(record, 32))
    codes = e.pick(b.and_(half, e.fill(half.type, 15)), b.lshr(half, e.fill(half.type, 4)), range(32))
    upper, lower = e.call("x86.avx2.pshuf.b", bytes32, e.load(bytes32, table), codes), e.load(bytes32, record)
    parts = []
    for start in (0, 8):
        places = [half + start + lane for half in (0, 16) for lane in range(8)]
        both = e.pick(lower, upper, [lane for place in places for lane in (place, 32 + place)])
        parts.append(b.bitcast(both, vector(I32, 8)))
    return parts


def dot(e: Emit, rows: Sequence[Any], x: Any, table: Any, steps: Any) -> list[Any]:
    """Addresses of packed rows, of activations as ``dense.dot_floats`` wants them and of the table -> a float32 each.
    """
    return dense.dot_words(e, rows, x, steps, RECORD, lambda record: widened(e, record, table))
