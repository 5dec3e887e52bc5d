"""Decoding one MXFP4 row into a scratch, for torch to multiply with many activations at once.

Each bit is that of ``gptoss_kernels.mxfp4.dequantize``, at every scale byte.
"""

from __future__ import annotations

from typing import Any

from gptoss_kernels.cpu.compiled.emit import F32, I8, I16, I32, I64, Emit, vector
from gptoss_kernels.cpu.compiled.floats import doubled
from gptoss_kernels.cpu.compiled.pairs import look_up


def by_words(e: Emit, blocks: Any, scales: Any, out: Any, tables: Any, count: Any) -> None:
    """For avx512bw, to bfloat16: ``vpermw`` in a table of the sixteen values at the block's scale."""
    b, words = e.b, vector(I16, 32)

    def one(i: Any, _: list[Any]) -> list[Any]:
        values = e.load(vector(I16, 16), e.at(tables, b.zext(e.load(I8, b.add(scales, i)), I64), 32))
        wide = b.zext(e.load(vector(I8, 16), e.at(blocks, i, 16)), vector(I32, 16))
        # The byte in the lower word, its upper half in the upper one; a fifth bit finds the same table again.
        codes = b.bitcast(b.or_(wide, b.shl(wide, e.fill(wide.type, 12))), words)
        e.store(look_up(e, e.pick(values, values, [*range(16)] * 2), codes), e.at(out, i, 64))
        return []

    e.loop(e.number(0), count, 1, [], one)


def by_bytes(e: Emit, blocks: Any, scales: Any, out: Any, tables: Any, count: Any, to_float32: bool) -> None:
    """For SSSE3 and on: ``pshufb`` in two tables, of the values' upper and lower bytes at the block's scale."""
    b, bytes16 = e.b, vector(I8, 16)

    def one(i: Any, _: list[Any]) -> list[Any]:
        table = e.at(tables, b.zext(e.load(I8, b.add(scales, i)), I64), 32)
        upper, lower = e.load(bytes16, table), e.load(bytes16, e.after(table, 16))
        codes = e.load(bytes16, e.at(blocks, i, 16))
        sides = b.and_(codes, e.fill(bytes16, 15)), b.lshr(codes, e.fill(bytes16, 4))
        for half in (0, 1):
            lanes = [lane for j in range(8 * half, 8 * half + 8) for lane in (j, 16 + j)]
            natural = e.pick(*sides, lanes)
            high, low = (e.call("x86.ssse3.pshuf.b.128", bytes16, part, natural) for part in (upper, lower))
            words = b.bitcast(e.pick(low, high, [lane for j in range(16) for lane in (j, 16 + j)]), vector(I16, 16))
            put(e, words, e.at(out, i, 128 if to_float32 else 64), half, to_float32)
        return []

    e.loop(e.number(0), count, 1, [], one)


def by_arithmetic(e: Emit, blocks: Any, scales: Any, out: Any, powers: Any, count: Any, to_float32: bool) -> None:
    """For any processor. ``powers``: the table of float32 that the row products use too."""
    b, bytes16 = e.b, vector(I8, 16)

    def one(i: Any, _: list[Any]) -> list[Any]:
        power = e.splat(e.load(F32, e.at(powers, b.zext(e.load(I8, b.add(scales, i)), I64), 16)), 16)
        codes = e.load(bytes16, e.at(blocks, i, 16))
        sides = b.and_(codes, e.fill(bytes16, 15)), b.lshr(codes, e.fill(bytes16, 4))
        for half in (0, 1):
            lanes = [lane for j in range(8 * half, 8 * half + 8) for lane in (j, 16 + j)]
            natural = e.pick(*sides, lanes)
            # -0.0 as an integer has lost its sign, so the sign is taken from the code.
            sign = b.shl(b.zext(b.lshr(natural, e.fill(bytes16, 3)), vector(I32, 16)), e.fill(vector(I32, 16), 31))
            size = b.bitcast(b.fmul(doubled(e, b.and_(natural, e.fill(bytes16, 7))), power), vector(I32, 16))
            bits = b.or_(size, sign)
            words = b.trunc(b.lshr(bits, e.fill(bits.type, 16)), vector(I16, 16))
            put(e, words, e.at(out, i, 128 if to_float32 else 64), half, to_float32)
        return []

    e.loop(e.number(0), count, 1, [], one)


def widen(e: Emit, row: Any, _: Any, out: Any, __: Any, count: Any) -> None:
    """A row of bfloat16, 32 values at a time, to float32."""
    def one(i: Any, _: list[Any]) -> list[Any]:
        for half in (0, 1):
            put(e, e.load(vector(I16, 16), e.after(e.at(row, i, 64), 32 * half)), e.at(out, i, 128), half, True)
        return []

    e.loop(e.number(0), count, 1, [], one)


def put(e: Emit, words: Any, block: Any, half: int, to_float32: bool) -> None:
    """Store 16 values, given as bits of bfloat16, into one half of a block."""
    b = e.b
    if to_float32:
        wide = b.shl(b.zext(words, vector(I32, 16)), e.fill(vector(I32, 16), 16))
        e.store(b.bitcast(wide, vector(F32, 16)), e.after(block, 64 * half))
    else:
        e.store(words, e.after(block, 32 * half))
