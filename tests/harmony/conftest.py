"""Fixtures of the harmony tests."""

from __future__ import annotations

import pytest

from gptoss_workbench.harmony import Vocabulary, load_vocabulary
from gptoss_workbench.harmony.vocabulary import _packaged


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    return load_vocabulary()


@pytest.fixture(scope="session")
def packaged_ranks() -> list[bytes]:
    return _packaged()
