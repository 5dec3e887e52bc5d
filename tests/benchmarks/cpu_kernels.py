"""Times of the CPU kernels on the published shapes, beside other ways to the same product, in one process.

``python -m tests.benchmarks.cpu_kernels THREADS ROUNDS [YARDSTICK.so]`` prints JSON. In each round everything is
measured once, in turn, on weights that are not in the cache; so a ratio within a round compares what had the same
machine, however busy that was. The threads are those of torch.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from gptoss_kernels import cpu, reference
from gptoss_kernels.cpu import choice, packing, paths
from gptoss_kernels.mxfp4 import Mxfp4Tensor, dequantize

ROWS, WIDTH, EXPERTS = 5760, 2880, 12  # the first map of an expert, and as many as no cache holds
TOKENS = 64
BF16 = torch.bfloat16

SELDOM = ("64 tokens, reference", "expert, bfloat16, path torch")
"""Slow, and in no ratio: measured in the first three rounds only."""

Work = tuple[int, Callable[[int], object]]
"""Bytes of weights that it reads, and a function of the round."""


def main(threads: int, rounds: int, yardstick: str | None) -> dict[str, object]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    weight = Mxfp4Tensor(torch.randint(0, 256, (EXPERTS, ROWS, WIDTH // 32, 16), dtype=torch.uint8),
                         torch.randint(118, 122, (EXPERTS, ROWS, WIDTH // 32), dtype=torch.uint8))
    matrices = [torch.randn(5120, WIDTH).to(BF16) for _ in range(4)]
    works = {**one_token(weight), **matrix(matrices), **many_tokens(weight)}
    if yardstick:
        works |= compiled(weight, matrices, yardstick)
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(-2, rounds):  # the first two fill caches, compile and choose
        for number, (name, (_, work)) in enumerate(works.items()):
            if turn >= 3 and name in SELDOM:
                continue
            begun = time.perf_counter()
            work((turn + 5 * number) % EXPERTS)  # an expert that the works before have not left in the cache
            if turn >= 0:
                times[name].append(time.perf_counter() - begun)
    return {"path": chosen_path(), "threads": threads, "times": times,
            "bytes": {name: size for name, (size, _) in works.items()}}


def chosen_path() -> str:
    engine = choice.chosen(BF16)
    return engine.path.name if engine else "torch"


def one_token(weight: Mxfp4Tensor) -> dict[str, Work]:
    """One token through one expert: in decoding there are four in a layer."""
    bias = torch.randn(EXPERTS, ROWS)
    size = weight.nbytes // EXPERTS

    def ours(dtype: torch.dtype) -> Callable[[int], object]:
        x, added = torch.randn(1, WIDTH).to(dtype), bias.to(dtype)
        return lambda turn: cpu.expert_linear(x, torch.tensor([[turn]]), weight, added)

    works: dict[str, Work] = {"expert, bfloat16": (size, ours(BF16)), "expert, float32": (size, ours(torch.float32))}
    for name in (*paths.PATHS, "torch"):
        if paths.why_not(name) is None and name != chosen_path():
            works[f"expert, bfloat16, path {name}"] = (size, on_path(name, ours(BF16)))
    return works


def on_path(name: str, work: Callable[[int], object]) -> Callable[[int], object]:
    """The same work on another path, which is chosen and tested before the clock runs."""
    with choice.forced(name):
        engines = {dtype: choice.chosen(dtype) for dtype in (BF16, torch.float32)}

    def forced(turn: int) -> object:
        with swapped(engines):
            return work(turn)

    return forced


@contextmanager
def swapped(engines: dict) -> Iterator[None]:
    before = dict(choice._chosen)
    choice._chosen.update(engines)
    try:
        yield
    finally:
        choice._chosen.update(before)


def matrix(matrices: list[Tensor]) -> dict[str, Work]:
    """One token through the query, key and value matrices of a layer."""
    x, wide = torch.randn(1, WIDTH).to(BF16), torch.randn(1, WIDTH)
    size = matrices[0].nbytes
    return {"matrix": (size, lambda turn: cpu.linear(x, matrices[turn % 4])),
            "matrix, torch": (size, lambda turn: F.linear(x, matrices[turn % 4])),
            "matrix, torch in float32, half the rows": (size, _half(matrices[0], wide))}


def _half(matrix: Tensor, x: Tensor) -> Callable[[int], object]:
    """As many bytes in float32: what torch reaches where it multiplies without converting."""
    halves = [matrix[:2560].float() + number for number in range(2)]
    return lambda turn: F.linear(x, halves[turn % 2])


def many_tokens(weight: Mxfp4Tensor) -> dict[str, Work]:
    """64 tokens through one expert, as when a prompt of 512 is read."""
    x, bias = torch.randn(TOKENS, WIDTH).to(BF16), torch.randn(EXPERTS, ROWS).to(BF16)
    wide, dense = x.float(), dequantize(weight[0])
    dense32 = dense.float()
    size = weight.nbytes // EXPERTS

    def ours(kernels: object) -> Callable[[int], object]:
        return lambda turn: kernels.expert_linear(x, torch.full((TOKENS, 1), turn), weight, bias)  # type: ignore

    return {"64 tokens": (size, ours(cpu)), "64 tokens, reference": (size, ours(reference)),
            "64 tokens, torch, weights resident in bfloat16": (dense.nbytes, lambda turn: F.linear(x, dense)),
            "64 tokens, torch, weights resident in float32": (dense32.nbytes, lambda turn: F.linear(wide, dense32))}


def compiled(weight: Mxfp4Tensor, matrices: list[Tensor], library: str) -> dict[str, Work]:
    """The yardstick's products and its reading of as many bytes."""
    code = ctypes.CDLL(library)
    code.threads(torch.get_num_threads())
    x, out = torch.randn(WIDTH), torch.empty(ROWS)
    size = weight.nbytes // EXPERTS
    every = torch.empty(EXPERTS * size, dtype=torch.uint8).random_()

    def address(tensor: Tensor) -> ctypes.c_void_p:
        return ctypes.c_void_p(tensor.data_ptr())

    def product(function: Callable[..., None]) -> Callable[[int], object]:
        return lambda turn: function(address(weight.blocks[turn]), address(weight.scales[turn]), address(x),
                                     address(out), ROWS, WIDTH)

    def reading(way: str) -> Work:
        return size, lambda turn: getattr(code, way)(address(every[turn * size:]), ctypes.c_size_t(size))

    works: dict[str, Work] = {"read": reading("read_all"), "read apart": reading("read_apart"),
                              "expert, C++ avx2": (size, product(code.mxfp4_avx2))}
    if paths.why_not("avx2") is None:
        works |= packed12(matrices, code)
    if paths.why_not("avx512_bf16") is None:
        works["expert, C++ avx512_bf16"] = (size, product(code.mxfp4_avx512_bf16))
    return works


