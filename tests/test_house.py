"""The rules of the house: what may import what, what a wheel holds, and what must not be anywhere."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "gptoss_kernels": ROOT / "kernels" / "gptoss_kernels",
    "gptoss_workbench": ROOT / "workbench" / "gptoss_workbench",
    "gptoss_jupyter": ROOT / "extensions" / "gptoss_jupyter",
}
LONGEST = 500  # lines of a file
IMPORT_SECONDS = 0.5
UPWARD = {"explore", "load_ipython_extension", "unload_ipython_extension"}  # of gptoss_workbench/__init__.py

# What a package may not import, whoever it is that would like to.
FORBIDDEN = {
    "gptoss_kernels": {"gptoss_workbench", "gptoss_jupyter", "xarray", "openai_harmony", "huggingface_hub", "plotly"},
    "gptoss_workbench": {"gptoss_jupyter"},
    "gptoss_jupyter": set(),
}
NOTEBOOK = {"IPython", "ipywidgets", "anywidget", "traitlets", "ipykernel"}
NOWHERE = {"transformers", "pytest", "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"}


def python_files(package: str) -> list[Path]:
    return sorted(PACKAGES[package].rglob("*.py"))


def data_files(package: str) -> list[Path]:
    every = PACKAGES[package].rglob("*")
    return sorted(p for p in every if p.is_file() and p.suffix not in (".py", ".pyc") and "__pycache__" not in p.parts)


def imports(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, str]]:
    """(top-level package, name of the function it is imported in) for every import, those for typing included."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((name.name.partition(".")[0], inside) for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0], inside
        deeper = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        yield from imports(node, node.name if deeper else inside)


def run_python(code: str, **options) -> str:
    """Run code in a fresh interpreter; what it printed."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


# imports --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_down(package):
    forbidden = FORBIDDEN[package] | NOWHERE | (NOTEBOOK if package != "gptoss_jupyter" else set())
    wrong = []
    for path in python_files(package):
        relative = path.relative_to(PACKAGES[package])
        for name, function in imports(ast.parse(path.read_text())):
            upward = name == "gptoss_jupyter" and str(relative) == "__init__.py" and function in UPWARD
            plot = name == "plotly" and package == "gptoss_workbench" and relative.parts[0] != "plots"
            if (name in forbidden and not upward) or plot:
                wrong.append(f"{relative} imports {name}")
    assert wrong == []


def test_the_import_rule_finds_imports_wherever_they_hide():
    tree = ast.parse("if True:\n  import a.b\ndef f():\n  class C:\n    from c.d import e\nfrom . import g")
    assert list(imports(tree)) == [("a", ""), ("c", "f")]


def test_importing_the_library_is_cheap():
    code = """
import json, sys, time
began = time.perf_counter()
import gptoss_workbench
took = time.perf_counter() - began
heavy = sorted({"torch", "xarray", "numpy", "openai_harmony", "plotly", "IPython", "ipywidgets"} & set(sys.modules))
print(json.dumps({"took": took, "heavy": heavy, "names": len(dir(gptoss_workbench))}))
"""
    found = [json.loads(run_python(code)) for _ in range(3)]
    assert found[0]["heavy"] == []
    assert min(one["took"] for one in found) < IMPORT_SECONDS


def test_loading_the_extension_is_cheap():
    code = """
import sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.run_line_magic("load_ext", "gptoss_workbench")
shell.run_line_magic("gptoss", "help")
print(sorted({"torch", "xarray", "openai_harmony", "plotly", "ipywidgets", "anywidget"} & set(sys.modules)))
"""
    assert run_python(code).splitlines()[-1] == "[]"


def test_every_public_name_is_there():
    code = "import gptoss_workbench as wb\nprint([name for name in wb.__all__ if not hasattr(wb, name)])"
    assert run_python(code).strip() == "[]"


def test_no_folder_shadows_another_package():
    for folder in ("workbench", "kernels", "extensions", "tests", "notebooks"):
        assert not (ROOT / folder / "__init__.py").exists(), f"{folder}/ must not be a package"
    code = """
