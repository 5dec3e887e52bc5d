"""gpt-oss-20b's full shape on this processor, beside the bandwidth of the memory and llama.cpp: ``make bench-20b``.

Runs only when this file is named: it makes 13.8 GB and deletes them again, unless ``GPTOSS_BENCH_20B`` names a folder
that ``tests.benchmarks.full_shape`` made. llama.cpp takes part when ``GPTOSS_BENCH_LLAMA`` names an interpreter with
``llama_cpp`` and ``GPTOSS_BENCH_GGUF`` a folder with ``bf16.gguf`` and ``q8_0.gguf`` (``random_gguf.py``). Each
measurement is a process of its own, on files that were just read once, so that no disk is measured.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import full_shape
from tests.benchmarks.bench_cpu_kernels import build

HERE = Path(__file__).parent
TOKENS, PROMPT, PEER_TOKENS = 24, 512, 16
SPINNING = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")


def warm(files: list[Path]) -> None:
    """Read files once into the file cache."""
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def child(files: list[Path], *command: object) -> dict[str, Any]:
    warm(files)
    root = HERE.parent.parent
    environment = {name: value for name, value in os.environ.items() if name not in SPINNING}
    done = subprocess.run([str(part) for part in command], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-3000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def ours(folder: Path, what: str, threads: int, library: Path | None) -> dict[str, Any]:
    tokens = TOKENS if what == "decode" else PROMPT
    return child(sorted(folder.glob("*.safetensors")), sys.executable, "-m", "tests.benchmarks.shape_20b", folder, what,
                 threads, tokens, *([library] if library else []))


def peer(interpreter: str, file: Path, what: str, threads: int) -> dict[str, Any]:
    tokens = PEER_TOKENS if what == "decode" else PROMPT
    return child([file], interpreter, HERE / "peer_llama.py", file, what, threads, tokens)


def decoding(found: dict[str, Any]) -> dict[str, Any]:
    """Figures of a decoding process: seconds a token, against the floor, and what capturing costs."""
    times = found["times"]
    plain = statistics.median(times["plain"])
    kept = {"milliseconds_a_token": round(plain * 1e3, 1), "best": round(min(times["plain"]) * 1e3, 1),
            "tokens_a_second": round(1 / plain, 2),
            "captured_over_plain": round(statistics.median(times["captured"]) / plain, 3),
            "captured_over_plain_best": round(min(times["captured"]) / min(times["plain"]), 3),
            "peak_resident_bytes": found["peak"], "seconds_to_load": round(found["loaded"], 2),
            "seconds_from_start_to_first_token": round(found["first_token"], 2),
            "seconds_to_map_every_page": round(found["touched"], 2), "kernels": found["kernels"]}
    for way, stream in (("read", ""), ("read apart", "_of_four_streams")) if times["read"] else ():
        for name, of in (("median", statistics.median), ("best", min)):
            floor = found["active_bytes"] / (found["read_bytes"] / of(times[way]))
            kept[f"floor{stream}_milliseconds_{name}"] = round(floor * 1e3, 1)
            kept[f"over_floor{stream}_{name}"] = round(of(times["plain"]) / floor, 2)
    return kept


def reading(found: dict[str, Any]) -> dict[str, Any]:
    """Figures of a prefill process. Its first pass also maps the pages of the files."""
    times = found["times"]["prefill"]
    kept = {"seconds": [round(value, 2) for value in times],
            "milliseconds_a_token": round(min(times) / PROMPT * 1e3, 2),
            "tokens_a_second": round(PROMPT / min(times), 1), "peak_resident_bytes": found["peak"]}
    if "flop" in found:
        best = found["product_flop"] / min(found["times"]["product"])
        kept |= {"teraflop": round(found["flop"] / 1e12, 2), "gigaflops": round(found["flop"] / min(times) / 1e9, 1),
                 "gigaflops_of_torch_float32": round(best / 1e9, 1),
                 "share_of_torch_float32": round(found["flop"] / min(times) / best, 2)}
    return kept


def measure(folder: Path, library: Path | None, llama: str | None, gguf: Path | None) -> dict[str, Any]:
    cores = os.cpu_count() or 1
    kept: dict[str, Any] = {"decode": {}, "prefill_512": {}, "llama.cpp": {}}
    for threads in sorted({1, cores}):
        kept["decode"][f"{threads} threads"] = decoding(ours(folder, "decode", threads, library))
    kept["prefill_512"][f"{cores} threads"] = reading(ours(folder, "prefill", cores, None))
    for name in ("bf16", "q8_0") if llama and gguf else ():
        file = gguf / f"{name}.gguf"  # type: ignore[operator]
        if not file.exists():
            continue
        steps = peer(llama, file, "decode", cores)  # type: ignore[arg-type]
        median = statistics.median(steps["times"]["decode"])
        kept["llama.cpp"][name] = {
            "version": steps["version"], "milliseconds_a_token": round(median * 1e3, 1),
            "best": round(min(steps["times"]["decode"]) * 1e3, 1), "tokens_a_second": round(1 / median, 2),
            "prefill_512": reading(peer(llama, file, "prefill", cores))}  # type: ignore[arg-type]
    return kept


@pytest.mark.slow
def test_20b(request, tmp_path, machine, results) -> None:
    if not any("bench_20b" in str(argument) for argument in request.config.invocation_params.args):
        pytest.skip("writes 13.8 GB: make bench-20b")
    given = os.environ.get("GPTOSS_BENCH_20B")
    folder = Path(given) if given else tmp_path / "gpt-oss-20b-shaped"
    gguf = os.environ.get("GPTOSS_BENCH_GGUF")
    try:
        if not given:
            full_shape.make(folder, full_shape.config("20b"))
        found = measure(folder, build(tmp_path), os.environ.get("GPTOSS_BENCH_LLAMA"), Path(gguf) if gguf else None)
    finally:
        if not given:
            shutil.rmtree(folder, ignore_errors=True)
    kept = {"what": "gpt-oss-20b's shape with random weights: decoding, a prompt of 512 tokens, start-up", **found,
            "machine": machine}
    (results / "bench_20b.json").write_text(json.dumps(kept, indent=1) + "\n")
    print(json.dumps(kept, indent=1))
    for run in found["decode"].values():
        assert run["peak_resident_bytes"] < 15e9
