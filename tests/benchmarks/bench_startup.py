"""From a fresh process to the first token of the embedded model: each stage timed in a process of its own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys

PROGRAM = """
import json, time
def stage(name):
    global begun
    now = time.perf_counter(); stages[name] = now - begun; begun = time.perf_counter()
stages, begun = {}, time.perf_counter()
import gptoss_workbench as wb; stage("import gptoss_workbench")
import torch; stage("import torch")
model = wb.load(); stage("wb.load() after torch")
ids = model.encode(wb.chat("What is 27 + 58?")); stage("first encode, vocabulary included")
gen = model.generate(ids, max_tokens=60, stop=[]); next(iter(gen)); stage("prompt to first token")
gen.finish(); stage("59 more tokens")
print(json.dumps({"stages": stages, "prompt": len(ids)}))
"""
RUNS = 5


def test_startup(machine, versions, results) -> None:
    seen = [json.loads(subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True,
                                      env={**os.environ, "OMP_NUM_THREADS": "1"}).stdout) for _ in range(1 + RUNS)]
    runs = [one["stages"] for one in seen[1:]]  # the first fills the file cache
    found = {
        "what": "seconds of each stage, one torch thread", "machine": machine, "versions": versions, "runs": RUNS,
        "prompt_tokens": seen[0]["prompt"],
        "seconds": {name: {"median": round(statistics.median(run[name] for run in runs), 3),
                           "min": round(min(run[name] for run in runs), 3),
                           "max": round(max(run[name] for run in runs), 3)} for name in runs[0]},
    }
    (results / "startup.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found["seconds"], indent=2))
