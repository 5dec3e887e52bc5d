"""The machine code of the CPU kernels, for processors that need not be there."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("numba")

from llvmlite import binding, ir

from gptoss_kernels.cpu.compiled import dense, digits, floats, pairs, tiles, unpack
from gptoss_kernels.cpu.compiled.emit import F32, I64, Emit

AVX512 = ("sapphirerapids", "znver4")
ANY = ("haswell", "znver3", "skylake-avx512", *AVX512)


def assembly(emit: Callable[..., Any], operands: int, processor: str, triple: str = "x86_64-unknown-linux-gnu") -> str:
    """The assembly of one row kernel, compiled as numba compiles: LLVM, -O3."""
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


def inner_loop(code: str, mark: str) -> list[str]:
    """The instructions, operands included, of the largest loop without another in it that has ``mark``."""
    lines = code.splitlines()
    labels = {line.split(":")[0]: number for number, line in enumerate(lines) if re.match(r"\.?L\w+:", line)}
    loops = []
    for number, line in enumerate(lines):
        jump = re.match(r"\s+j\w+\s+(\.L\w+)", line)
        if jump and labels.get(jump[1], number) < number:
            body = lines[labels[jump[1]] + 1 : number + 1]
            if any(mark in one for one in body) and not any(re.match(r"\.L", one) for one in body):
                loops.append(body)
    assert loops, f"no loop with {mark} in\n{code}"
    return [one.strip() for one in max(loops, key=len) if one.startswith("\t") and not one.startswith("\t.")]


@pytest.mark.parametrize("processor", AVX512)
def test_avx512_bf16(processor: str) -> None:
    """Two blocks take two look-ups and two dot products; nothing is spilled."""
    loop = inner_loop(assembly(pairs.dot, 5, processor), "vdpbf16ps")
    looked = sum(one.startswith("vpermw") for one in loop)
    assert looked == sum(one.startswith("vdpbf16ps") for one in loop) == 4  # the loop is unrolled by two
    assert not any("(%rsp)" in one for one in loop)
    assert len(loop) <= 60
    loop = inner_loop(assembly(dense.dot_pairs, 3, processor), "vdpbf16ps")
    assert sum(one.startswith("vdpbf16ps") for one in loop) in (1, 4) and not any("(%rsp)" in one for one in loop)
    assert "vpermw" in "".join(inner_loop(assembly(unpack.by_words, 5, processor), "vpermw"))


@pytest.mark.parametrize("processor", ANY)
def test_avx2(processor: str) -> None:
    """Two blocks in at most 40 instructions, six of them products of 32 pairs; nothing is spilled."""
    loop = inner_loop(assembly(digits.dot, 5, processor), "vpmaddubsw")
    assert sum(one.startswith("vpmaddubsw") for one in loop) == 6
    assert sum(one.startswith("vpshufb") for one in loop) == 2
    assert not any("(%rsp)" in one for one in loop)
    assert len(loop) <= 40


@pytest.mark.parametrize("processor", ["haswell", "znver3"])
def test_a_tile_stays_in_registers(processor: str) -> None:
    """Six rows and sixteen tokens: twelve sums, one multiplication each, and nothing is spilled."""
    def product(*arguments: Any) -> Any:
        return tiles.product(*arguments, tiles.ROWS)  # type: ignore[call-arg]

    loop = inner_loop(assembly(product, 5, processor), "vfmadd")
    products = sum(one.startswith("vfmadd") for one in loop)
    assert products % 12 == 0 and not any("(%rsp)" in one for one in loop)
    assert sum(one.startswith("vbroadcastss") for one in loop) == products // 2


@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3", *ANY])
@pytest.mark.parametrize("emit", [floats.dot, dense.dot_floats], ids=["experts", "matrices"])
def test_portable_on_x86(processor: str, emit: Callable[..., Any]) -> None:
    code = assembly(emit, 5 if emit is floats.dot else 3, processor)
    if processor != "x86-64":  # the oldest processors have no fused multiply-add; LLVM calls a function for it
        assert "call" not in code and "vfmadd" in code


@pytest.mark.parametrize("emit", [floats.dot, dense.dot_floats], ids=["experts", "matrices"])
def test_portable_on_arm(emit: Callable[..., Any]) -> None:
    try:
        binding.initialize_all_targets()
        binding.Target.from_triple("aarch64-unknown-linux-gnu")
    except RuntimeError:
        pytest.skip("this llvmlite compiles for x86 only")
    code = assembly(emit, 5 if emit is floats.dot else 3, "generic", "aarch64-unknown-linux-gnu")
    assert "fmla" in code and "\tbl\t" not in code
