"""Activation patching: put one run's values into another, one place at a time, and see what comes back or is lost.

Methods: Vig et al. 2020 (arXiv 2004.12265), Meng et al. 2022 (arXiv 2202.05262), Zhang & Nanda 2024 (arXiv 2309.16042),
Heimersheim & Nanda 2024 (arXiv 2404.15255).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr

from gptoss_workbench.errors import ExperimentError
from gptoss_workbench.experiments.metrics import Metric, names_of
from gptoss_workbench.experiments.places import Grid, edits_of, grid, outlines
from gptoss_workbench.experiments.sweeps.engine import Case, Engine, SweepPlan
from gptoss_workbench.experiments.sweeps.fill import fill
from gptoss_workbench.experiments.watch import MEMORY, Watch, completeness, identity, resumed
from gptoss_workbench.hooks.edits import Edit
from gptoss_workbench.hooks.selection import Indices
from gptoss_workbench.model.model import Model, Prompt, _as_batch
from gptoss_workbench.model.provenance import with_method
from gptoss_workbench.model.run import Run

Metrics = Metric | Sequence[Metric] | Callable[[int], Metric]


@torch.no_grad()
def patching(
    model: Model, clean: Prompt | Sequence[Prompt], corrupt: Prompt | Sequence[Prompt], site: str = "resid_pre", *,
    metric: Metrics, normalize: bool = True, by: Sequence[str] = ("layer", "token"),
    direction: Literal["denoise", "noise"] = "denoise", layers: Indices = None, tokens: Indices = None,
    heads: Indices = None, kv_heads: Indices = None, experts: Indices = None, neurons: Indices = None,
    resume: xr.DataArray | None = None, on_plan: Callable[[SweepPlan], object] | None = None,
    on_progress: Callable[[int, int], object] | None = None, should_stop: Callable[[], bool] | None = None,
    memory: int = MEMORY,
) -> xr.DataArray:
    """For each place, the metric of one prompt when that place alone holds the other prompt's value.

    Args:
        clean, corrupt: two prompts of equally many tokens, or two lists of prompts (pairs). The metric is read after
            the last token.
        site: where. Any site with tokens: ``resid_pre``, ``attn.out``, ``mlp.out`` for sublayers, ``attn.z`` for
            heads, ``router.logits`` for routing. ``expert.out`` patches what an expert adds to the stream, weight
            included, 0 where it does not serve; ``expert.act`` the same of single neurons.
        metric: e.g. ``wb.logit_diff(" Paris", " Rome")``, ``wb.probability``, ``wb.rank``, ``wb.kl_divergence``, one of
            your own (``wb.Metric``); several; or a function of the pair's number that gives one.
        normalize: give the fraction recovered (denoising: 0 = as corrupt, 1 = as clean) or lost (noising: 0 = as
            clean, 1 = as corrupt); False gives raw metric values.
        by: the dimensions that tell places apart, of ``layer``, ``token``, ``head``, ``kv_head``, ``expert``,
            ``neuron``; a dimension that is not named is patched as one, e.g. a head at all tokens with
            ``by=("layer", "head")``.
        direction: "denoise" puts clean values into the corrupt run (what suffices to bring the answer back), "noise"
            corrupt values into the clean run (what is needed for it).
        layers, tokens, heads, kv_heads, experts, neurons: which of them; None for all.
        resume: an earlier result of the same question: only what is NaN in it is computed. With the same ``memory``
            the result has the bits of one that was never stopped.
        on_plan: called with the cost (``SweepPlan``, the prompts' own runs included) before anything runs.
        on_progress: called with (places patched, places to patch: those that can differ).
        should_stop: asked between prompts and layers; True ends early and leaves NaN where nothing was computed.
        memory: bytes to stay within beside the weights.

    Returns:
        float32 with the dimensions of ``by``, ``pair`` before them for lists and ``metric`` before that for several.
        Tokens of a pair carry the clean prompt's labels, ``corrupt_text`` beside them. attrs hold the metrics' names
        and their values for clean and corrupt, whether it is ``complete`` (else what is ``missing``), and the
        provenance as JSON. ``wb.summarize`` takes the mean over pairs
        with a confidence interval and a permutation test.

    Raises:
        ExperimentError: the prompts differ in length, or normalising would divide by zero, or the site has no such
            dimensions.
        SiteError: the site or an index does not exist.

    Tokens before the first that differs carry the same in both prompts, so nothing is run for them.

    Pitfalls: a high value says that the place carries what differs between the prompts, not that it computes it. What
    noising finds necessary and denoising finds sufficient are different sets where there are backups. Patched attention
    keys or values of one kv head reach every query head that shares it. A patched expert answers for its share of
    ``mlp.out``, not for the routing that sent the token there: that is ``router.logits``. What it finds in circuits
    that are known: docs/truth.md.
    """
    pairs = _pairs(model, clean, corrupt)
    alone = _as_batch(clean) is None
    if direction not in ("denoise", "noise"):
        raise ExperimentError("That is no direction.", expected='"denoise" or "noise"', got=repr(direction))
    selected = {"layer": layers, "token": tokens, "head": heads, "kv_head": kv_heads, "expert": experts,
                "neuron": neurons}
    lengths = [len(pair[0]) for pair in pairs]
    where = [grid(model, site, by, length, selected) for length in lengths]
    if any(one.shape != where[0].shape for one in where):
        raise ExperimentError("The pairs have different lengths, so their tokens don't face each other.",
                              expected='equally long pairs, or tokens= of all, or by= without "token"', got=lengths)
    several = not isinstance(metric, Metric) and not callable(metric)
    asked = [_metrics(metric, pair) for pair in range(len(pairs))]
    names = [one.name for one in asked[0]]
    full = (len(names), len(pairs), *where[0].shape)
    question = identity(model, "patching", pairs, where, [[one.name for one in some] for some in asked], direction,
                        normalize)
    earlier = resumed(resume, question, full).reshape(len(names), -1)
    same = np.concatenate([_same_past(*pair, one) for pair, one in zip(pairs, where, strict=True)])
    at = np.flatnonzero(~same)  # what is to be patched, of all places of all pairs
    into = [pair[1 if direction == "denoise" else 0] for pair in pairs]
    wanted, watch = np.any(np.isnan(earlier[:, at]), axis=0), Watch(on_plan, on_progress, should_stop, memory)

    def engine(edits: Sequence[Sequence[Edit]]) -> Engine:
        every = [Case(number, (edit,)) for number, some in enumerate(edits) for edit in some]
        return Engine(model, into, [every[one] for one in at], memory=memory, wanted=wanted)

    if on_plan is not None:
        plan = engine([outlines(one) for one in where]).plan
        watch.plan(plan.beside([len(ids) for pair in pairs for ids in pair]))
    runs: list[list[Run]] = []
    for pair, one in zip(pairs, where, strict=True):
        if watch.stopped():
            break
        runs.append([model.run(ids, capture=one.captures) for ids in pair])
    ends, made = np.full((len(names), len(pairs), 2), np.nan), earlier  # (metric, pair, clean or corrupt)
    if len(runs) == len(pairs):
        per_pair = [[one.given(runs[pair][0].logits[-1]) for one in some] for pair, some in enumerate(asked)]
        ends = _ends(model, per_pair, runs, normalize)
        start, goal = (ends[..., 1], ends[..., 0]) if direction == "denoise" else (ends[..., 0], ends[..., 1])
        values = np.repeat(start, where[0].count, axis=1).astype(np.float32)  # (metric, pair and place)
        patched = np.where(wanted, np.nan, values[:, at])
        fill(model, engine([edits_of(model, one, *(pair if direction == "denoise" else pair[::-1]))
                            for pair, one in zip(runs, where, strict=True)]), per_pair, patched, watch)
        values[:, at] = patched
        if normalize:
            base, scale = (np.repeat(part, where[0].count, axis=1) for part in (start, goal - start))
            values = ((values - base) / scale).astype(np.float32)
        made = values
        made[:, at] = np.where(wanted, values[:, at], earlier[:, at])
    found = made.reshape((*full[:1][: int(several)], *full[1:2][: int(not alone)], *full[2:]))
    dims = (*("metric",) * several, *("pair",) * (not alone), *where[0].by)
    one_value = alone and not several
    arguments: dict[str, Any] = {"clean": pairs[0][0] if alone else [pair[0] for pair in pairs], "site": site,
                                 "metric": names[0] if not several else names, "normalize": normalize}
    more = {"by": list(by), "direction": direction, **{dim: list(one) for dim, one in where[0].chosen.items()
                                                       if selected.get(dim) is not None}}
    if tuple(by) != ("layer", "token") or direction != "denoise" or len(more) > 2 or not alone:
        arguments |= more
    labels = [[Run(model, ids, torch.empty(0), {}, range(len(ids))) for ids in pair] for pair in pairs]
    return xr.DataArray(
        found, dims=dims, name=("recovered" if direction == "denoise" else "lost") if normalize else names[0],
        coords=_coords(model, where[0], labels, dims, asked[0]),
        attrs={"site": site, "metric": names[0] if not several else names, "direction": direction,
               "clean": float(ends[0, 0, 0]) if one_value else ends[..., 0].tolist(),
               "corrupt": float(ends[0, 0, 1]) if one_value else ends[..., 1].tolist(),
               "model": model.name, "question": question,
               **completeness(int((~np.isnan(made)).all(0).sum()), made.shape[1], "places"),
               "provenance": with_method(labels[0][1].provenance, "patching", **arguments)},
    )


def _pairs(model: Model, clean: Any, corrupt: Any) -> list[tuple[list[int], list[int]]]:
    """The ids of each pair, checked to be equally long."""
    lists = [_as_batch(one) for one in (clean, corrupt)]
    if (lists[0] is None) != (lists[1] is None) or len(lists[0] or ()) != len(lists[1] or ()):
        raise ExperimentError("Clean and corrupt prompts don't pair up.",
                              expected="two prompts, or two equally long lists", got=" and ".join(
                                  "one prompt" if one is None else f"{len(one)} prompts" for one in lists))
    ids = [[model.encode(one) for one in (some if many is None else many)]
           for some, many in zip(([clean], [corrupt]), lists, strict=True)]
    for one, other in zip(*ids, strict=True):
        if len(one) != len(other):
            texts = [[model.vocabulary.token_text(id) for id in some] for some in (one, other)]
            raise ExperimentError(
                "The two prompts have different lengths, so their tokens don't face each other.",
                expected=f"{len(one)} tokens in both", got=f"clean {len(one)}: {texts[0]}"[:150] +
                f"; corrupt {len(other)}: {texts[1]}"[:150], hint="Choose words of equally many tokens.",
            )
    return list(zip(*ids, strict=True))


def _metrics(metric: Metrics, pair: int) -> list[Metric]:
    if isinstance(metric, Metric):
        return [metric]
    return [metric(pair)] if callable(metric) else list(metric)


def _ends(model: Model, metrics: Sequence[Sequence[Metric]], runs: Sequence[Sequence[Run]], differ: bool) -> np.ndarray:
    """The metrics (of each pair) of both prompts as they are, (metric, pair, clean or corrupt) float64."""
    found = np.array([[[float(one.of(model, run.logits[-1:])) for run in pair] for one, pair in
                       zip(column, runs, strict=True)] for column in zip(*metrics, strict=True)])
    if differ and (found[..., 0] == found[..., 1]).any():
        at = np.argwhere(found[..., 0] == found[..., 1])[0]
        raise ExperimentError("The metric is the same for both prompts, so nothing can be recovered.",
                              expected="prompts that differ in the metric", got=f"{found[tuple(at)][0]:.4g} for both",
                              hint="Check the two answers, or pass normalize=False.")
    return found


def _same_past(one: Sequence[int], other: Sequence[int], where: Grid) -> np.ndarray:
    """Which places have all their tokens before the first that differs, (place,) bool: nothing can change there."""
    first = next((at for at, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))
    return np.array([max(place.get("token", (len(one),))) < first for place in where.places()], dtype=bool)


def _coords(
    model: Model, where: Grid, runs: Sequence[Sequence[Run]], dims: Sequence[str], metrics: Sequence[Metric],
) -> dict[Any, Any]:
    """Labels of every dimension; tokens are labelled when they are those of one pair."""
    coords: dict[Any, Any] = {dim: list(where.chosen[dim]) for dim in where.by}
    if "layer" in coords:
        coords["band"] = ("layer", [model.config.bands[layer] for layer in where.chosen["layer"]])
    if "token" in coords and len(runs) == 1:
        at = list(where.chosen["token"])
        labels = xr.Dataset(coords=runs[0][0].token_coords("token")).isel(token=at)  # type: ignore[arg-type]
        corrupt_text = np.empty(len(at), dtype=object)
        corrupt_text[:] = [runs[0][1].tokens[token] for token in at]
        coords |= {**labels.coords, "corrupt_text": ("token", corrupt_text)}
    if "pair" in dims:
        coords["pair"] = range(len(runs))
    if "metric" in dims:
        coords["metric"] = names_of(metrics)
    return coords
