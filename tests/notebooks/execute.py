"""Run notebooks anew and leave them as they are committed: executed, small, the same bytes every time.

    python tests/notebooks/execute.py notebooks            # run and clean (make notebooks)
    python tests/notebooks/execute.py --check notebooks    # only say what is wrong with them

What is kept: sources, tags, ids of cells, and outputs in forms that mean something without a kernel. What goes:
widget state and views (JupyterLab would show "model not found" in their place, and hide the static form beside
them), times, tracebacks but for their last line, versions of the interpreter.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import nbformat
from nbformat import NotebookNode

LARGEST = 200_000
"""Bytes a notebook may have: what it shows should be looked at, not scrolled past."""

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
UNWANTED = {
    "an absolute path": re.compile(r"(?<![\w./:<])/(?:home|root|opt|usr|tmp|work|mnt|srv|var|Users)/\w"),
    "a memory address": re.compile(r"\b0x[0-9a-f]{6,}\b"),
    "a zero with a sign, which rounding turns": re.compile(r"-0\.?0*(?![\d.])"),
    "a time of day": re.compile(r"\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d"),
}


def execute(notebook: NotebookNode, folder: Path, timeout: int = 300) -> None:
    """Run every cell in place, with ``folder`` as the working folder; an error that no tag allows is raised."""
    from nbclient import NotebookClient

    client = NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", store_widget_state=False, coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(stderr=subprocess.DEVNULL)  # the kernel's own words, not the cells'


def clean(notebook: NotebookNode) -> None:
    """Take out, in place, what differs from run to run or is of no use to a reader."""
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for i, cell in enumerate(notebook.cells):
        cell.setdefault("id", f"cell-{i:02d}")
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                output.traceback = [f"{output.ename}: {output.evalue}"]
            if "data" in output:
                output.data.pop(WIDGET_VIEW, None)


def problems(path: Path) -> list[str]:
    """Why a notebook cannot be committed as it is, a line each; none if it can."""
    notebook = nbformat.read(path, as_version=4)
    found = []
    if path.stat().st_size > LARGEST:
        found.append(f"{path.stat().st_size} bytes, more than {LARGEST}")
    if "widgets" in notebook.metadata:
        found.append("it holds widget state")
    if dict(notebook.metadata) != METADATA:
        found.append("its metadata are not those of every notebook here")
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("its cells were not all executed, in order, by a fresh kernel")
    for i, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            found += [f"cell {i}: {problem}" for problem in _problems_of(output)]
    return found


def _problems_of(output: NotebookNode) -> Iterable[str]:
    data = output.get("data", {})
    if WIDGET_VIEW in data:
        yield "it holds a widget's view"
    if output.output_type == "stream" and output.name == "stderr":
        yield f"it says on stderr: {output.text.strip()[:80]}"
    shown = [value for kind, value in data.items() if kind.startswith("text/")]
    shown.append(output.get("text", ""))
    for what, pattern in UNWANTED.items():
        for text in shown:
            if hit := pattern.search(text):
                yield f"it shows {what}: {text[hit.start(): hit.start() + 40]!r}"


def notebooks(paths: Iterable[Path]) -> list[Path]:
    """The given notebooks and those in the given folders."""
    found = [sorted(path.glob("*.ipynb")) if path.is_dir() else [path] for path in paths]
    return [path for group in found for path in group]


def main() -> int:
    parser = argparse.ArgumentParser(description="Run notebooks anew and clean them.")
    parser.add_argument("paths", nargs="+", type=Path, help="notebooks, or folders of them")
    parser.add_argument("--check", action="store_true", help="change nothing, only say what is wrong")
    args = parser.parse_args()
    wrong = 0
    for path in notebooks(args.paths):
        if not args.check:
            began = time.monotonic()
            notebook = nbformat.read(path, as_version=4)
            execute(notebook, path.parent)
            clean(notebook)
            nbformat.write(notebook, path)
            print(f"{path}: {len(notebook.cells)} cells, {time.monotonic() - began:.1f} s")
        for problem in problems(path):
            wrong += 1
            print(f"{path}: {problem}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
