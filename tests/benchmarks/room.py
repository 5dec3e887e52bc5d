"""Whether a machine can hold a model of gpt-oss-20b's shape for a while."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

DISK, MEMORY = 15_000_000_000, 15_500_000_000
"""Bytes: one model of that shape at a time, and what is resident while it decodes."""


def skip_without_room(folder: Path) -> None:
    free, memory = shutil.disk_usage(folder).free, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if free < DISK:
        pytest.skip(f"needs {DISK / 1e9:.0f} GB of disk at {folder} for a while; {free / 1e9:.1f} GB are free")
    if memory < MEMORY:
        pytest.skip(f"needs {MEMORY / 1e9:.1f} GB of memory; this machine has {memory / 1e9:.1f} GB")
