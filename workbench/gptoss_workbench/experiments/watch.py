"""How an experiment of many passes is followed: what it will cost, how far it is, when to stop, where to go on."""

from __future__ import annotations

import hashlib
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from gptoss_workbench.errors import ExperimentError
from gptoss_workbench.hooks.edits import Edit
from gptoss_workbench.model.describe import describe
from gptoss_workbench.model.memory import gigabytes
from gptoss_workbench.model.model import Model

MEMORY = 1 << 30
"""Bytes that a sweep may take beside the weights, unless told otherwise."""


@dataclass(frozen=True)
class Cost:
    """What an experiment will ask of the model, known before it starts.

    Attributes:
        passes: prompts read; one that is read again, edited or not, counts again.
        tokens: how many they have together; of a token that is computed in some layers only, that part.
        generated: the most tokens that are generated on top.
        nbytes: of memory beside the weights.
        at_most: True where what the model does decides how much of this is needed.
    """

    passes: int
    tokens: int
    generated: int = 0
    nbytes: int = 0
    at_most: bool = False

    def __str__(self) -> str:
        most = "at most " * self.at_most
        more = f", up to {self.generated:,} generated on top" if self.generated else ""
        kept = f"; {gigabytes(self.nbytes)} kept" if self.nbytes else ""
        return f"{most}{self.passes:,} passes over {self.tokens:,} tokens{more}{kept}"


@dataclass(frozen=True)
class Watch:
    """How somebody follows an experiment.

    Attributes:
        on_plan: told the ``Cost`` before anything runs.
        on_progress: told (done, in all) after each batch.
        should_stop: asked before each batch, by sweeps before each half of a layer; True ends early and leaves NaN
            where nothing was computed.
        memory: bytes that may be taken beside the weights.
    """

    on_plan: Callable[[Any], object] | None = None
    on_progress: Callable[[int, int], object] | None = None
    should_stop: Callable[[], bool] | None = None
    memory: int = MEMORY

    def plan(self, cost: Cost) -> None:
        if self.on_plan is not None:
            self.on_plan(cost)

    def stopped(self) -> bool:
        return self.should_stop is not None and self.should_stop()

    def done(self, done: int, of: int) -> None:
        if self.on_progress is not None:
            self.on_progress(done, of)


def identity(model: Model, *parts: object) -> str:
    """Short digest of what an experiment asks, so that nothing goes on from the results of another question.

    Args:
        parts: all that decides the result. Edits count by content, functions by name and source.
    """
    origin = None if model.origin is None else model.origin.digest
    said = repr((model.name, origin, model.dtype, model.config, _said(parts)))
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _said(part: object) -> str:
    if isinstance(part, list | tuple):
        return f"[{', '.join(map(_said, part))}]"
    return repr(describe(part) if isinstance(part, Edit) or callable(part) else part)


def completeness(done: int, of: int, what: str) -> dict[str, object]:
    """The attrs of a result that say whether it is all there: ``complete``, and ``missing`` where somebody stopped."""
    return {"complete": True} if done >= of else {"complete": False, "missing": f"{of - done:,} of {of:,} {what}"}


def resumed(
    earlier: xr.DataArray | xr.Dataset | None, question: str, shape: tuple[int, ...], name: str | None = None,
    dtype: type[np.floating] = np.float32,
) -> np.ndarray:
    """The values to go on from: those of an earlier result, or NaN everywhere.

    Args:
        name: which variable of a Dataset.

    Raises:
        ExperimentError: the earlier result answers another question.
    """
    if earlier is None:
        return np.full(shape, np.nan, dtype=dtype)
    check_question(earlier, question)
    values = earlier if name is None else earlier[name]
    return np.array(values.values, dtype=dtype).reshape(shape)  # type: ignore[union-attr]


def check_question(earlier: xr.DataArray | xr.Dataset, question: str) -> None:
    """Raises ExperimentError unless a result answers this question, in words of ``identity``."""
    if earlier.attrs.get("question") != question:
        raise ExperimentError(
            "That result can't be resumed here: it was asked something else.", expected=f"question {question}",
            got=f"question {earlier.attrs.get('question')}",
            hint="Pass the model and the arguments that it was made with.",
        )


class ProgressLine:
    """``on_progress=wb.ProgressLine()`` keeps one line up to date: how far, how long still, how much memory.

    The time left supposes that what is left goes as fast as what was done.
    """

    def __init__(self, stream: object = None) -> None:
        self._stream, self._begun = stream or sys.stderr, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        left = (time.monotonic() - self._begun) / max(1, done) * (total - done)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        line = f"{done:,} of {total:,} runs, {left:.0f} s left, at most {gigabytes(peak)} of memory so far"
        print(f"\r{line:<80}", end="\n" if done >= total else "", file=self._stream, flush=True)  # type: ignore[call-overload]
