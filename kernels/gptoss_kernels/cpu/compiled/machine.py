"""What numba's Python has no words for: an address as an array, a float's bits, and a counter that threads share."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import extending, types

intrinsic: Any = extending.intrinsic


@intrinsic
def address(typing: Any, number: Any) -> Any:
    """An integer as a pointer, for ``numba.carray``."""
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())
    return types.voidptr(types.int64), code


@intrinsic
def bits_of(typing: Any, number: Any) -> Any:
    """float32 -> the same 32 bits as uint32."""
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))
    return types.uint32(types.float32), code


@intrinsic
def float_of(typing: Any, bits: Any) -> Any:
    """uint32 -> the float32 with these bits."""
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())
    return types.float32(types.uint32), code


@intrinsic
def take(typing: Any, counter: Any) -> Any:
    """The number at an address, which becomes larger by one: no two threads get the same."""
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(ir.IntType(64), 1), "acq_rel")
    return types.int64(types.int64), code


@intrinsic
def raised(typing: Any, counter: Any, by: Any) -> Any:
    """The number at an address before it becomes larger by ``by``, in an order that all threads agree on."""
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, args[1], "seq_cst")
    return types.int64(types.int64, types.int64), code


@intrinsic
def seen_now(typing: Any, counter: Any) -> Any:
    """The number at an address, as other threads have it; what they wrote before it is seen too."""
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(args[0], ir.IntType(64).as_pointer()), "seq_cst", 8)
    return types.int64(types.int64), code


@intrinsic
def call(typing: Any, function: Any, argument: Any) -> Any:
    """Call the function at an address with an address, for what it does."""
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [builder.inttoptr(args[1], pointer)])
        return context.get_dummy_value()
    return types.void(types.int64, types.int64), code
