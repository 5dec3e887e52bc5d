"""Benchmarks are collected only when their folder is asked for: ``pytest tests/benchmarks -s``."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent

# The lab and the browser are those of the browser tests.
_spec = importlib.util.spec_from_file_location("browser_fixtures", HERE.parent / "browser" / "conftest.py")
assert _spec is not None and _spec.loader is not None
_browser = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_browser)
chromium, lab_root, lab_url, lab_page, screenshots = (
    _browser.chromium, _browser.lab_root, _browser.lab_url, _browser.lab_page, _browser.screenshots)


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    asked = any("benchmarks" in str(arg) for arg in parent.config.args)
    named = parent.session.isinitpath(file_path)  # pytest collects what is named itself
    if asked and not named and file_path.suffix == ".py" and file_path.name.startswith("bench_"):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


@pytest.fixture(scope="session")
def machine() -> dict[str, Any]:
    """What the numbers were measured on: processor, cores, memory, system."""
    cpu = platform.processor() or platform.machine()
    memory = None
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    return {"cpu": cpu, "cores": os.cpu_count(), "memory_gib": memory, "system": platform.system(),
            "python": platform.python_version()}


@pytest.fixture(scope="session")
def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = ("torch", "jupyterlab", "ipykernel", "ipywidgets", "anywidget", "playwright")
    return {name: version(name) for name in names}


@pytest.fixture(scope="session")
def results() -> Path:
    """Where benchmarks leave their numbers."""
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    return folder
