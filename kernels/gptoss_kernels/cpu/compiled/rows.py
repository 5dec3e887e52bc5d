"""The row kernels as numba functions, one of several ways each, chosen when they are compiled.

A way is a number that is constant where the function is called, so numba compiles that way alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from numba import extending, types

from gptoss_kernels.cpu.compiled import dense, digits, floats, packed, pairs, tiles, unpack
from gptoss_kernels.cpu.compiled.emit import Emit

intrinsic: Any = extending.intrinsic

PAIRS, DIGITS, FLOATS, DENSE_FLOATS = 0, 1, 2, 20

PRODUCTS: Mapping[int, Callable[..., Any]] = {PAIRS: pairs.dot, DIGITS: digits.dot, FLOATS: floats.dot}
DENSE: Mapping[int, Callable[..., Any]] = {PAIRS: dense.dot_pairs, FLOATS: dense.dot_floats}
UNPACK: Mapping[int, Callable[..., Any]] = {
    PAIRS: unpack.by_words,
    DIGITS: lambda *args: unpack.by_bytes(*args, to_float32=False),
    DIGITS + 10: lambda *args: unpack.by_bytes(*args, to_float32=True),
    FLOATS: lambda *args: unpack.by_arithmetic(*args, to_float32=False),
    FLOATS + 10: lambda *args: unpack.by_arithmetic(*args, to_float32=True),
    DENSE_FLOATS: unpack.widen,
}
"""Ten more than the way means: to float32 instead of bfloat16. The last one is for rows that are not packed."""


@intrinsic(prefer_literal=True)
def mxfp4_dots(typing: Any, way: Any, number: Any, blocks: Any, scales: Any, apart: Any, x: Any, powers: Any,
               count: Any) -> Any:
    """Products of a literal number of packed rows with one vector -> that many float32.

    Args:
        blocks, scales: addresses of the first row's blocks and scale bytes.
        apart: how many rows on the next one is.
        x, powers: addresses of prepared activations and of the powers.
        count: blocks in a row.
    """
    emit, rows = PRODUCTS[way.literal_value], number.literal_value

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, _, blocks, scales, apart, x, powers, count = args
        e = Emit(builder)
        step = builder.mul(apart, count)
        places = [(e.at(blocks, builder.mul(step, e.number(row)), 16), e.at(scales, step, row)) for row in range(rows)]
        return context.make_tuple(builder, signature.return_type, emit(e, places, x, powers, count))
    return types.UniTuple(types.float32, rows)(way, number, *[types.int64] * 6), code


@intrinsic(prefer_literal=True)
def dense_dots(typing: Any, way: Any, number: Any, row: Any, apart: Any, x: Any, steps: Any) -> Any:
    """Products of a literal number of bfloat16 rows with one vector -> that many float32.

    Args:
        row: address of the first row.
        apart: how many rows on the next one is.
        x: address of prepared activations.
        steps: their length / 32.
    """
    emit, rows = DENSE[way.literal_value], number.literal_value

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, _, row, apart, x, steps = args
        e = Emit(builder)
        step = builder.mul(apart, steps)
        places = [e.at(row, step, 64 * which) for which in range(rows)]
        return context.make_tuple(builder, signature.return_type, emit(e, places, x, steps))
    return types.UniTuple(types.float32, rows)(way, number, *[types.int64] * 4), code


@intrinsic(prefer_literal=True)
def packed_dots(typing: Any, number: Any, row: Any, apart: Any, x: Any, table: Any, steps: Any) -> Any:
    """As ``dense_dots``, of rows packed to 12 bits a value; ``table`` is the address that ``packed.dot`` wants."""
    rows = number.literal_value

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, row, apart, x, table, steps = args
        e = Emit(builder)
        step = builder.mul(apart, steps)
        places = [e.at(row, step, packed.RECORD * which) for which in range(rows)]
        return context.make_tuple(builder, signature.return_type, packed.dot(e, places, x, table, steps))
    return types.UniTuple(types.float32, rows)(number, *[types.int64] * 5), code


@intrinsic(prefer_literal=True)
def mxfp4_unpack(typing: Any, way: Any, blocks: Any, scales: Any, out: Any, tables: Any, count: Any) -> Any:
    """Addresses of a row's blocks and scale bytes, of its place in the scratch, of the tables; blocks in it."""
    emit = UNPACK[way.literal_value]

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit(Emit(builder), *args[1:])
        return context.get_dummy_value()
    return types.void(way, *[types.int64] * 5), code


@intrinsic(prefer_literal=True)
def tile(typing: Any, count: Any, rows: Any, x: Any, out: Any, length: Any, out_step: Any) -> Any:
    """``tiles.product`` of a literal number of rows."""
    number = count.literal_value

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, rows, x, out, length, out_step = args
        tiles.product(Emit(builder), rows, x, out, length, out_step, number)
        return context.get_dummy_value()
    return types.void(count, *[types.int64] * 5), code
