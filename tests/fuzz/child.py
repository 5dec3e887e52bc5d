"""Loads a stretch of mutants, one after the other, and says on stdout what became of each.

A process of its own, since a mutant may end it: ``python -m tests.fuzz.child BASES SEED START STOP [LOADER]``. For
each mutant a line with its number comes first, then one of JSON, so that whoever waits knows which one is at work.
"""

from __future__ import annotations

import importlib
import json
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gptoss_workbench.errors import CheckpointError, WorkbenchError
from tests.fuzz.bases import load, sign
from tests.fuzz.mutants import KINDS, MANIFEST, Mutant

ROOM = 1 << 30  # bytes that the process may take beyond what it has after loading every base once

Loader = Callable[[Path, str], str]


def copied(base: Path, folder: Path) -> None:
    """A copy of a base; large files, which no mutant touches, as links."""
    folder.mkdir(parents=True)
    for file in base.iterdir():
        if file.stat().st_size > 1_000_000:
            (folder / file.name).symlink_to(file.resolve())
        else:
            (folder / file.name).write_bytes(file.read_bytes())


def outcome(mutant: Mutant, bases: Path, folder: Path, good: dict[str, str], loader: Loader) -> dict[str, Any]:
    """Make a mutant in a folder, load it, and tell what came of it.

    Returns:
        "outcome": "refused" with a clear error, "same" for the model of the base, "silent" for another one, or
        "unclear" for an error that is not the workbench's own, or names no file, or is too long.
    """
    base, signed = mutant.base, KINDS[mutant.kind].signed
    copied(bases / base, folder)
    if signed:
        sign(folder)
    mutant.damage(folder, bases)
    found = _attempt(folder, base, good[base], loader)
    if mutant.kind == "bits of data":
        (folder / MANIFEST).unlink()
        found["unsigned"] = _attempt(folder, base, good[base], loader)["outcome"]
    return found


def _attempt(folder: Path, base: str, good: str, loader: Loader) -> dict[str, Any]:
    try:
        return {"outcome": "same" if loader(folder, base) == good else "silent"}
    except WorkbenchError as error:
        lines = str(error).splitlines()
        named = not isinstance(error, CheckpointError) or str(folder) in str(error.file)
        clear = named and 2 <= len(lines) <= 6 and max(map(len, lines)) < 2000
        return {"outcome": "refused" if clear else "unclear", "error": str(error)[:500]}
    except Exception as error:
        return {"outcome": "unclear", "error": f"{type(error).__name__}: {error}"[:500]}


def main(arguments: list[str]) -> None:
    bases, (seed, start, stop) = Path(arguments[0]), map(int, arguments[1:4])
    module, _, name = (arguments[4] if len(arguments) > 4 else "tests.fuzz.bases:load").partition(":")
    loader: Loader = getattr(importlib.import_module(module), name)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    names = {base for kind in KINDS.values() for base in kind.bases}
    good = {base: load(bases / base, base) for base in sorted(names)}
    size, data = (int(Path("/proc/self/statm").read_text().split()[i]) * resource.getpagesize() for i in (0, 5))
    resource.setrlimit(resource.RLIMIT_DATA, (data + ROOM, data + ROOM))
    with tempfile.TemporaryDirectory(prefix="mutants-") as work:
        for number in range(start, stop):
            mutant = Mutant(seed, number)
            print(number, flush=True)
            mapped = max(file.stat().st_size for file in (bases / mutant.base).iterdir())
            resource.setrlimit(resource.RLIMIT_AS, (size + mapped + ROOM, resource.RLIM_INFINITY))
            began = time.perf_counter()
            found = outcome(mutant, bases, Path(work) / str(number) / mutant.base, good, loader)
            print(json.dumps({**found, "seconds": time.perf_counter() - began}), flush=True)
            shutil.rmtree(Path(work) / str(number))


if __name__ == "__main__":
    main(sys.argv[1:])
