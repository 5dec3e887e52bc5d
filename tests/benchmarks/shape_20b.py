"""One measurement of a model of gpt-oss-20b's shape, in a process of its own; prints JSON.

``python -m tests.benchmarks.shape_20b FOLDER {decode|prefill} THREADS TOKENS [YARDSTICK.so]``

Decoding alternates, token by token, between a generation without hooks, one that captures every residual and router
logit, one that reads packed matrices, and one that is not recorded, and between these and reading the unembedding by
plain loads: so the ratios compare what had the same machine.
"""

from __future__ import annotations

import ctypes
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

import gptoss_workbench as wb
from gptoss_kernels import cpu
from gptoss_kernels.cpu import paths

STARTED = psutil.Process().create_time()
PROMPT = 8
CAPTURE = ["resid", "router.logits"]
EVERY = 4
"""Tokens between two readings of the memory."""


def peak() -> int:
    """Bytes resident at most, pages of mapped files included."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


def prompt(count: int) -> list[int]:
    return torch.randint(0, 199_000, (count,), generator=torch.Generator().manual_seed(0)).tolist()


def active_bytes(model: Any) -> int:
    """Bytes of weights that one token reads: all but the embedding, and of the experts those that are chosen."""
    weights, config = model.weights, model.config
    total = sum(tensor.nbytes for name, tensor in weights.tensors() if name != "embed")
    experts = sum(part.nbytes for layer in weights.layers
                  for part in (layer.gate_up, layer.down, layer.gate_up_bias, layer.down_bias))
    return total - experts + experts * config.num_experts_per_tok // config.num_local_experts


def reader(library: str, tensor: torch.Tensor, threads: int) -> Callable[[str], float]:
    """Seconds of reading a tensor once, in one stream a thread ("all") or in four ("apart")."""
    code = ctypes.CDLL(library)
    code.threads(threads)

    def read(way: str) -> float:
        begun = time.perf_counter()
        getattr(code, f"read_{way}")(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes))
        return time.perf_counter() - begun

    read("all")
    return read


def touch(model: Any) -> float:
    """Map every page of the weights, which the first tokens would otherwise do one by one -> seconds."""
    begun = time.perf_counter()
    for _, tensor in model.weights.tensors():
        parts = (tensor.blocks, tensor.scales) if hasattr(tensor, "blocks") else (tensor,)
        for part in parts:
            part.reshape(-1).view(torch.uint8)[::4096].max()
    return time.perf_counter() - begun


def started(model: Any, tokens: int, **options: Any) -> Any:
    """A generation whose next token is one like all that follow: recorded, every page mapped."""
    steps = iter(model.generate(prompt(PROMPT), max_tokens=tokens + 3, stop=[], **options))
    for _ in range(3):
        next(steps)
    return steps


def decode(model: Any, tokens: int, library: str | None, threads: int) -> dict[str, Any]:
    next(iter(model.generate(prompt(PROMPT), max_tokens=1, stop=[])))
    first = time.time() - STARTED
    read = reader(library, model.weights.unembed, threads) if library else None
    touched = touch(model)
    steps = {"plain": started(model, tokens), "captured": started(model, tokens, capture=CAPTURE)}
    found: dict[str, Any] = {"peak": peak()}
    if paths.why_not("avx2") is None:
        begun = time.perf_counter()
        found |= {"packed_bytes": model.pack(), "packing": time.perf_counter() - begun}
        steps["packed"] = started(model, tokens)
        found["peak_packed"] = peak()
    steps["not recorded"] = started(model, tokens, graph=False)
    times: dict[str, list[float]] = {name: [] for name in (*steps, "read", "read apart")}
    said: dict[str, list[int]] = {name: [] for name in steps}
    for turn in range(tokens):
        for name in steps if turn % 2 else reversed(steps):
            begun = time.perf_counter()
            said[name].append(next(steps[name]).token)
            times[name].append(time.perf_counter() - begun)
        if read is not None and turn % EVERY == 0:
            times["read"].append(read("all"))
            times["read apart"].append(read("apart"))
    assert said["plain"] == said["captured"]
    return {"first_token": first, "times": times, "read_bytes": model.weights.unembed.nbytes,
            "active_bytes": active_bytes(model), "touched": touched, **found}


def prefill(model: Any, tokens: int) -> dict[str, Any]:
    """Seconds of a prompt, and of torch's float32 product of as many rows: the most that arithmetic could be."""
    ids, times, products = prompt(tokens), [], []
    rows, matrix = torch.randn(tokens, model.config.hidden_size), torch.randn(model.config.hidden_size, 5760)
    for _ in range(2):  # the first one also maps the pages
        begun = time.perf_counter()
        next(iter(model.generate(ids, max_tokens=1, stop=[])))
        times.append(time.perf_counter() - begun)
        for _ in range(8):
            begun = time.perf_counter()
            torch.mm(rows, matrix)
            products.append(time.perf_counter() - begun)
    return {"times": {"prefill": times, "product": products}, "product_flop": 2 * rows.numel() * matrix.shape[1],
            "flop": tokens * 2 * active_values(model)}


def active_values(model: Any) -> int:
    """Numbers that one token of a prompt is multiplied with: those of ``active_bytes`` without the unembedding."""
    config, weights = model.config, model.weights
    layers = sum(w.q_weight.numel() + w.k_weight.numel() + w.v_weight.numel() + w.o_weight.numel()
                 for w in weights.layers)
    chosen = config.num_experts_per_tok * 3 * config.hidden_size * config.intermediate_size
    return layers + len(weights.layers) * chosen


def main(folder: str, what: str, threads: int, tokens: int, library: str | None) -> dict[str, Any]:
    torch.set_num_threads(threads)
    model = wb.load(folder, allow_modified_config=True)  # fewer layers are a change
    loaded = time.time() - STARTED
    found = decode(model, tokens, library, threads) if what == "decode" else prefill(model, tokens)
    return {"peak": peak(), **found, "loaded": loaded, "tokens": tokens, "threads": threads,
            "kernels": f"{model.transformer.kernels.name}: {cpu.outlook().split(';')[0]}",
            "median": {name: statistics.median(values) for name, values in found["times"].items() if values}}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]),
                          sys.argv[5] if len(sys.argv) > 5 else None)))
