"""Compiled tasks by name, each made when it is first asked for; numba is not imported before."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

from gptoss_kernels.cpu import codecache

FIELDS = 20
"""Numbers that a task is told; as in ``compiled.tasks``."""

_compiling = threading.Lock()
_kept: list[Any] = []


@cache
def task(kind: str, way: int) -> int:
    """The address of a compiled task of ``gptoss_kernels.cpu.compiled``."""
    with _compiling, codecache.keeping() as keep:
        _kept.append(maker(kind)(way, keep))
        return _kept[-1].address


def maker(kind: str) -> Callable[[int, bool], Any]:
    """The function of ``gptoss_kernels.cpu.compiled`` that compiles a task, for a way and perhaps to keep it."""
    from gptoss_kernels.cpu.compiled import chain, looks, packing, panels, routing, small, tasks

    rooms = tasks, small, looks, routing, panels, packing, chain
    return next(getattr(room, kind) for room in rooms if hasattr(room, kind))
