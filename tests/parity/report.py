"""The parity report: ``python -m tests.parity.report``, or ``make parity``.

Runs every comparison, writes results.json and PARITY.md beside this file and the short table into the README (between
its markers, where it has them), and fails when one comparison fails.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import gptoss_workbench as wb
from tests.parity import cases, formats, forward, greedy, pieces, rounding, table, yarn
from tests.parity.cases import BFLOAT16, CLAMPS, EMBEDDED, SHAPES, Pair
from tests.parity.rows import Row

HERE = Path(__file__).parent
README = HERE.parent.parent / "README.md"
RESULTS, PAGE = "results.json", "PARITY.md"


def of_pair(pair: Pair) -> Iterator[Row]:
    """All comparisons that are made on one model."""
    yield from forward.sites(pair)
    if pair.name in CLAMPS:
        yield from forward.clamps(pair)
    if pair.name in BFLOAT16:
        yield from forward.hooks(pair)
        yield from formats.loaded(pair)
        teachers = rounding.exact(pair)
        yield from rounding.sublayers(pair, teachers)
        yield from rounding.replayed(pair, teachers)
        yield from rounding.flips(pair, teachers)
    if pair.name in ("tiny", EMBEDDED):
        yield from greedy.text(pair)
    if pair.name in ("tiny", "window 1", EMBEDDED):
        yield from pieces.pieces(pair)


def all_rows(names: Sequence[str], say: Callable[[str], None] = print) -> list[Row]:
    """The rows of the named cases, and of what belongs to no case when all are named."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(names):
            begun = time.perf_counter()
            rows += of_pair(cases.pair(name, Path(folder) / str(number)))
            say(f"{name}: {time.perf_counter() - begun:.0f} s")
        if set(names) == {*SHAPES, EMBEDDED}:
            rows += [*formats.mxfp4(), *formats.layouts(Path(folder) / "layouts"), *yarn.frequencies(), *yarn.tables()]
    return rows


def about(names: Sequence[str]) -> dict[str, Any]:
    """What the numbers of the named cases depend on."""
    weights = wb.model.model.EMBEDDED / "model.safetensors"
    libraries = ("torch", "transformers", "safetensors")
    return {
        "versions": {"gptoss-workbench": wb.__version__, **{name: version(name) for name in libraries},
                     "python": platform.python_version()},
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        "embedded_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "models": {name: cases.sizes(name) for name in names},
    }


def write(results: dict[str, Any], folder: Path, readme: Path | None = None) -> None:
    """results.json and PARITY.md into a folder, the short table into a README."""
    rows = ",\n".join("  " + json.dumps(row, allow_nan=False) for row in results["rows"])
    text = f'{{\n "about": {json.dumps(results["about"])},\n "rows": [\n{rows}\n ]\n}}\n'
    (folder / RESULTS).write_text(text, encoding="utf-8")
    (folder / PAGE).write_text(table.page(results), encoding="utf-8")
    if readme is not None:
        readme.write_text(table.into_readme(readme.read_text(encoding="utf-8"), table.short(results)), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Run it; 1 when a comparison failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=[*SHAPES, EMBEDDED], metavar="CASE",
                        help="these cases alone; writes nothing unless --folder is given")
    parser.add_argument("--folder", type=Path, help="write here, and leave the README alone")
    options = parser.parse_args(arguments)
    names = options.only or [*SHAPES, EMBEDDED]
    rows = all_rows(names)
    results = {"about": about(names), "rows": [row.as_json() for row in rows]}
    if options.folder is not None:
        write(results, options.folder)
    elif options.only is None:
        write(results, HERE, README)
    print(table.short(results))
    failed = [row for row in rows if row.passed is False]
    for row in failed:
        print(f"FAIL {row.group} | {row.case} | {row.what} | {row.against} | {row.dtype} | {row.metric} "
              f"{row.value:.3g}, allowed {row.limit:g}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
