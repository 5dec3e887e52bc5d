"""One pass of the model, noted down and played again: thousands of calls from Python become a few.

In decoding, what Python does between two products takes as long as half of the products, because the weights have just
swept its memory out of the processor's caches. A recording has no Python in it. Tasks that follow one another become a
chain (``compiled.chain``), which is one call; an operation of torch in between is called again with the same tensors,
and what it gives is written where it was the first time. So the memory of a recording is what its pass used, and
everything that changes from pass to pass lies in tensors that were there before.

What a recording can't know is refused: reading a number back, or making a tensor from a number in Python.
"""

from __future__ import annotations

import ctypes
import threading
from array import array
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gptoss_kernels.cpu import compiling, team
from gptoss_kernels.cpu.compiling import FIELDS

_READING = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::lift_fresh", "aten::lift_fresh_copy",
            "aten::masked_select", "aten::bincount", "aten::is_nonzero"}
_CHOOSING = {"aten::index", "aten::index_put", "aten::index_put_"}
"""These count where a mask is True, and read the number back."""

_MEMORY = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}

_own = threading.local()


class NotRecordable(RuntimeError):
    """Something in the pass reads a number back; played again, it would go on with the old one."""


def active() -> bool:
    """Whether a pass is being noted down in this thread."""
    return getattr(_own, "notes", None) is not None


def note(task: int, told: array[int]) -> None:
    """Note a task and its fields, before it runs."""
    if active():
        _own.notes.tasks(task, told)


def refuse(what: str) -> None:
    """Say that something can't be part of a recording.

    Raises:
        NotRecordable: a pass is being noted down.
    """
    if active():
        raise NotRecordable(f"{what} can't be recorded: a number is read back")


class Recording:
    """Made from a function without arguments, which runs once; ``play`` does the same to the same tensors."""

    def __init__(self, body: Callable[[], None], device: torch.device) -> None:
        notes = _Notes()
        _own.notes = notes
        try:
            with notes:
                body()
        finally:
            _own.notes = None
        self._kept, self._steps = notes.kept, notes.steps

    @torch.no_grad()
    def play(self) -> None:
        for step in self._steps:
            step.play()


class Chain:
    """Tasks that follow one another, in one call."""

    def __init__(self) -> None:
        self._tasks, self._told, self._most = array("q"), array("q"), 1
        self._call: _Call | None = None

    def add(self, task: int, told: array[int]) -> None:
        self._tasks.append(task)
        self._told.extend(told)
        self._most = max(self._most, told[1])

    def play(self) -> None:
        if self._call is None:
            self._call = self._ready()
        self._call.fields[:, 0] = self._call.head[0] = 0  # the counters
        team.run(self._call.task, self._call.head.ctypes.data, self._most)

    def _ready(self) -> _Call:
        """What the call needs; made once, when no task is added any more."""
        count = len(self._tasks)
        fields, inside = np.array(self._told, np.int64).reshape(count, FIELDS), np.zeros(count, np.int64)
        head = np.zeros(FIELDS, np.int64)
        head[1:7] = (self._most, count, self._tasks.buffer_info()[0], fields.ctypes.data, inside.ctypes.data,
                     _give_way())
        return _Call(compiling.task("chained", 0), head, fields, inside)


class _Call(NamedTuple):
    """The compiled chain and the memory it works on, whose addresses stand in ``head``."""

    task: int
    head: np.ndarray
    fields: np.ndarray
    inside: np.ndarray


class _Operation:
    """An operation of torch, to be called again."""

    def __init__(self, function: Any, args: Any, kwargs: Any, results: list[Tensor]) -> None:
        self._function, self._args, self._kwargs, self._results = function, args, kwargs, results

    def play(self) -> None:
        again = self._function(*self._args, **self._kwargs)
        if self._results:
            for old, new in zip(self._results, (x for x in tree_leaves(again) if isinstance(x, Tensor)), strict=True):
                old.copy_(new)


class _Notes(TorchDispatchMode):
    """Sees every operation of torch, and is told every task.

    Attributes:
        kept: every tensor that came up: their addresses are in the fields.
        steps: what is to be played.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []
        self.steps: list[Chain | _Operation] = []

    def tasks(self, task: int, told: array[int]) -> None:
        if not self.steps or not isinstance(self.steps[-1], Chain):
            self.steps.append(Chain())
        self.steps[-1].add(task, told)  # type: ignore[union-attr]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        masked = name in _CHOOSING and any(one is not None and one.dtype == torch.bool for one in args[1])
        if name in _READING or masked:
            raise NotRecordable(f"{name} can't be recorded: a number is read back, or taken from Python")
        out = func(*args, **kwargs)
        found = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.kept += found
        returns = [one.alias_info for one in func._schema.returns]
        if name in _MEMORY or (returns and all(one is not None and not one.is_write for one in returns)):
            return out  # memory alone, or another view of it
        writes = any(one.alias_info is not None and one.alias_info.is_write for one in func._schema.arguments)
        self.steps.append(_Operation(func, args, kwargs, [] if writes else found))
        return out


@cache
def _give_way() -> int:
    """The address of a function that lets another thread have the core; 0 where there is none."""
    try:
        return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0
    except (AttributeError, OSError, TypeError):  # Windows
        return 0