import importlib.util
spec = importlib.util.find_spec("kernels")
print(spec is None or spec.origin is None or "site-packages" in spec.origin)
"""
    assert run_python(code, cwd=ROOT).strip() == "True"


# files ----------------------------------------------------------------------------------------------------------


def test_no_file_is_too_long():
    every = [*ROOT.glob("tests/**/*.py"), *(path for package in PACKAGES for path in PACKAGES[package].rglob("*.*"))]
    text = [path for path in every if path.suffix in (".py", ".js", ".css")]
    assert [str(p.relative_to(ROOT)) for p in text if len(p.read_text().splitlines()) > LONGEST] == []


def test_nothing_is_loaded_from_elsewhere():
    names = re.compile(r"unpkg|jsdelivr|cdnjs|googleapis|skypack|esm\.sh|cdn\.plot", re.IGNORECASE)
    address = re.compile(r"https?://(?!www\.w3\.org/)|@import|importScripts")
    wrong = []
    for package in PACKAGES:
        for path in [*python_files(package), *data_files(package)]:
            if path.suffix in (".py", ".js", ".css", ".html", ".svg", ".json"):
                text = path.read_text()
                if names.search(text) or (path.suffix != ".py" and address.search(text)):
                    wrong.append(str(path.relative_to(ROOT)))
    assert wrong == []


def test_nothing_is_pickled():
    """Nothing that could run code when it is read. The training loop's own resume file is read as weights only."""
    calls = re.compile(r"\btorch\.save\(|torch\.load\((?!.*weights_only=True)|allow_pickle=True|_pickle\(")
    found = {
        (path.relative_to(ROOT).as_posix(), hit) for package in PACKAGES for path in python_files(package)
        for hit in calls.findall(path.read_text())
    }
    assert found <= {("workbench/gptoss_workbench/nano/train.py", "torch.save(")}


def test_the_tested_set_pins_what_is_asked_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = {canonicalize_name(pin.name): pin.specifier for pin in map(Requirement, lines)}
    for need in map(Requirement, asked):
        if canonicalize_name(need.name) != canonicalize_name(project["name"]):
            pin = pins[canonicalize_name(need.name)]
            (version,) = (one.version for one in pin)
            assert need.specifier.contains(version), f"constraints.txt pins {need.name}{pin}, {need} is asked for"
    torch = next(need for need in map(Requirement, asked) if need.name == "torch")
    assert torch.specifier.contains("2.11.0"), "torch 2.11 is common on GPU machines"


def test_every_command_that_is_documented_exists():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    documented = set(re.findall(r"^\s*make ([a-z]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert {"lab", "test"} <= documented <= targets
    listed = subprocess.run(["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    assert targets - {"help"} == set(re.findall(r"^make ([a-z]+)", listed, re.MULTILINE))


# the wheel ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob("*.whl")
    return made


def test_the_wheel_holds_all_of_the_packages_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"{package}/{path.relative_to(PACKAGES[package]).as_posix()}"
        for package in PACKAGES for path in [*python_files(package), *data_files(package)]
    }
    assert "gptoss_workbench/nano/assets/model.safetensors" in expected
    assert any(name.endswith(".js") for name in expected) and any(name.endswith(".css") for name in expected)
    information = {name for name in names if ".dist-info/" in name}
    assert names - information == expected
    assert {"LICENSE", "NOTICE"} <= {Path(name).name for name in information}
    assert wheel.stat().st_size < 10_000_000


def test_the_version_is_the_same_everywhere(wheel):
    import gptoss_workbench as wb

    assert wheel.name.startswith(f"gptoss_workbench-{wb.__version__}-")
    assert f"\nversion: {wb.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_wheel_works_from_another_folder(wheel, tmp_path):
    """In an environment that holds the wheel alone; its dependencies come from the one that runs the tests."""
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    # A .pth line adds a folder without reading the .pth files in it, so no editable install comes along.
    (site / "dependencies.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    code = """
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.run_cell("%load_ext gptoss_workbench").raise_error()
shell.run_cell('%gptoss ask "What is 27 + 58?" --max-tokens 8').raise_error()
import gptoss_jupyter, gptoss_kernels, gptoss_workbench
for module in gptoss_jupyter, gptoss_kernels, gptoss_workbench:
    print(module.__file__)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["IPYTHONDIR"] = str(tmp_path / "ipython")
    command = [str(python), "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cut off after 8 tokens" in done.stdout
    assert all(line.startswith(str(site)) for line in done.stdout.splitlines()[-3:]), done.stdout


def test_the_picture_of_speed_shows_the_figures():
    from tests.benchmarks import plot

    assert plot.PICTURE.read_text(encoding="utf-8") == plot.picture(json.loads(plot.RESULT.read_text(encoding="utf-8")))
