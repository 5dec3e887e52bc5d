"""The mutation run: ``python -m tests.fuzz.run`` loads 10,000 damaged checkpoints and writes down what became of them.

Asked for are 0 crashes, 0 hangs over five seconds, 0 silent loads (another model without an error) and 0 unclear
errors. A mutant that takes too long is tried once more, alone: on a busy machine a pause is no hang.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any

from tests.fuzz.bases import make_bases
from tests.fuzz.mutants import KINDS, Mutant

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PATIENCE = 5.0  # seconds for one mutant
_START = 300.0  # seconds for imports and the good bases
BATCH = 250
BAD = ("crash", "hang", "silent", "unclear")


def attempts(bases: Path, seed: int, start: int, stop: int, loader: str | None = None) -> Iterator[dict[str, Any]]:
    """What became of the mutants from start to stop, in order; a new process goes on after one that died or hung."""
    while start < stop:
        for found in _one_process(bases, seed, start, stop, loader):
            yield found
            start = found["number"] + 1


def _one_process(bases: Path, seed: int, start: int, stop: int, loader: str | None) -> Iterator[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.fuzz.child", str(bases), str(seed), str(start), str(stop)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(command + ([loader] if loader else []), cwd=ROOT, env=environment, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    lines: SimpleQueue[str | None] = SimpleQueue()
    complaints: list[str] = []
    readers = [threading.Thread(target=_pass_on, args=(child.stdout, lines), daemon=True),
               threading.Thread(target=lambda: complaints.append(child.stderr.read()), daemon=True)]
    for reader in readers:
        reader.start()
    at_work: int | None = None
    try:
        while (line := lines.get(timeout=_START if at_work is None else PATIENCE)) is not None:
            if line.startswith("{"):
                yield {"number": at_work, **json.loads(line)}
                at_work = None
            else:
                at_work = int(line)
        child.wait(_START)
    except Empty:
        if at_work is None:
            raise RuntimeError("the loading process does nothing") from None
        yield {"number": at_work, "outcome": "hang", "seconds": PATIENCE}
        return
    finally:
        child.kill()
        child.wait()
    readers[1].join(timeout=5)
    error = f"exit {child.returncode}: {''.join(complaints)[-400:]}"
    if at_work is not None:
        yield {"number": at_work, "outcome": "crash", "seconds": 0.0, "error": error}
    elif child.returncode:
        raise RuntimeError(f"the loading process fails: {error}")


def _pass_on(stream: IO[str], lines: SimpleQueue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _tried_twice(found: dict[str, Any], bases: Path, seed: int, loader: str | None) -> dict[str, Any]:
    if found["outcome"] != "hang":
        return found
    number = found["number"]
    return next(attempts(bases, seed, number, number + 1, loader))


def run(count: int, seed: int = 0, workers: int | None = None, loader: str | None = None, first: int = 0
        ) -> list[dict[str, Any]]:
    """Load mutants in child processes.

    Args:
        count: how many, numbered from ``first``.
        workers: child processes at a time; as many as there are processors when None.
        loader: "module:function" instead of the real loader, to test this harness.
    Returns:
        For each mutant: number, kind, base, outcome (see ``child.outcome``; also "crash" and "hang"), seconds, error.
    """
    with tempfile.TemporaryDirectory(prefix="bases-") as folder:
        make_bases(Path(folder))
        starts = range(first, first + count, BATCH)

        def batch(start: int) -> list[dict[str, Any]]:
            found = attempts(Path(folder), seed, start, min(start + BATCH, first + count), loader)
            return [_tried_twice(one, Path(folder), seed, loader) for one in found]

        with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
            found = [one for part in pool.map(batch, starts) for one in part]
    mutants = [Mutant(seed, one["number"]) for one in found]
    return [{"kind": mutant.kind, "base": mutant.base, **one} for mutant, one in zip(mutants, found, strict=True)]


def summary(found: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """The counts of a run, by kind, as they are committed."""
    kinds = {}
    for kind in KINDS:
        outcomes = Counter(one["outcome"] for one in found if one["kind"] == kind)
        counts = {"mutants": outcomes.total(), "refused": outcomes["refused"], "same model": outcomes["same"]}
        kinds[kind] = {"manifest": KINDS[kind].signed, **counts, **{bad: outcomes[bad] for bad in BAD}}
    unsigned = Counter(one["unsigned"] for one in found if "unsigned" in one)
    total = Counter(one["outcome"] for one in found)
    return {
        "what": "outcome of loading damaged checkpoints in child processes, each mutant told by seed and number",
        "seed": seed, "mutants": len(found), **{bad: total[bad] for bad in BAD},
        "refused": total["refused"], "same model": total["same"],
        "slowest_seconds": round(max(one["seconds"] for one in found), 2), "kinds": kinds,
        "bits of data without a manifest": {
            "mutants": unsigned.total(), "refused by the values alone": unsigned["refused"],
            "loaded as another model": unsigned["silent"], "crash or unclear": unsigned["unclear"],
        },
        "versions": {name: version(name) for name in ("torch", "safetensors")},
        "python": platform.python_version(), "system": platform.system(),
    }


def table(found: dict[str, Any]) -> str:
    """A summary for a person."""
    columns = ("mutants", "refused", "same model", *BAD)
    rows = [f"{'':34}" + "".join(f"{column:>12}" for column in columns)]
    rows += [f"{kind:34}" + "".join(f"{counts[column]:12}" for column in columns)
             for kind, counts in {**found["kinds"], "all": found}.items()]
    alone = found["bits of data without a manifest"]
    rows.append(f"without a manifest, the values alone gave away {alone['refused by the values alone']} of "
                f"{alone['mutants']} flips of data; slowest {found['slowest_seconds']} s")
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    options = parser.parse_args(arguments)
    found = run(options.count, options.seed, options.workers)
    counted = summary(found, options.seed)
    options.out.write_text(json.dumps(counted, indent=2) + "\n")
    bad = [one for one in found if one["outcome"] in BAD or one.get("unsigned") == "unclear"]
    for one in bad[:20]:
        print(json.dumps(one))
    print(table(counted))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
