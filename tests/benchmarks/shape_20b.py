"""One measurement of a model of gpt-oss-20b's shape, in a process of its own; prints JSON.

``python -m tests.benchmarks.shape_20b FOLDER {decode|prefill} THREADS TOKENS [YARDSTICK.so]``

Decoding alternates, token by token, between a generation without hooks and one that captures every residual and router
logit, and between these and reading the unembedding by plain loads: so the ratios compare what had the same machine.
"""

from __future__ import annotations

import ctypes
import json
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

import gptoss_workbench as wb
from gptoss_kernels import cpu

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


def reader(library: str, tensor: torch.Tensor, threads: int) -> Any:
    """Seconds of reading a tensor once."""
    code = ctypes.CDLL(library)
    code.threads(threads)

    def read() -> float:
        begun = time.perf_counter()
        code.read_all(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes))
        return time.perf_counter() - begun

    read()
    return read


def decode(model: Any, tokens: int, library: str | None, threads: int) -> dict[str, Any]:
    ids = prompt(PROMPT)
    plain = iter(model.generate(ids, max_tokens=tokens + 1, stop=[]))
    next(plain)
    first = time.time() - STARTED
    captured = iter(model.generate(ids, capture=CAPTURE, max_tokens=tokens + 1, stop=[]))
    next(captured)
    read = reader(library, model.weights.unembed, threads) if library else None
    times: dict[str, list[float]] = {"plain": [], "captured": [], "read": [], "unembed": []}
    hidden = torch.randn(1, model.config.hidden_size).to(torch.bfloat16)
    said: dict[str, list[int]] = {"plain": [], "captured": []}
    for turn in range(tokens):
        steps = {"plain": plain, "captured": captured}
        for name in steps if turn % 2 else reversed(steps):
            begun = time.perf_counter()
            said[name].append(next(steps[name]).token)
            times[name].append(time.perf_counter() - begun)
        begun = time.perf_counter()
        model.transformer.unembed(hidden)
        times["unembed"].append(time.perf_counter() - begun)
        if read is not None and turn % EVERY == 0:
            times["read"].append(read())
    assert said["plain"] == said["captured"]
    return {"first_token": first, "times": times, "read_bytes": model.weights.unembed.nbytes,
            "active_bytes": active_bytes(model)}


def prefill(model: Any, tokens: int) -> dict[str, Any]:
    ids, times = prompt(tokens), []
    for _ in range(2):  # the first one also maps the pages
        begun = time.perf_counter()
        next(iter(model.generate(ids, max_tokens=1, stop=[])))
        times.append(time.perf_counter() - begun)
    return {"times": {"prefill": times}}


def main(folder: str, what: str, threads: int, tokens: int, library: str | None) -> dict[str, Any]:
    torch.set_num_threads(threads)
    model = wb.load(folder, allow_modified_config=True)  # fewer layers are a change
    loaded = time.time() - STARTED
    found = decode(model, tokens, library, threads) if what == "decode" else prefill(model, tokens)
    return {**found, "loaded": loaded, "tokens": tokens, "threads": threads, "peak": peak(),
            "kernels": f"{model.transformer.kernels.name}: {cpu.outlook().split(';')[0]}",
            "median": {name: statistics.median(values) for name, values in found["times"].items() if values}}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]),
                          sys.argv[5] if len(sys.argv) > 5 else None)))
