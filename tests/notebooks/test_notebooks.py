"""The committed notebooks are clean, and the two tools that keep them so do what they say."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

HERE = Path(__file__).parent
TOOL = runpy.run_path(str(HERE / "execute.py"))
COMMITTED = sorted(HERE.parent.parent.joinpath("notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_committed_notebooks_are_clean(path):
    assert TOOL["problems"](path) == []


def test_every_problem_is_found(tmp_path):
    notebook = new_notebook(cells=[
        new_code_cell("1", execution_count=2, outputs=[
            new_output("execute_result", {"text/plain": "<x at 0x7f00aa>", TOOL["WIDGET_VIEW"]: {}}, execution_count=2),
            new_output("stream", name="stderr", text="Warning: /home/somebody/x"),
            new_output("stream", name="stdout", text="2026-01-31 12:00:07"),
        ]),
        new_code_cell("2"),
    ])
    notebook.metadata["widgets"] = {"state": "x" * 200_000}
    nbformat.write(notebook, tmp_path / "bad.ipynb")
    found = "\n".join(TOOL["problems"](tmp_path / "bad.ipynb"))
    for part in ("more than 200000", "widget state", "metadata", "not all executed", "widget's view", "stderr",
                 "an absolute path", "a memory address", "a time of day"):
        assert part in found


def test_executing_twice_gives_the_same_clean_bytes(tmp_path):
    path = tmp_path / "one.ipynb"
    cells = [
        new_markdown_cell("# Title"),
        new_code_cell("import ipywidgets\nslider = ipywidgets.IntSlider(3)\nslider", metadata={"collapsed": True}),
        new_code_cell("1 / 0", metadata={"tags": ["raises-exception"]}),
        new_code_cell("import time\nprint('a')\ntime.sleep(0.5)\nprint('b')"),
    ]
    nbformat.write(new_notebook(cells=cells), path)
    command = [sys.executable, str(HERE / "execute.py"), str(path)]
    written = []
    for _ in range(2):
        subprocess.run(command, check=True, capture_output=True, text=True)
        written.append(path.read_bytes())
    assert written[0] == written[1]
    _, slider, error, printed = nbformat.read(path, as_version=4).cells
    assert list(slider.outputs[0].data) == ["text/plain"]
    assert slider.metadata == {}
    assert error.outputs[0].traceback == ["ZeroDivisionError: division by zero"]
    assert printed.outputs[0].text == "a\nb\n"


def test_nbval_sees_usage_errors_and_rewritten_outputs(tmp_path, repository):
    def displayed(text):
        return [new_output("display_data", {"text/plain": text})]

    update = "from IPython.display import display\nh = display({'text/plain': 'first'}, raw=True, display_id=True)\n" \
             "h.update({'text/plain': 'last'}, raw=True)"
    expected = [
        ("1 + 1", {"outputs": [new_output("execute_result", {"text/plain": "2"}, execution_count=1)]}, "PASSED"),
        ("%load_ext gptoss_workbench", {}, "PASSED"),
        ("%gptoss nonsense", {"metadata": {"tags": ["nbval-ignore-output"]}}, "FAILED"),
        ("%gptoss nonsense", {"metadata": {"tags": ["nbval-ignore-output", "raises-exception"]}}, "PASSED"),
        ("%no_such_magic", {"metadata": {"tags": ["nbval-ignore-output"]}}, "FAILED"),
        (update, {"outputs": displayed("last")}, "PASSED"),
        (update, {"outputs": displayed("first")}, "FAILED"),
    ]
    cells = [new_code_cell(code, execution_count=i + 1, **rest) for i, (code, rest, _) in enumerate(expected)]
    nbformat.write(new_notebook(cells=cells), tmp_path / "magic.ipynb")
    shutil.copy(repository / "conftest.py", tmp_path)
    command = [sys.executable, "-m", "pytest", "-v", "--color=no", "-p", "no:cacheprovider", "--nbval",
               "--nbval-current-env", "--rootdir", str(tmp_path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ, COLUMNS="200"))
    assert re.findall(r"Cell \d+ (PASSED|FAILED)", done.stdout) == [how for *_, how in expected], done.stdout
    assert "UsageError: %gptoss has no command 'nonsense'" in done.stdout
