"""Fixtures and settings that every test may use."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    # The same examples in every run, and no deadline: the machine that tests is often busy.
    settings.register_profile("house", deadline=None, derandomize=True, database=None)
    settings.load_profile("house")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The top folder of the repository."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def model():
    """The embedded model, loaded once. Edits and captures go to a call, so sharing it is safe."""
    import gptoss_workbench as wb

    return wb.load()
