"""The product of one bfloat16 row with one activation vector: attention projections and the unembedding in decoding.

torch's own reads a row at about half the speed of memory; two thirds of a decoding step are these rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """For any processor. See ``dot_words``."""
    def words(here: Any) -> list[Any]:
        return [e.load(vector(I32, 8), e.after(here, 32 * part)) for part in (0, 1)]

    return dot_words(e, rows, x, steps, 64, words)


def dot_words(e: Emit, rows: Rows, x: Any, steps: Any, step_bytes: int, words: Callable[[Any], list[Any]]) -> list[Any]:
    """Two neighbours share 32 bits, and each is a float32 once the other is shifted or masked away.

    Args:
        x: float32, in every 32 the even ones first (``prepare.as_floats``).
        steps: length / 32.
        step_bytes: what 32 values take in a row.
        words: their address -> two <8 x i32>, pairs of neighbours, the even one below.

    Returns:
        A float32 for each row.
    """
    b, floats = e.b, vector(F32, 8)

    def step(i: Any, totals: list[Any]) -> list[Any]:
        activations, found = e.at(x, i, 128), []
        for row, total in zip(rows, totals):
            here, mine = e.at(row, i, step_bytes), e.again(activations)
            e.prefetch(e.after(here, AHEAD))
            for part, both in enumerate(words(here)):
                even = b.bitcast(b.shl(both, e.fill(both.type, 16)), floats)
                odd = b.bitcast(b.and_(both, e.fill(both.type, 0xFFFF0000)), floats)
                total = e.fma(even, e.load(floats, e.after(mine, 32 * part)), total)
                total = e.fma(odd, e.load(floats, e.after(mine, 64 + 32 * part)), total)
            found.append(total)
        return found

    return [e.total(total) for total in e.loop(e.number(0), steps, 1, [e.fill(floats, 0.0)] * len(rows), step)]
