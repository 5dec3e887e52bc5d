"""The product of one bfloat16 row with one activation vector: attention projections and the unembedding in decoding.

torch's own reads a row at about half the speed of memory; two thirds of a decoding step are these rows.
"""

from __future__ import annotations

from typing import Any

from gptoss_kernels.cpu.compiled.emit import F32, I16, I32, Emit, vector
from gptoss_kernels.cpu.compiled.pairs import dot_bf16

AHEAD = 1024
"""Bytes between what is read and what is asked for; see ``digits``."""

LANES = 32
"""The rows' length must be a multiple of this."""


def dot_pairs(e: Emit, row: Any, x: Any, steps: Any) -> Any:
    """For avx512_bf16. x: bfloat16 as it is. ``steps`` = length / 32 -> float32."""
    words = vector(I16, 32)

    def step(i: Any, total: Any) -> Any:
        return dot_bf16(e, total, e.load(words, e.at(row, i, 64)), e.load(words, e.at(x, i, 64)))

    return e.total(e.sums(steps, e.fill(vector(F32, 16), 0.0), 4, step))


def dot_floats(e: Emit, row: Any, x: Any, steps: Any) -> Any:
    """For any processor: two neighbours share 32 bits, and each is a float32 once the other is shifted or masked away.

    x: float32, in every 32 the even ones first (``prepare.as_floats``). ``steps`` = length / 32 -> float32.
    """
    b, words, floats = e.b, vector(I32, 16), vector(F32, 16)

    def step(i: Any, total: Any) -> Any:
        here, activations = e.at(row, i, 64), e.at(x, i, 128)
        e.prefetch(e.after(here, AHEAD))
        both = e.load(words, here)
        even = b.bitcast(b.shl(both, e.fill(words, 16)), floats)
        odd = b.bitcast(b.and_(both, e.fill(words, 0xFFFF0000)), floats)
        total = e.fma(even, e.load(floats, activations), total)
        return e.fma(odd, e.load(floats, e.after(activations, 64)), total)

    return e.total(e.sums(steps, e.fill(floats, 0.0), 2, step))
