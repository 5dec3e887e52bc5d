"""The product of one MXFP4 row with one bfloat16 activation vector, for avx512_bf16.

``vpermw`` looks up 32 codes at a time as bfloat16, ``vdpbf16ps`` multiplies 32 pairs and adds them in float32. The low
four bits of all bytes are even elements, the high ones odd elements, so the activations come as even and odd ones
(``prepare.as_pairs``) and nothing has to be interleaved. The scale multiplies the sum of a block.
"""

from __future__ import annotations

from typing import Any

from gptoss_kernels.cpu.compiled.emit import BF16, F32, I8, I16, I64, Emit, Rows, vector

DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12)
CODES = [0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40C0, 0x4100, 0x4140]
"""Bits of ``DOUBLED`` in bfloat16."""

PAIR = 128
"""Bytes of prepared activations for two blocks: 32 even ones, then 32 odd ones."""


def look_up(e: Emit, table: Any, index: Any) -> Any:
    """Of 32 words those that the low five bits of each lane name."""
    return e.call("x86.avx512.permvar.hi.512", vector(I16, 32), table, index)


def dot_bf16(e: Emit, total: Any, one: Any, other: Any) -> Any:
    """Adds to each of 16 float32 lanes the products of its two bfloat16 pairs. Operands as 32 words of bits."""
    one, other = (e.b.bitcast(side, vector(BF16, 32)) for side in (one, other))
    return e.call("x86.avx512bf16.dpbf16ps.512", vector(F32, 16), total, one, other)


def dot(e: Emit, rows: Rows, x: Any, powers: Any, count: Any) -> list[Any]:
    """Addresses of rows' blocks and scale bytes, of prepared activations and of the table of powers -> a float32 each.
    """
    b = e.b
    bytes32, words, floats = vector(I8, 32), vector(I16, 32), vector(F32, 16)
    table = e.lanes(words, [*CODES, *(code | 0x8000 for code in CODES)] * 2)

    def both(codes: Any, power: Any, activations: Any, total: Any) -> Any:
        """Two blocks at a time, one in each half of the register. The fifth bit of an index finds the same table."""
        low = b.zext(codes, words)
        sums = dot_bf16(e, e.fill(floats, 0.0), look_up(e, table, low), e.load(words, activations))
        high = look_up(e, table, b.lshr(low, e.fill(words, 4)))
        return e.fma(dot_bf16(e, sums, high, e.load(words, e.after(activations, 64))), power, total)

    def power(scales: Any, index: Any) -> Any:
        scale = b.zext(e.load(I8, b.add(scales, index)), I64)
        return e.splat(e.load(F32, e.at(powers, scale, 16)), 8)

    def pair(i: Any, totals: list[Any]) -> list[Any]:
        first = b.mul(i, e.number(2))
        return [both(e.load(bytes32, e.at(blocks, i, 32)),
                     e.pick(power(scales, first), power(scales, e.after(first, 1)), range(16)), e.at(x, i, PAIR), total)
                for (blocks, scales), total in zip(rows, totals)]

    def last(_: Any, totals: list[Any]) -> list[Any]:
        """One block that has no partner: the other half counts nothing."""
        found = []
        for (blocks, scales), total in zip(rows, totals):
            half = e.load(vector(I8, 16), e.at(blocks, pairs, 32))
            codes = e.pick(half, e.fill(vector(I8, 16), 0), range(32))
            one = e.pick(power(scales, b.mul(pairs, e.number(2))), e.fill(vector(F32, 8), 0.0), range(16))
            found.append(both(codes, one, e.at(x, pairs, PAIR), total))
        return found

    pairs = b.lshr(count, e.number(1))
    totals = e.loop(e.number(0), pairs, 1, [e.fill(floats, 0.0)] * len(rows), pair)
    return [e.total(total) for total in e.loop(e.number(0), b.and_(count, e.number(1)), 1, totals, last)]
