"""The two instructions of the avx512_bf16 kernels in plain LLVM IR, so that the rest of them runs on any processor.

Written from Intel's description of ``vpermw`` and ``vdpbf16ps``. The products of a pair are added to the sum one after
the other, each rounded; denormal inputs, which the instruction takes for zero, are kept.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from gptoss_kernels.cpu.compiled.emit import F32, I16, I32, Emit, vector


class Emulated(Emit):
    """Emit, with those two instructions spelled out."""

    def call(self, name: str, result: ir.Type, *args: Any) -> Any:
        if name == "x86.avx512.permvar.hi.512":
            return self._look_up(*args)
        if name == "x86.avx512bf16.dpbf16ps.512":
            return self._dot(*args)
        return super().call(name, result, *args)

    def _look_up(self, table: Any, index: Any) -> Any:
        found = ir.Constant(vector(I16, 32), ir.Undefined)
        for lane in range(32):
            place = ir.Constant(I32, lane)
            where = self.b.and_(self.b.extract_element(index, place), ir.Constant(I16, 31))
            found = self.b.insert_element(found, self.b.extract_element(table, where), place)
        return found

    def _dot(self, total: Any, one: Any, other: Any) -> Any:
        words, floats = vector(I32, 16), vector(F32, 16)
        one, other = self.b.bitcast(one, words), self.b.bitcast(other, words)

        def low(side: Any) -> Any:
            return self.b.bitcast(self.b.shl(side, self.fill(words, 16)), floats)

        def high(side: Any) -> Any:
            return self.b.bitcast(self.b.and_(side, self.fill(words, 0xFFFF0000)), floats)

        return self.fma(low(one), low(other), self.fma(high(one), high(other), total))
