"""What every experiment made of many runs tells while it works, and how it goes on where it was stopped."""

from __future__ import annotations

import hashlib
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr

from gptoss_workbench.errors import ExperimentError
from gptoss_workbench.experiments.metrics import Metric
from gptoss_workbench.experiments.sweeps.engine import MEMORY, Case, Engine, SweepPlan
from gptoss_workbench.hooks.edits import Edit
from gptoss_workbench.model.memory import gigabytes
from gptoss_workbench.model.model import Model


@dataclass(frozen=True)
class Watch:
    """How somebody follows an experiment.

    Attributes:
        on_plan: told what it will cost, before anything of it runs.
        on_progress: told (cases done, cases in all) after each wave.
        should_stop: asked before each half of a layer; True ends early and leaves NaN where nothing was computed.
        memory: bytes that may be taken beside the weights.
    """

    on_plan: Callable[[SweepPlan], object] | None = None
    on_progress: Callable[[int, int], object] | None = None
    should_stop: Callable[[], bool] | None = None
    memory: int = MEMORY


@torch.no_grad()
def fill(
    model: Model, prompts: Sequence[Sequence[int]], cases: Sequence[Case], metrics: Sequence[Sequence[Metric]],
    values: np.ndarray, watch: Watch, always: Sequence[Sequence[Edit]] | None = None,
) -> None:
    """Measure every case whose values are not there yet.

    Args:
        metrics: those of each prompt, equally many.
        values: (metric, case) float32, NaN where to measure; written into as results come.
        always: see ``Engine``.
    """
    todo = np.flatnonzero(np.isnan(values).any(0)).tolist()
    engine = Engine(model, prompts, [cases[case] for case in todo], always, watch.memory)
    if watch.on_plan is not None:
        watch.on_plan(engine.plan)
    done = len(cases) - len(todo)
    for numbers, logits in engine.stream(watch.should_stop):
        of = np.array([cases[todo[number]].prompt for number in numbers])
        for prompt in np.unique(of).tolist():
            rows = np.flatnonzero(of == prompt)
            at = [todo[numbers[row]] for row in rows]
            for index, metric in enumerate(metrics[prompt]):
                values[index, at] = metric.of(model, logits[rows]).float().cpu().numpy()
        done += len(numbers)
        if watch.on_progress is not None:
            watch.on_progress(done, len(cases))


def identity(model: Model, *parts: object) -> str:
    """Short digest of what an experiment asks, so that nothing goes on from the results of another question."""
    said = repr((model.name, model.dtype, model.config, parts))
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def resumed(earlier: xr.DataArray | None, shape: tuple[int, ...], question: str) -> np.ndarray:
    """The values to go on from: those of an earlier result, or NaN everywhere.

    Raises:
        ExperimentError: the earlier result answers another question.
    """
    if earlier is None:
        return np.full(shape, np.nan, dtype=np.float32)
    if earlier.attrs.get("question") != question or earlier.shape != shape:
        raise ExperimentError(
            "That result can't be resumed here: it was asked something else.",
            expected=f"question {question}, shape {shape}",
            got=f"question {earlier.attrs.get('question')}, shape {earlier.shape}",
            hint="Pass the same model, prompts, places and metrics as before, and normalize=False both times.",
        )
    return np.array(earlier.values, dtype=np.float32)


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
