"""One tiny random model for all the tests of hooks, in both dtypes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import gptoss_workbench as wb
from tests.factories import tiny_model, write_hf


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("hooks"), tiny_model(seed=6))


@pytest.fixture(scope="session")
def small(folder: Path):
    """float32, 4 layers, 8 experts (top 4), 8 heads, 2 key heads, window 8."""
    return wb.load(folder, dtype="float32")


@pytest.fixture(scope="session")
def small_bf16(folder: Path):
    return wb.load(folder, dtype="bfloat16")


@pytest.fixture(scope="session")
def ids() -> list[int]:
    return torch.randint(512, (20,), generator=torch.Generator().manual_seed(4)).tolist()
