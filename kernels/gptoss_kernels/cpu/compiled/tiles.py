"""Products of many activations with rows decoded to float32, in tiles that stay in registers.

For processors without bfloat16 instructions, where torch's product of float32 is called once for each stretch of each
expert and all threads wait for each other every time. Here a thread takes a stretch of an expert, decodes it into a
scratch of its own, and multiplies it with all activations of that expert before it takes the next.
"""

from __future__ import annotations

from typing import Any

from gptoss_kernels.cpu.compiled.emit import F32, Emit, vector

LANES = 8
ROWS = 6
"""Rows of a tile; with two vectors of tokens that is 12 sums in 16 registers."""

TOKENS = 16
"""Tokens of a tile, side by side in memory: one panel."""


def product(e: Emit, rows: Any, x: Any, out: Any, length: Any, out_step: Any, count: int) -> None:
    """``count`` rows times a panel of tokens.

    Args:
        rows: address of float32 (count, length).
        x: address of float32 (length, TOKENS).
        out: address of the sums of the first row, float32 (TOKENS,); those of the next row are ``out_step`` bytes on.
        length: elements of a row.
    """
    b, floats = e.b, vector(F32, LANES)
    starts = [b.add(rows, b.mul(length, e.number(4 * row))) for row in range(count)]

    def step(i: Any, sums: list[Any]) -> list[Any]:
        sides = [e.load(floats, e.after(e.at(x, i, 4 * TOKENS), 4 * LANES * side)) for side in (0, 1)]
        nexts = []
        for row, start in enumerate(starts):
            value = e.splat(e.load(F32, e.at(start, i, 4)), LANES)
            nexts += [e.fma(value, sides[side], sums[2 * row + side]) for side in (0, 1)]
        return nexts

    sums = e.loop(e.number(0), length, 1, [e.fill(floats, 0.0)] * (2 * count), step)
    for row in range(count):
        place = b.add(out, b.mul(out_step, e.number(row)))
        for side in (0, 1):
            e.store(sums[2 * row + side], e.after(place, 4 * LANES * side))
