"""Every implementation of the kernels goes through the files of this folder. ``test_specification.py`` starts them.

``GPTOSS_TEST_KERNELS`` names the implementation. Triton's run on a GPU where there is one, else, with
``TRITON_INTERPRET=1``, on the processor.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from gptoss_kernels import select
from tests.kernels.specification.guard import Guard

NAME = os.environ.get("GPTOSS_TEST_KERNELS", "reference")


@pytest.fixture(scope="session")
def device() -> torch.device:
    on_gpu = NAME == "triton" and not os.environ.get("TRITON_INTERPRET") and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


@pytest.fixture(scope="session")
def kernels(device: torch.device) -> ModuleType:
    """The implementation under test."""
    return select.load(NAME, device, torch.float32)


@pytest.fixture(autouse=True)
def guard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guard]:
    """Every tensor that a kernel's launcher makes lies between canaries, which must be alive at the end."""
    guard = Guard()
    guard.watch(monkeypatch)
    yield guard
    monkeypatch.undo()
    guard.check()


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
