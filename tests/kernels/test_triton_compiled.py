"""Triton's kernels compiled for GPUs that are not here, at the shapes of gpt-oss, and the machine code read.

A kernel whose registers spill, that reads weights byte by byte or that misses the matrix units is right and useless.
None of that shows in the interpreter; all of it shows in the machine code, for which no GPU is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("triton")

import triton.language as tl

from gptoss_kernels.triton import (
    activation,
    attention_fused,
    attention_pieces,
    attention_spread,
    columns,
    dense,
    expert_matmul,
    expert_matvec,
    norm,
    rope,
    router,
)
from tests.kernels.sass import Code, compile_once

# The published models: width, expert width, experts of the larger one, heads.
WIDTH, INNER, EXPERTS, HEADS, KV_HEADS, SIZE = 2880, 2880, 128, 64, 8, 64
ARCHITECTURES = (80, 90, 100, 120)
BF16, F32, BYTES, WORDS, INDEX, PLAN, COUNT, SCALAR = "*bf16", "*fp32", "*u8", "*i32", "*i64", "*i32", "i32", "fp32"


@dataclass(frozen=True)
class Case:
    """A kernel as its launcher starts it.

    Attributes:
        registers: the most a thread may use, so that enough threads fit to hide the memory's latency.
        load: bits that each thread reads at a time, at least.
        matrix: whether the matrix units do the work.
        stack: bytes of a thread's stack, at most.
        subnormals: whether tiny float32 values must survive, as in decoding MXFP4.
    """

    kernel: Any
    arguments: dict[str, Any]
    warps: int = 4
    registers: int = 128
    load: int = 128
    matrix: bool = False
    stack: int = 0
    subnormals: bool = False

    def compile(self, architecture: int) -> Code:
        return compile_once(self.kernel, tuple(self.arguments.items()), architecture, self.warps)


def experts(height: int, width: int, **more: Any) -> dict[str, Any]:
    packed = dict(x=BF16, experts=INDEX, words=WORDS, scales=BYTES, bias=BF16, out=BF16, HEIGHT=height, WIDTH=width,
                  ROWS=expert_matvec.ROWS, BLOCKS=expert_matvec.BLOCKS)
    return packed | more


def grouped(height: int, width: int, transposed: bool, activate: bool, pairs: int) -> dict[str, Any]:
    return dict(
        x=BF16, order=PLAN, tiles=PLAN, codes=BYTES, scales=BYTES, bias=BF16, out=BF16, HEIGHT=height, WIDTH=width,
        SHARED=4 if activate else 1, TRANSPOSED=transposed, BIASED=not transposed, ACTIVATE=activate, alpha=SCALAR,
        limit=SCALAR, FACTOR=tl.bfloat16, PAIRS=pairs, COLUMNS=expert_matmul.COLUMNS, DEPTH=expert_matmul.DEPTH)


HEADS_OF = dict(KV_HEADS=KV_HEADS, GROUP=HEADS // KV_HEADS, SIZE=SIZE, BLOCK_SIZE=SIZE, FACTOR=tl.bfloat16)


def attend(rows: int, emit: bool) -> dict[str, Any]:
    return dict(q=BF16, k=BF16, v=BF16, sinks=BF16, positions=INDEX, key_positions=INDEX, z=BF16, scores=BF16,
                pattern=BF16, tokens=COUNT, keys=COUNT, window=COUNT, SCALE=SIZE**-0.5, ROWS=rows,
                KEYS=attention_fused.KEYS, EMIT=emit, **HEADS_OF)


CASES = {
    "gate_up and SwiGLU, one token": Case(
        expert_matvec.linear_kernel, experts(2 * INNER, WIDTH, SHARED=4, ACTIVATE=True, alpha=SCALAR, limit=SCALAR),
        expert_matvec.WARPS, subnormals=True),
    "gate_up, one token": Case(
        expert_matvec.linear_kernel, experts(2 * INNER, WIDTH, SHARED=4, ACTIVATE=False, alpha=SCALAR, limit=SCALAR),
        expert_matvec.WARPS, subnormals=True),
    "down and weighted sum, one token": Case(
        expert_matvec.down_kernel,
        {name: value for name, value in experts(WIDTH, INNER, act=BF16, weights=BF16, SLOTS=4,
                                                ROWS=expert_matvec.DOWN_ROWS).items() if name != "x"},
        expert_matvec.DOWN_WARPS, subnormals=True),
    "gate_up and SwiGLU, many tokens": Case(
        expert_matmul.grouped_kernel, grouped(2 * INNER, WIDTH, False, True, 64), expert_matmul.WARPS, 168,
        matrix=True, subnormals=True),
    "gate_up and SwiGLU, some tokens": Case(
        expert_matmul.grouped_kernel, grouped(2 * INNER, WIDTH, False, True, 16), expert_matmul.WARPS, 168,
        matrix=True, subnormals=True),
    "down, many tokens": Case(
        expert_matmul.grouped_kernel, grouped(WIDTH, INNER, False, False, 64), expert_matmul.WARPS, 168,
        matrix=True, subnormals=True),
    "gradient of the experts' input": Case(
        expert_matmul.grouped_kernel, grouped(WIDTH, INNER, True, False, 64), expert_matmul.WARPS, 168,
        matrix=True, subnormals=True),
    "attention of a prompt": Case(attention_fused.attend_kernel, attend(64, False), attention_fused.WARPS, 200,
                                  matrix=True),  # two programs a processor
    "attention of one token": Case(attention_fused.attend_kernel, attend(16, False), attention_fused.WARPS, 168,
                                   matrix=True),
    # It keeps the bits of the one that shows nothing, so its tiles are the same, and there is more to hold.
    "attention that shows its pattern": Case(attention_fused.attend_kernel, attend(64, True), attention_fused.WARPS,
                                             255, matrix=True, stack=256),
    "scores": Case(
        attention_pieces.scores_kernel,
        dict(q=BF16, k=BF16, visible=BYTES, scores=BF16, tokens=COUNT, keys=COUNT, SCALE=SIZE**-0.5, ROWS=16,
             KEYS=attention_pieces.KEYS, **HEADS_OF), registers=168, matrix=True),
    "softmax": Case(
        attention_pieces.softmax_kernel,
        dict(scores=BF16, sinks=BF16, pattern=BF16, tokens=COUNT, keys=COUNT, HEADS=HEADS,
             KEYS=attention_pieces.ROW_KEYS), load=0),  # rows of any length begin anywhere
    "values": Case(
        attention_pieces.values_kernel,
        dict(pattern=BF16, v=BF16, parts=F32, tokens=COUNT, keys=COUNT, part=COUNT, ROWS=16,
             KEYS=attention_pieces.KEYS, **HEADS_OF), registers=168, matrix=True),
    "scores of a part": Case(
        attention_spread.spread_scores_kernel,
        dict(q=BF16, k=BF16, positions=INDEX, key_positions=INDEX, scores=BF16, seen=F32, tokens=COUNT, keys=COUNT,
             window=COUNT, SCALE=SIZE**-0.5, ROWS=16, KEYS=attention_pieces.KEYS, PART=attention_pieces.PART,
             **HEADS_OF), registers=168, matrix=True),
    "values of a part": Case(
        attention_spread.spread_values_kernel,
        dict(scores=BF16, seen=F32, v=BF16, sinks=BF16, positions=INDEX, key_positions=INDEX, parts=F32, pattern=BF16,
             tokens=COUNT, keys=COUNT, window=COUNT, ROWS=16, KEYS=attention_pieces.KEYS, PART=attention_pieces.PART,
             EMIT=False, **HEADS_OF), registers=168, matrix=True),
    "sum of parts": Case(attention_pieces.sum_kernel, dict(parts=F32, z=BF16, count=COUNT, n=COUNT, BLOCK=256), load=0),
    "dense, one token": Case(
        dense.linear_kernel, dict(x=BF16, weight=BF16, bias=BF16, out=BF16, HEIGHT=WIDTH, WIDTH=HEADS * SIZE,
                                  BIASED=True, ROWS=dense.ROWS, DEPTH=dense.DEPTH), dense.WARPS, 168),
    "queries, keys and values, one token": Case(
        dense.qkv_kernel,
        dict.fromkeys(("x", "q_weight", "q_bias", "k_weight", "k_bias", "v_weight", "v_bias", "cos", "sin", "q", "k",
                       "v"), BF16)
        | dict(HEADS=HEADS, KV_HEADS=KV_HEADS, HALF=SIZE // 2, WIDTH=WIDTH, ROWS=dense.ROWS, DEPTH=dense.DEPTH),
        dense.WARPS, 168),
    "norm": Case(norm.norm_kernel, dict(x=BF16, delta=BF16, scale=F32, total=BF16, out=BF16, eps=SCALAR, WIDTH=WIDTH,
                                        BLOCK=4096, ADD=True), 8, 64),
    "keys and values into the cache": Case(
        columns.store_kernel, dict(k=BF16, v=BF16, keys=BF16, values=BF16, column=INDEX, capacity=COUNT,
                                   ROW=KV_HEADS * SIZE, BLOCK=512), registers=64, load=64),
    "rope": Case(rope.rope_kernel, dict(x=BF16, cos=BF16, sin=BF16, out=BF16, HEADS=HEADS, HALF=SIZE // 2,
                                        BLOCK_HEADS=64, BLOCK_HALF=32)),
    "route": Case(router.route_kernel, dict(logits=BF16, experts=INDEX, weights=BF16, EXPERTS=EXPERTS, SLOTS=4,
                                            BLOCK=128, BLOCK_SLOTS=4, CHOOSE=True), 1, 64, load=64),
    "SwiGLU": Case(activation.swiglu_kernel, dict(gate=BF16, up=BF16, out=BF16, alpha=SCALAR, limit=SCALAR, count=COUNT,
                                                  stride=COUNT, BLOCK=1024), registers=64, load=0),
    "weighted sum": Case(activation.combine_kernel, dict(outputs=BF16, weights=BF16, out=BF16, WIDTH=WIDTH, SLOTS=4,
                                                         BLOCK=512), registers=64, load=64),
}

# Enough to see a regression; the rest in the long run. Some are a kernel that is there already, otherwise called: they
# are compiled for one architecture.
VARIANTS = ("gate_up, one token", "down, many tokens", "attention that shows its pattern",
            "gate_up and SwiGLU, some tokens")
QUICK = [(name, 90) for name in CASES if name not in VARIANTS]
QUICK += [(name, architecture) for architecture in (80, 100, 120)
          for name in ("gate_up and SwiGLU, one token", "gate_up and SwiGLU, many tokens")]
LONG = [(name, architecture) for name in CASES for architecture in ARCHITECTURES
        if (name, architecture) not in QUICK and (name not in VARIANTS or architecture == 90)]
MATRIX_UNITS = {80: "HMMA", 90: ("HGMMA", "HMMA"), 100: ("UTCHMMA", "HMMA"), 120: "HMMA"}


def check(name: str, architecture: int) -> None:
    case = CASES[name]
    code = case.compile(architecture)
    assert code.spilled == 0 and code.stack <= case.stack, "everything fits into registers"
    assert code.registers <= case.registers
    assert code.widest_load() >= case.load
    assert not case.matrix or code.count(*_tuple(MATRIX_UNITS[architecture]))
    assert code.count("DFMA", "DADD", "DMUL") == 0, "no float64 has crept in"
    assert not (case.subnormals and ".ftz.f32" in code.ptx), "a code's bits are subnormal numbers"


def _tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


@pytest.mark.parametrize(("name", "architecture"), QUICK)
def test_machine_code(name: str, architecture: int) -> None:
    check(name, architecture)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "architecture"), LONG)
def test_machine_code_of_the_rest(name: str, architecture: int) -> None:
    check(name, architecture)


@pytest.mark.parametrize("architecture", [90])
def test_packed_weights_are_read_sixteen_bytes_at_a_time(architecture: int) -> None:
    """Four rows of three steps for each thread, and the vector: not a weight in a narrower load."""
    code = CASES["gate_up and SwiGLU, one token"].compile(architecture)
    rows = expert_matvec.ROWS // expert_matvec.WARPS
    steps = -(-WIDTH // (32 * expert_matvec.BLOCKS))
    assert code.instructions["LDG.E.128"] >= rows * steps
    assert code.count("LDG.E.U8") == 0
    decoded = rows * steps * 32
    assert code.count("LOP3", "SHF", "IMAD.SHL") <= 3.2 * decoded, "three instructions turn a code into a number"


def test_a_large_sm90_tile_uses_the_asynchronous_units() -> None:
    code = CASES["gate_up and SwiGLU, many tokens"].compile(90)
    assert code.count("HGMMA") and code.count("LDGSTS"), "wgmma, fed by copies that run ahead"


SPILLS = 32  # rows for one warp; with 128 the assembler takes ten minutes and 3 GB


def test_the_check_sees_what_it_is_for() -> None:
    """The same kernel without the promise of aligned pointers reads narrowly; with far too large a tile it spills."""
    case = CASES["gate_up and SwiGLU, one token"]
    narrow = compile_once(case.kernel, tuple(case.arguments.items()), 90, case.warps, aligned=False)
    assert narrow.widest_load() < 128
    spilling = case.arguments | {"ROWS": SPILLS}
    assert compile_once(case.kernel, tuple(spilling.items()), 90, 1).spilled_anything