def packed12(matrices: list[Tensor], code: ctypes.CDLL) -> dict[str, Work]:
    """The matrices of ``matrix()`` packed without loss to 12 bits a value, multiplied here and by the yardstick, which
    leaves out the few values that have no place in the packing."""
    kept = [found for found in map(packing.pack, matrices) if found is not None]
    x, wide, out = torch.randn(1, WIDTH).to(BF16), torch.randn(WIDTH), torch.empty(len(matrices[0]))

    def yardstick(turn: int) -> None:
        one = kept[turn % len(kept)]
        code.packed12_avx2(*(ctypes.c_void_p(part.data_ptr()) for part in (one.records, one.table, wide, out)),
                           len(out), WIDTH)

    yardstick(0)
    inside = matrices[0].float()
    inside[torch.repeat_interleave(torch.arange(len(out)), kept[0].starts.diff()), _columns(kept[0])] = 0
    torch.testing.assert_close(out, inside @ wide, rtol=1e-4, atol=1e-3)
    size = kept[0].nbytes
    return {"matrix, packed to 12 bits": (size, lambda turn: packing.rows(x, kept[turn % len(kept)], None)),
            "matrix, packed to 12 bits, C++ avx2": (size, yardstick)}


def _columns(packed: packing.Packed) -> Tensor:
    """The column of each escape; ``columns`` counts the even ones of 32 first."""
    place = packed.columns % 32
    return packed.columns - place + place % 16 * 2 + place // 16


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)))
