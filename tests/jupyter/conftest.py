"""An IPython shell of its own for each test that wants one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def shell(tmp_path, monkeypatch) -> Iterator:
    """The process's IPython shell, fresh, without history or start-up files, with the extension loaded."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    InteractiveShell.clear_instance()
    made = InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
    manager = made.extension_manager
    assert manager is not None and manager.load_extension("gptoss_workbench") is None
    yield made
    InteractiveShell.clear_instance()
