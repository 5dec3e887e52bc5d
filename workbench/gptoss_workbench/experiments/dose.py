"""Dose and response: what steering does as it grows stronger, to what it is meant for and to everything else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from gptoss_workbench.errors import ExperimentError
from gptoss_workbench.experiments.metrics import Metric
from gptoss_workbench.experiments.reading import batches
from gptoss_workbench.experiments.uncertainty import LEVEL, mean_interval
from gptoss_workbench.experiments.watch import Cost, Watch, completeness, identity, resumed
from gptoss_workbench.hooks.edits import Edit, steer
from gptoss_workbench.hooks.selection import Indices
from gptoss_workbench.model.generation import Generation
from gptoss_workbench.model.model import Model, Prompt
from gptoss_workbench.model.provenance import with_method

TARGET = "target"
STEERED = "steered"

Measure = Metric | Callable[[Generation], float]
EditOfScale = Callable[[float], "Edit | Sequence[Edit]"]


@dataclass(frozen=True)
class _Task:
    """Prompts with what is measured on them."""

    name: str
    rows: list[list[int]]
    measure: Measure


@torch.no_grad()
def dose_response(
    model: Model, what: xr.DataArray | EditOfScale, scales: Sequence[float], prompts: Sequence[Prompt],
    metric: Measure, *, side_tasks: Mapping[str, tuple[Sequence[Prompt], Measure]] | None = None,
    tokens: Indices = None, controls: int = 0, max_tokens: int = 64, seed: int = 0, resume: xr.Dataset | None = None,
    on_plan: Callable[[Cost], object] | None = None, on_progress: Callable[[int, int], object] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> xr.Dataset:
    """How an effect and its side effects grow with the strength of an edit.

    After Turner et al. 2023 (arXiv 2308.10248) and Rimsky et al. 2024 (arXiv 2312.06681), who steer in doses.

    Args:
        what: one layer of a direction, e.g. ``wb.contrast(...).sel(layer=3)``, added at its site by ``wb.steer``; or a
            function of a scale that gives an edit or several, e.g. ``lambda s: wb.scale_sink(s)``.
        scales: the strengths; 0 is what "no effect" is measured against, so it is added where it is missing.
        prompts: those the edit is meant for.
        metric: a ``wb.Metric``, read after the last token; or a function of a ``Generation`` that gives a number, such
            as ``lambda gen: "sorry" in gen.text("final")``, for which each prompt is answered greedily.
        side_tasks: what should stay as it is: name -> (prompts, metric or function).
        tokens: which tokens a direction is added at, e.g. ``wb.where(channel="analysis")``; None for all, generated
            ones too. A function of the scale says that itself.
        controls: how many random directions of the same length are tried beside the direction.
        max_tokens: of an answer.
        seed: of the random directions and of the bootstrap.
        resume: an earlier result of the same question, stopped or not: only what is NaN in it is measured.
        on_plan: told the ``Cost`` of what is left before anything runs.
        on_progress: told (prompts done, prompts in all, over all scales).
        should_stop: asked before each batch; True ends early and leaves NaN where nothing was measured.

    Returns:
        Dataset over ``edit`` ("steered", "random 0", ...), ``task`` ("target", then the side tasks), ``scale`` and
        ``prompt``: ``value`` (edit, task, scale, prompt), NaN beyond a task's prompts; ``mean``, ``low``, ``high``
        (edit, task, scale), with a 95 % bootstrap interval over prompts; ``change``, ``change_low``, ``change_high``,
        the same of each prompt's difference from scale 0. attrs: whether it is ``complete``, else what is ``missing``;
        the provenance.

    Raises:
        ExperimentError: nothing to run, ``what`` is neither a direction nor a function, ``controls`` without one, or
            ``resume`` of another question.
        EditNeverFired: an edit's place never came by, e.g. ``tokens=`` that a prompt has not.

    Pitfalls: large scales break the model, and broken text can count as an effect, so watch the side tasks, and read
    what is said. The interval is over these prompts alone; it says nothing of prompts of another kind. A random
    direction of the same length is a weak control in a stream where few directions carry all the variance.
    """
    tasks = _tasks(model, prompts, metric, side_tasks or {})
    doses = sorted({0.0, *(float(scale) for scale in scales)})
    edits = _edits(what, tokens, controls, seed)
    watch = Watch(on_plan, on_progress, should_stop)
    longest = max(len(task.rows) for task in tasks)
    question = identity(model, doses, [_as_list(edit(dose)) for edit in edits.values() for dose in doses if dose],
                        [(task.name, task.rows, _asked(task.measure)) for task in tasks], max_tokens)
    values = resumed(resume, question, (len(edits), len(tasks), len(doses), longest), "value", np.float64)
    zero = doses.index(0.0)
    order = sorted(range(len(doses)), key=lambda at: (at != zero, at))  # first what all is measured against
    passes = [(at, number, index, batch) for at in order for number in range(1 if at == zero else len(edits))
              for index, task in enumerate(tasks) for batch in batches(task.rows)]
    left = [one for one in passes if np.isnan(values[one[1], one[2], one[0], one[3]]).any()]
    watch.plan(_cost(tasks, left, max_tokens))
    total = sum(len(batch) for *_, batch in passes)
    done = total - sum(len(batch) for *_, batch in left)
    for at, number, index, batch in left:
        if watch.stopped():
            break
        some = () if at == zero else [*edits.values()][number](doses[at])
        values[number, index, at, batch] = _measured(model, tasks[index], batch, some, max_tokens)
        done += len(batch)
        watch.done(done, total)
    values[1:, :, zero] = values[0, :, zero]
    how_far = completeness(done, total, "prompts and doses")
    return _dataset(model, values, [*edits], tasks, doses, seed, how_far, dict(
        what=repr(what.attrs.get("method", what.name)) if isinstance(what, xr.DataArray) else _name(what),
        example=[repr(edit) for edit in _as_list(edits[STEERED](1.0))], metric=_name(metric), controls=controls,
        seed=seed, max_tokens=max_tokens, prompts={task.name: task.rows for task in tasks}), question)


def _dataset(
    model: Model, values: np.ndarray, edits: list[str], tasks: list[_Task], doses: list[float], seed: int,
    how_far: dict[str, object], arguments: dict[str, Any], question: str,
) -> xr.Dataset:
    apart = values - values[:, :, [doses.index(0.0)]]
    parts: dict[str, Any] = {"value": (("edit", "task", "scale", "prompt"), values)}
    for prefix, of in (("", values), ("change_", apart)):
        names = (prefix.rstrip("_") or "mean", f"{prefix}low", f"{prefix}high")
        for name, found in zip(names, mean_interval(of, seed=seed), strict=True):
            parts[name] = (("edit", "task", "scale"), found)
    return xr.Dataset(
        parts, coords={"edit": edits, "task": [task.name for task in tasks], "scale": doses,
                       "metric": ("task", [_name(task.measure) for task in tasks]),
                       "count": ("task", [len(task.rows) for task in tasks])},
        attrs={"level": LEVEL, "model": model.name, "question": question, **how_far,
               "provenance": with_method(model.provenance, "dose_response", scales=doses, **arguments)},
    )


def _tasks(
    model: Model, prompts: Sequence[Prompt], metric: Measure,
    side_tasks: Mapping[str, tuple[Sequence[Prompt], Measure]],
) -> list[_Task]:
    if TARGET in side_tasks:
        raise ExperimentError("A side task can't be called that.", expected="another name", got=repr(TARGET))
    tasks = []
    for name, (asked, measure) in {TARGET: (prompts, metric), **side_tasks}.items():
        if isinstance(asked, str) or not len(asked):
            raise ExperimentError(f"The task {name!r} needs prompts.", expected="a list of prompts",
                                  got=repr(asked)[:80])
        if not callable(measure) and not isinstance(measure, Metric):
            raise ExperimentError(f"The task {name!r} has nothing to measure.", got=type(measure).__name__,
                                  expected="a wb.Metric, or a function of a Generation")
        tasks.append(_Task(name, [model.encode(prompt) for prompt in asked], measure))
    return tasks


def _edits(
    what: xr.DataArray | EditOfScale, tokens: Indices, controls: int, seed: int,
) -> dict[str, EditOfScale]:
    """What is tried, by name: each a function of the scale."""
    if not isinstance(what, xr.DataArray):
        if not callable(what) or controls or tokens is not None:
            raise ExperimentError(
                "That can't be given in doses.", expected="one layer of a direction, or a function of a scale alone",
                got=type(what).__name__ if not callable(what) else "a function with controls= or tokens=",
                hint="controls= and tokens= go with a direction.")
        return {STEERED: what}
    if what.dims != ("d_model",) or "layer" not in what.coords or "site" not in what.attrs:
        raise ExperimentError("A direction is given in doses at one layer.", got=f"dimensions {what.dims}",
                              expected='(d_model) with its layer and site', hint="wb.contrast(...).sel(layer=3)")
    vector = np.array(what.values, dtype=np.float32)  # a copy: torch shares its memory
    site, layer, draw = what.attrs["site"], int(what["layer"]), np.random.default_rng(seed)

    def along(direction: np.ndarray) -> EditOfScale:
        return lambda scale: steer(site, layer=layer, vector=torch.from_numpy(direction), scale=scale, tokens=tokens)

    edits = {STEERED: along(vector)}
    for number in range(controls):
        random = draw.standard_normal(len(vector))
        edits[f"random {number}"] = along((random * np.linalg.norm(vector) / np.linalg.norm(random)).astype(np.float32))
    return edits


def _as_list(edits: Edit | Sequence[Edit]) -> list[Edit]:
    return [edits] if isinstance(edits, Edit) else list(edits)


def _measured(
    model: Model, task: _Task, batch: range, edits: Edit | Sequence[Edit], max_tokens: int,
) -> np.ndarray:
    """The value of each prompt of a batch."""
    rows = [task.rows[number] for number in batch]
    if isinstance(task.measure, Metric):
        logits = _last_logits(model, rows, _as_list(edits))
        return task.measure.of(model, logits).float().cpu().numpy()
    answers = model.generate(rows, edits=_as_list(edits), max_tokens=max_tokens)
    return np.array([float(task.measure(answer.finish())) for answer in answers])


def _last_logits(model: Model, rows: Sequence[Sequence[int]], edits: Sequence[Edit]) -> Tensor:
    runs = model.run(list(rows), edits=edits)
    if any(edit.place.site == "logits" for edit in edits):
        return torch.stack([run.logits[-1] for run in runs])
    return model.transformer.unembed(torch.stack([run.hidden[-1] for run in runs]))


def _cost(tasks: Sequence[_Task], left: Sequence[tuple[int, int, int, range]], max_tokens: int) -> Cost:
    rows = [(tasks[index], tasks[index].rows[number]) for _, _, index, batch in left for number in batch]
    answered = sum(not isinstance(task.measure, Metric) for task, _ in rows)
    return Cost(len(rows), sum(len(row) for _, row in rows), generated=answered * max_tokens)


def _asked(measure: Measure) -> object:
    return measure.name if isinstance(measure, Metric) else measure


def _name(measure: object) -> str:
    return measure.name if isinstance(measure, Metric) else getattr(measure, "__name__", type(measure).__name__)
