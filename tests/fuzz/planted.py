"""Loaders with a fault, to see that the mutation run finds it."""

from __future__ import annotations

import os
import time
from pathlib import Path

from gptoss_workbench.errors import WorkbenchError
from tests.fuzz import bases


def _good(folder: Path) -> bool:
    return folder.parent.name.startswith("bases-")


def crash(folder: Path, base: str) -> str:
    if not _good(folder):
        os.abort()
    return "base"


def hang(folder: Path, base: str) -> str:
    if not _good(folder):
        time.sleep(3600)
    return "base"


def silent(folder: Path, base: str) -> str:
    return bases.load(folder, base) if _good(folder) else "another model"


def unclear(folder: Path, base: str) -> str:
    if not _good(folder):
        raise KeyError(base)
    return "base"


def long_winded(folder: Path, base: str) -> str:
    if not _good(folder):
        raise WorkbenchError("\n".join("no" * 9))
    return "base"


def greedy(folder: Path, base: str) -> str:
    if not _good(folder):
        return str(len(bytearray(4 << 30)))
    return "base"
