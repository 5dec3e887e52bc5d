"""Measuring the cases of a sweep that are not measured yet."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gptoss_workbench.experiments.metrics import Metric
from gptoss_workbench.experiments.sweeps.engine import Engine
from gptoss_workbench.experiments.watch import Watch
from gptoss_workbench.model.model import Model


@torch.no_grad()
def fill(model: Model, engine: Engine, metrics: Sequence[Sequence[Metric]], values: np.ndarray, watch: Watch) -> None:
    """Measure the cases of an engine whose values are not there yet, wave by wave.

    Args:
        metrics: those of each prompt, equally many.
        values: (metric, case) float32, NaN where to measure; written into as results come.
    """
    count = len(engine.cases)
    done = count - int(np.isnan(values).any(0).sum())
    for numbers, logits in engine.stream(watch.should_stop):
        fresh = np.isnan(values[:, numbers]).any(0)
        of = np.array([engine.cases[number].prompt for number in numbers])
        for prompt in np.unique(of[fresh]).tolist():
            rows = np.flatnonzero(fresh & (of == prompt))
            at = [numbers[row] for row in rows]
            for index, metric in enumerate(metrics[prompt]):
                values[index, at] = metric.of(model, logits[rows]).float().cpu().numpy()
        done += int(fresh.sum())
        watch.done(done, count)
