"""The product of one MXFP4 row with one activation vector in float32, on any processor.

Only vector arithmetic that every target of LLVM has: a code becomes an integer by adding, comparing and selecting, the
integer a float. The activations come as even and odd ones (``prepare.as_floats``), as the codes lie in the bytes.
"""

from __future__ import annotations

from typing import Any

from gptoss_kernels.cpu.compiled.emit import F32, I8, I32, I64, Emit, Rows, vector

BLOCK = 128
"""Bytes of prepared activations for one block: 16 even ones, then 16 odd ones, float32."""


def doubled(e: Emit, codes: Any) -> Any:
    """Codes 0 to 15 in 16 bytes -> twice their values in 16 float32: 0 1 2 3 4 6 8 12 and the negatives."""
    b, kind = e.b, codes.type
    size = b.and_(codes, e.fill(kind, 7))
    more = e.call(f"usub.sat.v{kind.count}i8", kind, size, e.fill(kind, 4))
    largest = b.icmp_unsigned("==", size, e.fill(kind, 7))
    value = b.add(b.add(size, more), b.select(largest, e.fill(kind, 2), e.fill(kind, 0)))
    negative = b.icmp_unsigned(">", codes, e.fill(kind, 7))
    value = b.select(negative, b.sub(e.fill(kind, 0), value), value)
    return b.sitofp(b.sext(value, vector(I32, kind.count)), vector(F32, kind.count))


def dot(e: Emit, rows: Rows, x: Any, powers: Any, count: Any) -> list[Any]:
    """Addresses of rows' blocks and scale bytes, of prepared activations and of the table of powers -> a float32 each.
    """
    b = e.b
    bytes16, floats = vector(I8, 16), vector(F32, 16)

    def step(i: Any, totals: list[Any]) -> list[Any]:
        activations = e.at(x, i, BLOCK)
        evens, odds = e.load(floats, activations), e.load(floats, e.after(activations, 64))
        found = []
        for (blocks, scales), total in zip(rows, totals):
            codes = e.load(bytes16, e.at(blocks, i, 16))
            sums = b.fmul(doubled(e, b.and_(codes, e.fill(bytes16, 15))), evens)
            sums = e.fma(doubled(e, b.lshr(codes, e.fill(bytes16, 4))), odds, sums)
            scale = b.zext(e.load(I8, b.add(scales, i)), I64)
            found.append(e.fma(sums, e.splat(e.load(F32, e.at(powers, scale, 16)), 16), total))
        return found

    return [e.total(total) for total in e.loop(e.number(0), count, 1, [e.fill(floats, 0.0)] * len(rows), step)]
