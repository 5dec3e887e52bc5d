"""gpt-oss-20b's full shape on this processor, beside the bandwidth of the memory and llama.cpp.

Makes 13.8 GB, and for llama.cpp as much again, one file at a time; deletes them again. ``GPTOSS_BENCH_20B`` may name a
folder that ``tests.benchmarks.full_shape`` made, which is kept. llama.cpp takes part when ``GPTOSS_BENCH_LLAMA`` names
an interpreter with ``llama_cpp`` and ``gguf`` (``make bench`` builds one). Each measurement is a process of its own, on
files that were just read once, so that no disk is measured.
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

from tests.benchmarks import full_shape, plot
from tests.benchmarks.bench_cpu_kernels import build
from tests.benchmarks.room import skip_without_room

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
    for name in ("packed", "not recorded"):
        if name in times:
            kept[f"{name.replace(' ', '_')}_milliseconds_a_token"] = round(statistics.median(times[name]) * 1e3, 1)
            kept[f"{name.replace(' ', '_')}_best"] = round(min(times[name]) * 1e3, 1)
    if "packed" in times:
        kept |= {"packed_bytes": found["packed_bytes"], "seconds_to_pack": round(found["packing"], 1),
                 "peak_resident_bytes_packed": found["peak_packed"]}
    for way, stream in (("read", ""), ("read apart", "_of_four_streams")) if times["read"] else ():
        for name, of in (("median", statistics.median), ("best", min)):
            floor = found["active_bytes"] / (found["read_bytes"] / of(times[way]))
            kept[f"floor{stream}_milliseconds_{name}"] = round(floor * 1e3, 1)
            for which in ("plain", "packed"):
                if which in times:
                    kept[f"{which}_over_floor{stream}_{name}"] = round(of(times[which]) / floor, 2)
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


def measure(folder: Path, library: Path | None) -> dict[str, Any]:
    cores = os.cpu_count() or 1
    kept: dict[str, Any] = {"decode": {}, "prefill_512": {}, "llama.cpp": {}}
    for threads in sorted({1, cores}):
        kept["decode"][f"{threads} threads"] = decoding(ours(folder, "decode", threads, library))
    kept["prefill_512"][f"{cores} threads"] = reading(ours(folder, "prefill", cores, None))
    return kept


def of_llama(llama: str, dense: str, file: Path) -> dict[str, Any]:
    """Figures of llama.cpp with dense matrices in a type, on a file that is made for it and deleted."""
    cores = os.cpu_count() or 1
    try:
        subprocess.run([llama, str(HERE / "random_gguf.py"), str(file), dense], check=True, capture_output=True)
        steps = peer(llama, file, "decode", cores)
        prompt = peer(llama, file, "prefill", cores)
    finally:
        file.unlink(missing_ok=True)
    median = statistics.median(steps["times"]["decode"])
    return {"version": steps["version"], "milliseconds_a_token": round(median * 1e3, 1),
            "best": round(min(steps["times"]["decode"]) * 1e3, 1), "tokens_a_second": round(1 / median, 2),
            "prefill_512": reading(prompt)}


@pytest.mark.slow
def test_20b(tmp_path, machine, results) -> None:
    given, llama = os.environ.get("GPTOSS_BENCH_20B"), os.environ.get("GPTOSS_BENCH_LLAMA")
    folder = Path(given) if given else tmp_path / "gpt-oss-20b-shaped"
    skip_without_room(tmp_path)
    try:
        if not given:
            full_shape.make(folder, full_shape.config("20b"))
        found = measure(folder, build(tmp_path))
    finally:
        if not given:
            shutil.rmtree(folder, ignore_errors=True)
    for dense in ("bf16", "q8_0") if llama else ():
        found["llama.cpp"][dense] = of_llama(llama, dense, tmp_path / f"{dense}.gguf")  # type: ignore[arg-type]
    kept = {"what": "gpt-oss-20b's shape with random weights: decoding, a prompt of 512 tokens, start-up", **found,
            "machine": machine}
    (results / "bench_20b.json").write_text(json.dumps(kept, indent=1) + "\n")
    plot.write()
    print(json.dumps(kept, indent=1))
    for run in found["decode"].values():
        assert run["peak_resident_bytes"] < 15e9
