"""What all browser views share: how their files are read and how new data reaches the page."""

from __future__ import annotations

import base64
import json
import threading
from functools import cache
from importlib import resources
from typing import Any

import anywidget
import numpy as np
import traitlets

from gptoss_workbench.plots import colour


@cache
def _file(name: str) -> str:
    return resources.files("gptoss_jupyter.views").joinpath(name).read_text(encoding="utf-8")


def module(name: str) -> str:
    """A view's whole browser module: the colour tables, the shared helpers, then its own file."""
    signed = {theme: _base64(colour.diverging(theme)) for theme in ("light", "dark")}
    tables = f"const PALETTE = '{_base64(colour.sequential())}';\nconst SIGNED_TABLES = {json.dumps(signed)};"
    return f"{tables}\n{_file('common.js')}\n{_file(name + '.js')}"


def _base64(table: np.ndarray) -> str:
    return base64.b64encode(table.tobytes()).decode()


def style(*names: str) -> str:
    """A view's style sheet: the shared one, then its own."""
    return "\n".join(_file(f"{name}.css") for name in ("common", *names))


class View(anywidget.AnyWidget):
    """A picture in the page. The kernel holds the data; ``show`` sends a new state and paints it once.

    The root element carries ``data-seq``, which becomes ``seq`` after that state has been painted.
    """

    seq = traitlets.Int(0).tag(sync=True)
    title = traitlets.Unicode("").tag(sync=True)
    empty = traitlets.Unicode("").tag(sync=True)
    stale = traitlets.Bool(False).tag(sync=True)

    def __init__(self, **traits: Any) -> None:
        self._guard = threading.RLock()
        super().__init__(**traits)

    def show(self, **traits: Any) -> None:
        """Set the given traits in one message and have the page paint them; callable from any thread."""
        with self._guard, self.hold_sync():
            for name, value in traits.items():
                setattr(self, name, value)
            self.seq += 1

    def set_state(self, sync_data: dict) -> None:
        """Take what the page sent; never in the middle of a ``show`` from another thread."""
        with self._guard:
            super().set_state(sync_data)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.title!r})" if self.title else f"{type(self).__name__}()"
