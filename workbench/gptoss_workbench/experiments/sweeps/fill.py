"""Measuring the cases of a sweep that are not measured yet."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gptoss_workbench.experiments.metrics import Metric
from gptoss_workbench.experiments.sweeps.engine import Case, Engine
from gptoss_workbench.experiments.watch import Watch
from gptoss_workbench.hooks.edits import Edit
from gptoss_workbench.model.model import Model


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
    watch.plan(engine.plan)
    done = len(cases) - len(todo)
    for numbers, logits in engine.stream(watch.should_stop):
        of = np.array([cases[todo[number]].prompt for number in numbers])
        for prompt in np.unique(of).tolist():
            rows = np.flatnonzero(of == prompt)
            at = [todo[numbers[row]] for row in rows]
            for index, metric in enumerate(metrics[prompt]):
                values[index, at] = metric.of(model, logits[rows]).float().cpu().numpy()
        done += len(numbers)
        watch.done(done, len(cases))
