"""A random checkpoint of gpt-oss-20b's full shape: made, loaded with its experts packed, and asked for tokens.

It writes 13.8 GB and deletes them again. Each step is a process of its own, so that its peak memory is its own. The
model is loaded twice: with nothing of it in the file cache, and again. The kernels are the reference ones: this is
about memory, and that it works at all.

Memory is what Linux says in /proc/self/status. VmHWM is the peak of everything resident, which includes pages of the
checkpoint mapped from the disk (RssFile); those belong to the file cache and go when memory is short. RssAnon is what
the process holds by itself; its peak is sampled every 20 ms.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import full_shape
from tests.benchmarks.room import skip_without_room

MOST_RESIDENT = 1.05  # times the bytes of the files
MAKER_BYTES = 2_000_000_000
STEPS = 4

MAKE = """
import json, re, sys, time
from pathlib import Path
from tests.benchmarks import full_shape
from tests.benchmarks.room import skip_without_room
begun = time.perf_counter()
total = full_shape.make(Path(sys.argv[1]), json.loads(sys.argv[2]))
seconds = time.perf_counter() - begun
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps({"bytes": total, "seconds": seconds, "peak": peak}))
"""

LOAD = """
import time
begun = time.perf_counter()
import json, re, resource, sys, threading
from pathlib import Path
import torch, gptoss_workbench as wb
import gptoss_workbench.model.model
from gptoss_kernels.mxfp4 import Mxfp4Tensor

def status():
    fields = dict(re.findall(r"(VmHWM|RssAnon|RssFile):\\s+(\\d+)", Path("/proc/self/status").read_text()))
    return {name: int(value) * 1024 for name, value in fields.items()}

def watch():
    while not done.wait(0.02):
        highest[0] = max(highest[0], status()["RssAnon"])

def stage(name):
    global begun
    usage = resource.getrusage(resource.RUSAGE_SELF)
    stages.append({"stage": name, "seconds": time.perf_counter() - begun, **status(), "major_faults": usage.ru_majflt})
    begun = time.perf_counter()

highest, done, stages = [0], threading.Event(), []
threading.Thread(target=watch, daemon=True).start()
stage("libraries imported")
model = wb.load(sys.argv[1]); stage("loaded")
ids = model.encode(wb.chat("What is 27 + 58?")); stage("prompt encoded")
steps = iter(model.generate(ids, max_tokens=1 + int(sys.argv[2]), stop=[]))
first = next(steps); stage("first token")
rest = list(steps); stage("further tokens")
done.set()
held = [tensor for _, tensor in model.weights.tensors()]
packed = sum(tensor.nbytes for tensor in held if isinstance(tensor, Mxfp4Tensor))
print(json.dumps({
    "stages": stages, "peak_anonymous": highest[0], "prompt_tokens": len(ids), "dtype": model.dtype,
    "tokens": [step.token for step in (first, *rest)], "logprobs": [step.logprob for step in (first, *rest)],
    "weights_bytes": model.weights.nbytes, "packed_bytes": packed, "threads": torch.get_num_threads(),
    "ru_maxrss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "kernels": model.transformer.kernels.name,
}))
"""


def child(program: str, *arguments: object) -> dict[str, Any]:
    """Run a program in a process of its own; the JSON of its last line."""
    root = Path(__file__).parent.parent.parent
    paths = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    done = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], cwd=root, capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": paths, "GPTOSS_KERNELS": "reference"})
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-3000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def measure(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Make a checkpoint, load it from a cold and from a warm file cache, and generate; bytes and seconds."""
    made = child(MAKE, folder, json.dumps(config))
    loads = {cache: child(LOAD, folder, STEPS) for cache in ("cold", "warm")}
    return {"made": made, "loads": loads}


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """The figures that are kept, rounded."""
    made = found["made"]
    kept: dict[str, Any] = {
        "checkpoint_bytes": made["bytes"],
        "make": {"seconds": round(made["seconds"], 1), "peak_resident_bytes": made["peak"]},
    }
    for cache, load in found["loads"].items():
        stages = {stage["stage"]: stage for stage in load["stages"]}
        last = load["stages"][-1]
        kept[f"load_and_generate_{cache}"] = {
            "seconds": {name: round(stage["seconds"], 2) for name, stage in stages.items()},
            "tokens_per_second": round(STEPS / stages["further tokens"]["seconds"], 3),
            "prompt_tokens": load["prompt_tokens"],
            "peak_resident_bytes": last["VmHWM"], "ru_maxrss_bytes": load["ru_maxrss"],
            "peak_resident_per_checkpoint_byte": round(last["VmHWM"] / made["bytes"], 4),
            "peak_anonymous_bytes": load["peak_anonymous"],
            "by_stage": {name: {"peak_resident": stage["VmHWM"], "anonymous": stage["RssAnon"],
                                "file_backed": stage["RssFile"], "major_faults": stage["major_faults"]}
                         for name, stage in stages.items()},
            "weights_bytes": load["weights_bytes"], "of_these_packed_mxfp4": load["packed_bytes"],
            "dtype": load["dtype"], "kernels": load["kernels"], "torch_threads": load["threads"],
        }
    return kept


@pytest.mark.slow
def test_full_shape_20b(tmp_path, machine, results) -> None:
    skip_without_room(tmp_path)
    folder = tmp_path / "gpt-oss-20b-shaped"
    try:
        found = measure(folder, full_shape.config("20b"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    kept = {
        "what": "a random checkpoint of gpt-oss-20b's full shape: made, loaded with packed experts, asked for tokens",
        "unit": "bytes and seconds", **summary(found), "machine": machine,
        "versions": {name: version(name) for name in ("torch", "safetensors", "numpy")},
    }
    (results / "full_shape.json").write_text(json.dumps(kept, indent=1) + "\n")
    print(json.dumps(kept, indent=1))
    assert found["made"]["peak"] < MAKER_BYTES
    for load in found["loads"].values():
        assert load["stages"][-1]["VmHWM"] <= MOST_RESIDENT * found["made"]["bytes"]
        assert load["packed_bytes"] > 0.7 * load["weights_bytes"] and load["kernels"] == "reference"
        assert all(math.isfinite(value) for value in load["logprobs"])
        assert load["tokens"] == found["loads"]["cold"]["tokens"]
