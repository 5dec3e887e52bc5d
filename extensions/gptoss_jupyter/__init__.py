"""The notebook face of gptoss-workbench: ``%load_ext gptoss_workbench`` gives the ``%gptoss`` magics."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

__all__ = ["load_ipython_extension", "unload_ipython_extension"]


def load_ipython_extension(ipython: InteractiveShell) -> None:
    """Register the magics and their completion; a second call changes nothing."""
    from gptoss_jupyter import completion, magics

    magics.register(ipython)
    completion.register(ipython)


def unload_ipython_extension(ipython: InteractiveShell) -> None:
    """Take everything away again: magics, completion, open dashboards. IPython does none of it by itself."""
    from gptoss_jupyter import completion, lifetime, magics

    completion.unregister(ipython)
    magics.unregister(ipython)
    lifetime.close_all()
