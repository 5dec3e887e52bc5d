"""The product of one MXFP4 row with one activation vector in small integers, for AVX2.

AVX2 has no conversion from four bits to floats, but it multiplies 32 pairs of bytes at a time (``vpmaddubsw``). So the
activations become integers too: in each block of 32 they are written as multiples of one power of two, with 23 bits
and a sign, and these as three digits of a byte each (``prepare.as_digits``). A code, doubled, is an integer from -12 to
12; ``vpshufb`` looks it up with 12 added, because the instruction wants one side unsigned, and 12 times the sum of the
activations is taken off again, which no row has to compute. Integer sums are exact; the sum of eight products then
becomes a float, is scaled, and added up in float32.

An activation is off by at most 2 ** -23 of the largest in its block, about what rounding that one to float32 costs;
bfloat16 activations down to 2 ** -14 of the largest are exact. Those down to 2 ** -8 need no lowest digit: in about two
of three pairs of blocks (normally distributed ones) it is zero everywhere, and a fifth of the work is jumped over.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from gptoss_kernels.cpu.compiled.emit import F32, I8, I16, I32, I64, Emit, Rows, vector

I256 = ir.IntType(256)

OFFSET = 12
CODES = [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0]

AHEAD = 2048
"""Bytes between what is read and what is asked for: the processor's own guesses come late (15 % measured, Zen 3)."""

PAIR = 256
"""Bytes of prepared activations for two blocks: three digits of the even ones (32 bytes each, the lowest first) and of
the odd ones, then eight int32 to take off and eight float32 factors."""


def dot(e: Emit, rows: Rows, x: Any, powers: Any, count: Any) -> list[Any]:
    """Addresses of rows' blocks and scale bytes, of prepared activations and of the table of powers -> a float32 each.
    """
    b = e.b
    bytes32, words16, words8, floats8 = vector(I8, 32), vector(I16, 16), vector(I32, 8), vector(F32, 8)
    table = e.lanes(bytes32, CODES * 2)

    def both(codes: Any, power: Any, digits: Any, total: Any, lowest: int) -> Any:
        """Two blocks at a time, one in each half of the register, with the digits from ``lowest`` on."""
        sides = [e.call("x86.avx2.pshuf.b", bytes32, table, side)
                 for side in (b.and_(codes, e.fill(bytes32, 15)), b.lshr(codes, e.fill(bytes32, 4)))]

        def sums(digit: int, weight: int) -> Any:
            even, odd = (e.call("x86.avx2.pmadd.ub.sw", words16, side,
                                e.load(bytes32, e.after(digits, 96 * which + 32 * digit)))
                         for which, side in enumerate(sides))
            return e.call("x86.avx2.pmadd.wd", words8, b.add(even, odd), e.fill(words16, weight))

        # the widest factor of the instruction is 32767, so the highest digit is shifted
        exact = b.add(sums(1, 256), b.shl(sums(2, 1), e.fill(words8, 16)))  # below 2 ** 31
        if lowest == 0:
            exact = b.add(exact, sums(0, 1))
        exact = b.sub(exact, e.load(words8, e.after(digits, 192)))
        return e.fma(b.fmul(b.sitofp(exact, floats8), e.load(floats8, e.after(digits, 224))), power, total)

    def power(scales: Any, index: Any) -> Any:
        scale = b.zext(e.load(I8, b.add(scales, index)), I64)
        return e.load(vector(F32, 4), e.at(powers, scale, 16))

    def pair(i: Any, totals: list[Any]) -> list[Any]:
        first, digits = b.mul(i, e.number(2)), e.at(x, i, PAIR)

        def each(lowest: int) -> list[Any]:
            found = []
            for (blocks, scales), total in zip(rows, totals):
                here = e.at(blocks, i, 32)
                e.prefetch(e.after(here, AHEAD))
                two = e.pick(power(scales, first), power(scales, e.after(first, 1)), range(8))
                found.append(both(e.load(bytes32, here), two, e.again(digits), total, lowest))
            return found

        low = b.bitcast(b.or_(e.load(bytes32, digits), e.load(bytes32, e.after(digits, 96))), I256)
        return e.either(b.icmp_unsigned("==", low, ir.Constant(I256, 0)), lambda: each(1), lambda: each(0))

    def last(_: Any, totals: list[Any]) -> list[Any]:
        """One block that has no partner: the other half counts nothing."""
        found = []
        for (blocks, scales), total in zip(rows, totals):
            half = e.load(vector(I8, 16), e.at(blocks, pairs, 32))
            codes = e.pick(half, e.fill(vector(I8, 16), 0), range(32))
            one = e.pick(power(scales, b.mul(pairs, e.number(2))), e.fill(vector(F32, 4), 0.0), range(8))
            found.append(both(codes, one, e.at(x, pairs, PAIR), total, 0))
        return found

    pairs = b.lshr(count, e.number(1))
    totals = e.loop(e.number(0), pairs, 1, [e.fill(floats8, 0.0)] * len(rows), pair)
    return [e.total(total) for total in e.loop(e.number(0), b.and_(count, e.number(1)), 1, totals, last)]
