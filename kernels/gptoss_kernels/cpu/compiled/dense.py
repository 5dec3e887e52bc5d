"""The product of one bfloat16 row with one activation vector: attention projections and the unembedding in decoding.

torch's own reads a row at about half the speed of memory; two thirds of a decoding step are these rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gptoss_kernels.cpu.compiled.emit import F32, I16, I32, Emit, vector
from gptoss_kernels.cpu.compiled.pairs import dot_bf16

AHEAD = 1024
"""Bytes between what is read and what is asked for; see ``digits``."""

Rows = Sequence[Any]
"""Addresses of the rows that are read at the same time."""

LANES = 32
"""The rows' length must be a multiple of this."""


def dot_pairs(e: Emit, rows: Rows, x: Any, steps: Any) -> list[Any]:
    """For avx512_bf16. x: bfloat16 as it is. ``steps`` = length / 32 -> a float32 for each row."""
    words = vector(I16, 32)

    def step(i: Any, totals: list[Any]) -> list[Any]:
        activations = e.load(words, e.at(x, i, 64))
        found = []
        for row, total in zip(rows, totals):
            here = e.at(row, i, 64)
            e.prefetch(e.after(here, AHEAD))
            found.append(dot_bf16(e, total, e.load(words, here), activations))
        return found

    totals = e.loop(e.number(0), steps, 1, [e.fill(vector(F32, 16), 0.0)] * len(rows), step)
    return [e.total(total) for total in totals]


def dot_floats(e: Emit, rows: Rows, x: Any, steps: Any) -> list[Any]:
    """For any processor: two neighbours share 32 bits, and each is a float32 once the other is shifted or masked away.

    x: float32, in every 32 the even ones first (``prepare.as_floats``). ``steps`` = length / 32 -> a float32 for each
    row.
    """
    b, words, floats = e.b, vector(I32, 16), vector(F32, 16)

    def step(i: Any, totals: list[Any]) -> list[Any]:
        activations = e.at(x, i, 128)
        evens, odds = e.load(floats, activations), e.load(floats, e.after(activations, 64))
        found = []
        for row, total in zip(rows, totals):
            here = e.at(row, i, 64)
            e.prefetch(e.after(here, AHEAD))
            both = e.load(words, here)
            even = b.bitcast(b.shl(both, e.fill(words, 16)), floats)
            odd = b.bitcast(b.and_(both, e.fill(words, 0xFFFF0000)), floats)
            found.append(e.fma(odd, odds, e.fma(even, evens, total)))
        return found

    return [e.total(total) for total in e.loop(e.number(0), steps, 1, [e.fill(floats, 0.0)] * len(rows), step)]
