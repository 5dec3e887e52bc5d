"""Many edits, each tried alone: what every one of them does to the prediction after the last token.

The answers are those of one ``model.run`` after the other; the work is not. A run is computed only where an edit can
have changed it: from its first layer and token on, and only as far as the last token can see. The rest comes from the
prompt's own run, and what is left of all edits goes through each layer together. Exact, by causality alone: nothing is
approximated, so results differ from a loop's by the rounding of sums in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import xarray as xr

from gptoss_workbench.errors import EditError
from gptoss_workbench.experiments.metrics import Metric, names_of
from gptoss_workbench.experiments.sweeps.engine import Case, Engine, SweepPlan
from gptoss_workbench.experiments.sweeps.fill import fill
from gptoss_workbench.experiments.watch import MEMORY, Watch, completeness, identity, resumed
from gptoss_workbench.hooks.edits import Edit
from gptoss_workbench.model.model import Model, Prompt, _as_batch
from gptoss_workbench.model.provenance import with_method
from gptoss_workbench.model.run import Run


def sweep(
    model: Model, prompt: Prompt | Sequence[Prompt], edits: Sequence[Edit | Sequence[Edit]],
    metric: Metric | Sequence[Metric], *, always: Sequence[Edit] | Edit = (), resume: xr.DataArray | None = None,
    on_plan: Callable[[SweepPlan], object] | None = None, on_progress: Callable[[int, int], object] | None = None,
    should_stop: Callable[[], bool] | None = None, memory: int = MEMORY,
) -> xr.DataArray:
    """The metrics after the last token of each prompt under each edit alone.

    Args:
        prompt: as for ``model.run``; of a list, every prompt is tried with every edit.
        edits: each an edit, or a list of edits that are made together. ``prompt=`` in an edit has no meaning here.
        metric: e.g. ``wb.logit_diff(" Paris", " Rome")``, or several.
        always: edits of every run, also of the one that the others start from; at a common place they act first.
        resume: an earlier result of the same question, stopped or not: only what is NaN in it is computed.
        on_plan: called with a ``SweepPlan`` before anything runs; print it to know the cost.
        on_progress: called with (runs done, runs in all) after each wave; ``wb.ProgressLine()`` shows time left.
        should_stop: asked between prompts and layers; True ends early and leaves NaN where nothing was computed.
            Resumed with the same ``memory``, the rest has the bits that it would have had.
        memory: bytes to stay within, beside the weights, as far as one prompt and one edit allow.

    Returns:
        float32 (edit), with ``prompt`` and ``metric`` before it where lists were given; ``edit`` is the number in the
        list, ``what`` its text. attrs hold ``base``, the metrics without the edits, whether it is ``complete`` (else
        what is ``missing``), and the provenance as JSON.

    Raises:
        EditNeverFired: an edit's place never came by; as one ``model.run`` would say.
        ExperimentError: ``resume`` is of another question.
    """
    prompts = _as_batch(prompt)
    rows = [model.encode(one) for one in ([prompt] if prompts is None else prompts)]
    lists = [(edit,) if isinstance(edit, Edit) else tuple(edit) for edit in edits]
    if not lists or not all(lists):
        raise EditError("A sweep needs edits.", expected="a list of edits, or of lists of edits, none empty",
                        got=repr(edits)[:80])
    metrics = [metric] if isinstance(metric, Metric) else list(metric)
    always = (always,) if isinstance(always, Edit) else tuple(always)
    cases = [Case(number, some) for number in range(len(rows)) for some in lists]
    whole = (len(metrics), len(rows), len(lists))
    squeezed = tuple(axis for axis, one in enumerate((isinstance(metric, Metric), prompts is None)) if one)
    shape = tuple(size for axis, size in enumerate(whole) if axis not in squeezed)
    question = identity(model, "sweep", rows, lists, [one.name for one in metrics], always)
    values = resumed(resume, question, shape).reshape(len(metrics), -1)
    wanted, watch = np.any(np.isnan(values), axis=0), Watch(on_plan, on_progress, should_stop, memory)
    engine = Engine(model, rows, cases, [always] * len(rows), memory, wanted)
    watch.plan(engine.plan.beside([*map(len, rows)]))
    base = np.full((len(metrics), len(rows)), np.nan)
    for number, ids in enumerate(rows):
        if watch.stopped():
            break
        logits = model.run(ids, edits=always).logits[-1:]
        base[:, number] = [float(one.of(model, logits)) for one in metrics]
    else:
        fill(model, engine, [metrics] * len(rows), values, watch)
    known = int((~np.isnan(values)).all(0).sum())
    record = Run(model, rows[0], torch.empty(0), {}, range(len(rows[0])), always).provenance
    what = np.empty(len(lists), dtype=object)
    what[:] = [", ".join(map(repr, some)) for some in lists]
    dims = tuple(dim for axis, dim in enumerate(("metric", "prompt", "edit")) if axis not in squeezed)
    coords = {"metric": names_of(metrics), "prompt": range(len(rows)), "edit": range(len(lists))}
    return xr.DataArray(
        values.reshape(shape), dims=dims, name=metrics[0].name if isinstance(metric, Metric) else "metrics",
        coords={**{dim: coords[dim] for dim in dims}, "what": ("edit", what)},
        attrs={"base": np.squeeze(base, axis=squeezed).tolist(), "model": model.name, "question": question,
               **completeness(known - bool(np.isnan(base).any()), len(cases), "runs"),
               "provenance": with_method(record, "sweep", edits=what.tolist(), prompts=rows,
                                         metric=[one.name for one in metrics])},
    )
