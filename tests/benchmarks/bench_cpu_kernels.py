"""The CPU kernels against the bandwidth of the memory, a C++ compiler, and torch: ratios within a run."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROUNDS = 30
RATIOS = {  # name: (what, of what), speeds in bytes of weights read a second unless it says times
    "expert / reading": ("expert, bfloat16", "read"),
    "expert / C++": ("expert, bfloat16", "expert, C++"),
    "matrix / reading": ("matrix", "read"),
    "matrix / torch": ("matrix", "matrix, torch"),
    "reading in four streams / reading": ("read apart", "read"),
}
TIMES = {
    "64 tokens, time / resident bfloat16": ("64 tokens", "64 tokens, torch, weights resident in bfloat16"),
    "matrix packed to 12 bits, time / matrix": ("matrix, packed to 12 bits", "matrix"),
    "matrix packed to 12 bits, time / C++": ("matrix, packed to 12 bits", "matrix, packed to 12 bits, C++ avx2"),
    "64 tokens, time / resident float32": ("64 tokens", "64 tokens, torch, weights resident in float32"),
}


def build(folder: Path) -> Path | None:
    """The yardstick as a library, or None where there is no g++ or no x86."""
    compiler = shutil.which("g++")
    if compiler is None:
        return None
    library = folder / "yardstick.so"
    command = [compiler, "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", str(HERE / "yardstick.cpp"),
               "-o", str(library)]
    return library if subprocess.run(command, capture_output=True).returncode == 0 else None


def spread(values: list[float]) -> dict[str, Any]:
    """Median and quartiles, three digits."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": float(f"{middle:.3g}"), "quartiles": [float(f"{low:.3g}"), float(f"{high:.3g}")],
            "best": float(f"{max(values):.3g}")}


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Speeds in GB/s of weights as stored, and ratios of what was measured in the same round."""
    times, sizes = found["times"], found["bytes"]
    best = "expert, C++ avx512_bf16" if found["path"] == "avx512_bf16" else "expert, C++ avx2"
    names = {"expert, C++": best}

    def rounds(first: str, second: str, by_time: bool) -> list[float] | None:
        one, other = (names.get(name, name) for name in (first, second))
        if one not in times or other not in times:
            return None
        each = 1 if by_time else sizes[one] / sizes[other]
        return [a / b if by_time else each * b / a for a, b in zip(times[one], times[other])]

    ratios = {name: rounds(*pair, by_time) for table, by_time in ((RATIOS, False), (TIMES, True))
              for name, pair in table.items()}
    return {
        "path": found["path"],
        "ratios": {name: spread(values) for name, values in ratios.items() if values},
        "milliseconds": {name: spread_of_times(values) for name, values in times.items()},
        "gigabytes_a_second": {name: spread([sizes[name] / value / 1e9 for value in values])
                               for name, values in times.items() if "64 tokens" not in name},
    }


def spread_of_times(values: list[float]) -> dict[str, Any]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": round(middle * 1e3, 3), "quartiles": [round(low * 1e3, 3), round(high * 1e3, 3)],
            "best": round(min(values) * 1e3, 3)}


@pytest.mark.slow
def test_cpu_kernels(tmp_path, machine, results) -> None:
    library = build(tmp_path)
    cores = os.cpu_count() or 1
    found = {}
    for threads in sorted({1, cores}):
        command = [sys.executable, "-m", "tests.benchmarks.cpu_kernels", str(threads), str(ROUNDS),
                   *([str(library)] if library else [])]
        # OpenMP's threads may spin: what is measured is the kernels, one after the other
        environment = {**{k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")}}
        done = subprocess.run(command, cwd=HERE.parent.parent, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        found[f"{threads} thread{'s' * (threads > 1)}"] = summary(json.loads(done.stdout.splitlines()[-1]))
    kept = {"what": "one expert's first map (5760 x 2880, MXFP4) and one matrix (5120 x 2880, bfloat16)",
            "rounds": ROUNDS, **found, "machine": machine,
            "versions": {name: version(name) for name in ("torch", "numba", "llvmlite", "numpy")}}
    (results / "cpu_kernels.json").write_text(json.dumps(kept, indent=1) + "\n")
    print(json.dumps({threads: run["ratios"] for threads, run in found.items()}, indent=1))
