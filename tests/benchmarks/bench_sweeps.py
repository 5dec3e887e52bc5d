"""A sweep of patches against hook loops on transformers and on the workbench itself, in a process of one thread."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROUNDS = {64: 9, 512: 4}
HERE = Path(__file__).parent


def test_sweeps(machine, versions, results) -> None:
    found = {
        "what": "patching resid_post at 6 layers x 16 tokens of a 64-token prompt, one at a time, float32; ratio to "
                "the hook loop on transformers in the same round, median, least and most; difference of the metric",
        "machine": machine, "versions": versions, "rounds": {str(hidden): count for hidden, count in ROUNDS.items()},
        "hidden": {},
    }
    for hidden, rounds in ROUNDS.items():
        said = subprocess.run([sys.executable, "-m", "tests.benchmarks.sweeps", str(hidden), str(rounds)], check=True,
                              capture_output=True, text=True, cwd=HERE.parent.parent,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}).stdout
        found["hidden"][str(hidden)] = json.loads(said.splitlines()[-1])
    (results / "sweeps.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found["hidden"], indent=2))
