"""The machine code of the CPU kernels, for processors that need not be there."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import reduce
from typing import Any

import pytest

pytest.importorskip("numba")

from llvmlite import binding, ir

from gptoss_kernels.cpu.compiled import dense, digits, floats, pairs, tiles, unpack
from gptoss_kernels.cpu.compiled.emit import F32, I64, Emit
from gptoss_kernels.cpu.compiled.tasks import STREAMS

AVX512 = ("sapphirerapids", "znver4")
ANY = ("haswell", "znver3", "skylake-avx512", *AVX512)


def packed(dot: Callable[..., Any], rows: int = STREAMS) -> tuple[Callable[..., Any], int]:
    """The product of several packed rows, as a function of addresses, and how many of them it takes."""
    def emit(e: Emit, *at: Any) -> Any:
        return together(e, dot(e, list(zip(at[:rows], at[rows:2 * rows])), *at[2 * rows:]))
    return emit, 2 * rows + 3


def plain(dot: Callable[..., Any], rows: int = STREAMS) -> tuple[Callable[..., Any], int]:
    """The same of bfloat16 rows."""
    return lambda e, *at: together(e, dot(e, at[:rows], *at[rows:])), rows + 2


def together(e: Emit, results: list[Any]) -> Any:
    """One number in which all are, so that none is left out."""
    return reduce(e.b.fadd, results)


def assembly(emit: Callable[..., Any], operands: int, processor: str, triple: str = "x86_64-unknown-linux-gnu") -> str:
    """The assembly of a function of so many addresses or numbers, compiled as numba compiles: LLVM, -O3."""
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(F32, [I64] * operands), "row")
    builder = ir.IRBuilder(function.append_basic_block())
    result = emit(Emit(builder), *function.args)
    builder.ret(ir.Constant(F32, 0.0) if result is None else result)
    machine = binding.Target.from_triple(triple).create_target_machine(cpu=processor, opt=3)
    parsed = binding.parse_assembly(str(module))
    parsed.triple = triple
    parsed.data_layout = str(machine.target_data)
    parsed.verify()
    tuning = binding.create_pipeline_tuning_options(speed_level=3)
    passes = binding.create_pass_builder(machine, tuning)
    passes.getModulePassManager().run(parsed, passes)
    return machine.emit_assembly(parsed)


def work(code: str, mark: str) -> list[str]:
    """The instructions, operands included, of the stretches without a jump that have ``mark``: of what runs once for
    each pair of blocks, not of what deals with a last block that has no partner, which is loaded alone (16 bytes)."""
    stretches: list[list[str]] = [[]]
    for line in code.splitlines():
        if re.match(r"\.?L\w+:", line):
            stretches.append([])
        elif line.startswith("\t") and not line.startswith("\t."):
            stretches[-1].append(line.strip())
    found = [one for one in stretches if count(one, mark) and not any(re.match(HALF, line) for line in one)]
    assert found, f"no {mark} in\n{code}"
    return [line for one in found for line in one]


HALF = r"vmovdqu\t.*\), %xmm|vpmovzxbw\t.*\), %ymm"


def count(loop: list[str], *instructions: str) -> int:
    return sum(one.startswith(instructions) for one in loop)


def spilled(loop: list[str]) -> list[str]:
    """Vectors that go to the stack and come back."""
    return [one for one in loop if "(%rsp)" in one and ("ymm" in one or "zmm" in one)]


@pytest.mark.parametrize("processor", AVX512)
def test_avx512_bf16(processor: str) -> None:
    """Two blocks of a row take two look-ups and two dot products; nothing is spilled."""
    loop = work(assembly(*packed(pairs.dot), processor), "vdpbf16ps")
    assert count(loop, "vpermw") == count(loop, "vdpbf16ps") == 2 * STREAMS
    assert not spilled(loop) and len(loop) <= 22 * STREAMS
    loop = work(assembly(*plain(dense.dot_pairs), processor), "vdpbf16ps")
    assert count(loop, "vdpbf16ps") % STREAMS == 0 and not spilled(loop)
    assert count(work(assembly(unpack.by_words, 5, processor), "vpermw"), "vpermw")


@pytest.mark.parametrize("processor", ANY)
def test_avx2(processor: str) -> None:
    """Two blocks of a row take six products of 32 pairs, four where the lowest digit is left out (how much of the two
    branches is shared, the compiler decides); what is multiplied is not spilled."""
    for rows in (STREAMS, 1):
        loop = work(assembly(*packed(digits.dot, rows), processor), "vpmaddubsw")
        assert 6 * rows <= count(loop, "vpmaddubsw") <= 16 * rows
        assert not spilled(loop) and len(loop) <= 7 * count(loop, "vpmaddubsw")


@pytest.mark.parametrize("processor", ["haswell", "znver3"])
def test_a_tile_stays_in_registers(processor: str) -> None:
    """Six rows and sixteen tokens: twelve sums, one multiplication each, and nothing is spilled."""
    def product(*arguments: Any) -> Any:
        return tiles.product(*arguments, tiles.ROWS)  # type: ignore[call-arg]

    loop = work(assembly(product, 5, processor), "vfmadd")
    products = count(loop, "vfmadd")
    assert products % 12 == 0 and not any("(%rsp)" in one for one in loop)
    assert count(loop, "vbroadcastss") == products // 2


@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3", *ANY])
@pytest.mark.parametrize("emit", [packed(floats.dot), plain(dense.dot_floats)], ids=["experts", "matrices"])
def test_portable_on_x86(processor: str, emit: tuple[Callable[..., Any], int]) -> None:
    code = assembly(*emit, processor)
    if processor != "x86-64":  # the oldest processors have no fused multiply-add; LLVM calls a function for it
        assert "call" not in code and "vfmadd" in code


@pytest.mark.parametrize("emit", [packed(floats.dot), plain(dense.dot_floats)], ids=["experts", "matrices"])
def test_portable_on_arm(emit: tuple[Callable[..., Any], int]) -> None:
    try:
        binding.initialize_all_targets()
        binding.Target.from_triple("aarch64-unknown-linux-gnu")
    except RuntimeError:
        pytest.skip("this llvmlite compiles for x86 only")
    code = assembly(*emit, "generic", "aarch64-unknown-linux-gnu")
    assert "fmla" in code and "\tbl\t" not in code
