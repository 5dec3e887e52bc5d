"""A few words of LLVM IR, so that the kernels beside this file read as arithmetic.

Vectors are written for the compiler behind numba (llvmlite). Addresses are 64-bit integers: a kernel walks over bytes
of a checkpoint that lie wherever the file put them, so every load and store is unaligned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


class BFloat(ir.types.Type):
    """LLVM's ``bfloat``, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


BF16 = BFloat()


Rows = Sequence[tuple[Any, Any]]
"""Addresses of the blocks and of the scale bytes of the packed rows that are read at the same time."""


def vector(of: ir.Type, lanes: int) -> ir.VectorType:
    return ir.VectorType(of, lanes)


class Emit:
    """Appends instructions to a function under construction."""

    def __init__(self, builder: Any) -> None:
        self.b = builder

    def number(self, value: int) -> Any:
        """A 64-bit constant."""
        return ir.Constant(I64, value)

    def fill(self, kind: ir.VectorType, value: float) -> Any:
        """The same constant in every lane."""
        return ir.Constant(kind, [value] * kind.count)

    def lanes(self, kind: ir.VectorType, values: Sequence[float]) -> Any:
        return ir.Constant(kind, list(values))

    def at(self, base: Any, index: Any, step: int) -> Any:
        """base + index * step."""
        return self.b.add(base, self.b.mul(index, self.number(step)))

    def after(self, base: Any, offset: int) -> Any:
        return self.b.add(base, self.number(offset))

    def load(self, kind: ir.Type, address: Any) -> Any:
        found = self.b.load(self.b.inttoptr(address, kind.as_pointer()))
        found.align = 1
        return found

    def store(self, value: Any, address: Any) -> None:
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer())).align = 1

    def prefetch(self, address: Any) -> None:
        """Ask for a line of memory that will be needed soon. Any address will do."""
        flags = [ir.Constant(I32, value) for value in (0, 3, 1)]  # to read, to keep, data
        self.call("prefetch.p0", ir.VoidType(), self.b.inttoptr(address, I8.as_pointer()), *flags)

    def call(self, name: str, result: ir.Type, *args: Any) -> Any:
        """Call a function of LLVM by its full name, ``llvm.`` left out."""
        module, name = self.b.module, f"llvm.{name}"
        function = module.globals.get(name) or ir.Function(
            module, ir.FunctionType(result, [arg.type for arg in args]), name)
        return self.b.call(function, args)

    def fma(self, one: Any, other: Any, added: Any) -> Any:
        return self.call(f"fma.v{one.type.count}f32", one.type, one, other, added)

    def total(self, values: Any) -> Any:
        """The sum of all lanes, in an order that the compiler may choose."""
        name, kind = f"llvm.vector.reduce.fadd.v{values.type.count}f32", values.type
        module = self.b.module
        function = module.globals.get(name) or ir.Function(module, ir.FunctionType(F32, [F32, kind]), name)
        return self.b.call(function, [ir.Constant(F32, 0.0), values], fastmath=("reassoc",))

    def pick(self, one: Any, other: Any, lanes: Sequence[int]) -> Any:
        """Lanes of two vectors laid end to end, chosen by number."""
        return self.b.shuffle_vector(one, other, ir.Constant(vector(I32, len(lanes)), list(lanes)))

    def splat(self, scalar: Any, lanes: int) -> Any:
        kind = vector(scalar.type, lanes)
        first = self.b.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
        return self.pick(first, first, [0] * lanes)

    def loop(self, start: Any, stop: Any, step: int, carried: Sequence[Any],
             body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
        """``for i in range(start, stop, step)``: body(i, values) gives the values of the next round; -> the last ones.

        Rounds that would reach past ``stop`` are left out, so the caller deals with the rest.
        """
        b = self.b
        before = b.block
        head, inside, done = (b.append_basic_block(name) for name in ("head", "inside", "done"))
        b.branch(head)
        b.position_at_end(head)
        i = b.phi(I64)
        values = [b.phi(value.type) for value in carried]
        i.add_incoming(start, before)
        for value, first in zip(values, carried):
            value.add_incoming(first, before)
        b.cbranch(b.icmp_signed("<=", b.add(i, self.number(step)), stop), inside, done)
        b.position_at_end(inside)
        nexts = body(i, list(values))
        after = b.block
        i.add_incoming(b.add(i, self.number(step)), after)
        for value, following in zip(values, nexts):
            value.add_incoming(following, after)
        b.branch(head)
        b.position_at_end(done)
        return list(values)

    def again(self, address: Any) -> Any:
        """The same address, which the compiler takes for another: what lies there is loaded again, by the instruction
        that needs it, instead of being kept in registers that are not there."""
        code = ir.InlineAsm(ir.FunctionType(I64, [I64]), "", "=r,0", side_effect=False)
        return self.b.call(code, [address])

    def either(self, condition: Any, yes: Callable[[], list[Any]], no: Callable[[], list[Any]]) -> list[Any]:
        """The values that one of two pieces of code gives; the other one is jumped over."""
        b = self.b
        given: list[tuple[Any, list[Any]]] = []
        with b.if_else(condition) as sides:
            for side, code in zip(sides, (yes, no)):
                with side:
                    values = code()
                    given.append((b.block, values))
        found = [b.phi(value.type) for value in given[0][1]]
        for block, values in given:
            for phi, value in zip(found, values):
                phi.add_incoming(value, block)
        return found
