"""The row kernels as numba functions, one of several ways each, chosen when they are compiled.

A way is a number that is constant where the function is called, so numba compiles that way alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from numba import extending, types

from gptoss_kernels.cpu.compiled import dense, digits, floats, pairs, tiles, unpack
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
def mxfp4_dot(typing: Any, way: Any, blocks: Any, scales: Any, x: Any, powers: Any, count: Any) -> Any:
    """Addresses of a row's blocks and scale bytes, of prepared activations, of the powers; blocks in it -> float32."""
    emit = PRODUCTS[way.literal_value]

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit(Emit(builder), *args[1:])
    return types.float32(way, *[types.int64] * 5), code


@intrinsic(prefer_literal=True)
def dense_dot(typing: Any, way: Any, row: Any, x: Any, steps: Any) -> Any:
    """Addresses of a bfloat16 row and of prepared activations; their length / 32 -> float32."""
    emit = DENSE[way.literal_value]

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit(Emit(builder), *args[1:])
    return types.float32(way, *[types.int64] * 3), code


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
