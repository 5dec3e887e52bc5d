"""Which dashboards belong to which notebook cell, so that running a cell again closes what it made before."""

from __future__ import annotations

import weakref
from typing import Any, Protocol


class Closable(Protocol):
    def close(self) -> None: ...


_made: dict[str, list[tuple[str, weakref.ref[Any]]]] = {}
_open: weakref.WeakSet[Any] = weakref.WeakSet()


def current_cell() -> tuple[str, str] | None:
    """(cell id, id of this execution) as JupyterLab and Notebook tell the kernel; None elsewhere."""
    try:
        from IPython import get_ipython

        parent = get_ipython().get_parent()  # type: ignore[union-attr]
        return parent["metadata"]["cellId"], parent["header"]["msg_id"]
    except Exception:  # plain Python, plain IPython, or a front end that does not tell
        return None


def adopt(made: Closable, cell: tuple[str, str] | None = None) -> None:
    """Tie ``made`` to the running cell and close what an earlier run of that cell had tied to it.

    Several made by one run of a cell live side by side. Without a cell id nothing is closed.
    """
    _open.add(made)
    cell = cell or current_cell()
    if cell is None:
        return
    name, execution = cell
    for earlier, reference in _made.get(name, []):
        before = reference()
        if earlier != execution and before is not None:
            before.close()
    _made[name] = [pair for pair in _made.get(name, []) if pair[0] == execution and pair[1]() is not None]
    _made[name].append((execution, weakref.ref(made)))


def close_all() -> None:
    """Close everything that was adopted and still lives: the extension is being unloaded."""
    for made in list(_open):
        made.close()
    _open.clear()
    _made.clear()
