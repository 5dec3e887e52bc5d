"""One attribution while it is computed: estimates, totals and checks, as far as they have come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from gptoss_workbench.errors import ExperimentError
from gptoss_workbench.experiments.agreement import agreement, candidates, ranking
from gptoss_workbench.experiments.attributed import Places
from gptoss_workbench.experiments.gradients import Gradients, gradients
from gptoss_workbench.experiments.metrics import Metric
from gptoss_workbench.experiments.uncertainty import student_interval
from gptoss_workbench.experiments.watch import Cost, Watch, completeness, identity, resumed
from gptoss_workbench.hooks.capture import capture
from gptoss_workbench.hooks.edits import SINK, Edit, patch
from gptoss_workbench.hooks.routing import replay_routes
from gptoss_workbench.model.model import Model, Prompt, _as_batch
from gptoss_workbench.model.provenance import with_method
from gptoss_workbench.model.run import Run

TOKENS_FORWARD = 4096
"""Tokens of patched runs computed together."""
TOKENS_BACKWARD = 512
"""Tokens of gradient runs computed together: their activations are held."""

Method = Literal["gradient", "relp", "integrated"]
METHODS = ("gradient", "relp", "integrated")


@dataclass(frozen=True, kw_only=True)
class AttributionPlan(Cost):
    """What an attribution costs. Print it.

    Attributes:
        passes, tokens, generated, nbytes: see ``Cost``; ``passes`` are forward and backward.
        pairs: pairs of prompts.
        length: tokens of each prompt.
        forward: forward passes: both prompts (once more before the checks where there are several pairs),
            whole layers for "integrated", and checks, fewer where fewer places differ (``at_most``).
        backward: forward passes with a backward pass, each about three times a forward pass.
    """

    pairs: int
    length: int
    forward: int
    backward: int

    def __str__(self) -> str:
        pairs = "1 pair" if self.pairs == 1 else f"{self.pairs} pairs"
        return (f"{pairs} of {self.length} tokens: {'at most ' * self.at_most}{self.forward:,} forward passes, "
                f"{self.backward:,} forward and backward passes")


class Stop(Exception):
    """Somebody asked to stop; what was computed is kept."""


class Work:
    """One attribution while it is computed. Arrays hold NaN where nothing was computed yet."""

    def __init__(
        self, model: Model, clean: Prompt, corrupt: Prompt, metric: Metric | Sequence[Metric], places: Places,
        router: Literal["live", "frozen"], method: Method, steps: int, top: int, others: int,
    ) -> None:
        if router not in ("live", "frozen"):
            raise ExperimentError("The router is live or frozen.", expected='"live" or "frozen"', got=repr(router))
        if method not in METHODS:
            raise ExperimentError("There is no such method.", expected=", ".join(METHODS), got=repr(method))
        if steps < 1 or top < 0 or others < 0:
            raise ExperimentError("Counts are out of range.", expected="steps from 1, top and others from 0",
                                  got=f"steps={steps}, top={top}, others={others}")
        self.model, self.places, self.steps = model, places, steps
        self.router: Literal["live", "frozen"] = router
        self.method: Method = method
        self.top, self.others = top, others
        self.single = _as_batch(clean) is None
        self.pairs = _pairs(model, clean, corrupt)
        self.metrics = [metric] * len(self.pairs) if isinstance(metric, Metric) else list(metric)
        if len(self.metrics) != len(self.pairs) or not all(isinstance(one, Metric) for one in self.metrics):
            raise ExperimentError("Metrics do not fit the pairs.", got=f"{metric!r}"[:100],
                                  expected=f"one metric, or a list of {len(self.pairs)}")
        self._runs: tuple[int, list[Run]] | None = None

    # what is to be done -------------------------------------------------------------------------------------------

    def start(self, resume: xr.Dataset | None, watch: Watch) -> None:
        """Empty arrays, or those of an earlier result; what is left to do is told."""
        config, tokens = self.model.config, len(self.pairs[0][0])
        sizes = {**config.dimensions, "token": tokens, "query": tokens, "layer": len(self.places.layers),
                 "key": tokens + (self.places.site == "attn.pattern")}
        self.shape = tuple(sizes[dim] for dim in self.places.dims)
        grid, one, by_layer = (len(self.pairs), *self.shape), (len(self.pairs),), (len(self.pairs),
                                                                                 len(self.places.layers))
        shapes = {"estimate": grid, "exact": grid, "difference": grid, "clean": one, "corrupt": one}
        shapes |= {"total": by_layer} if self.method == "integrated" else {}
        self.arrays = {name: resumed(resume, self.question, shape, name) for name, shape in shapes.items()}
        self.done, self.plan, self.watch = 0, self._plan(), watch
        watch.plan(self.plan)

    @property
    def question(self) -> str:
        """Short digest of what is asked, so that nothing goes on from the results of another question."""
        steps = self.steps if self.method == "integrated" else 0
        return identity(self.model, "attribution", self.pairs, self.places, self.router, self.method, steps,
                        [one.name for one in self.metrics])

    def _plan(self) -> AttributionPlan:
        """What is left to do. How many places differ is known only after the estimates; till then it is at most so."""
        pairs, steps = len(self.pairs), self.steps if self.method == "integrated" else 1
        missing = np.isnan(self.arrays["estimate"]).reshape(pairs, len(self.places.layers), -1).sum(-1) > 0
        backward = int(missing.sum()) * steps if self.method == "integrated" else int(missing.any(-1).sum())
        forward = int(np.isnan(self.arrays.get("total", np.zeros(0))).sum())
        begun = np.array([self._unfinished(pair) for pair in range(pairs)])
        if begun.any():
            checks = np.full(pairs, min(self.top + self.others, int(np.prod(self.shape))))
        else:
            chosen = np.concatenate(self.chosen())
            checks = np.isnan(self.arrays["exact"].reshape(pairs, -1)[:, chosen]).sum(1)
        both = int((begun | (checks > 0)).sum() if pairs == 1 else begun.sum() + (checks > 0).sum())
        forward += int(checks.sum()) + 2 * both
        length = len(self.pairs[0][0])
        return AttributionPlan(passes=forward + backward, tokens=(forward + backward) * length, pairs=pairs,
                               length=length, forward=forward, backward=backward, at_most=bool(begun.any()))

    def _unfinished(self, pair: int) -> bool:
        return any(np.isnan(values[pair]).any() for name, values in self.arrays.items() if name != "exact")

    def _ask(self) -> None:
        if self.watch.stopped():
            raise Stop

    def _passed(self, count: int) -> None:
        self.done += count
        self.watch.done(min(self.done, self.plan.passes), self.plan.passes)

    # computing ----------------------------------------------------------------------------------------------------

    def compute(self) -> None:
        try:
            for pair in range(len(self.pairs)):
                self._estimate(pair)
            self._check()
        except Stop:
            return
        if self.done < self.plan.passes:  # places that do not differ need no check
            self.watch.done(self.plan.passes, self.plan.passes)

    def runs(self, pair: int) -> list[Run]:
        """Clean and corrupt run of a pair, kept until another pair is asked for."""
        if self._runs is None or self._runs[0] != pair:
            self._ask()
            self._runs = None
            kept = [layer for layer in self.places.layers if layer is not None]
            whole = self.router == "frozen" and self.method == "integrated"  # then the router of all layers is held
            sites = [*self.places.captured, *(("router.experts", "router.weights") if whole else ())]
            what = capture(sites, None if whole or not kept else kept)
            self._runs = pair, [self.model.run(ids, capture=what) for ids in self.pairs[pair]]
            self._passed(2)
        return self._runs[1]

    def _estimate(self, pair: int) -> None:
        rows = {name: values[pair] for name, values in self.arrays.items()}
        if not self._unfinished(pair):
            return
        clean, corrupt = self.runs(pair)
        for name, run in (("clean", clean), ("corrupt", corrupt)):
            self.arrays[name][pair] = float(self.metrics[pair].of(self.model, self._last([run])))
        with_layer = self.places.dims[0] == "layer"
        slopes = None
        for number, layer in enumerate(self.places.layers):
            at = number if with_layer else ...
            if not np.isnan(rows["estimate"][at]).any():
                continue
            difference = self.places.difference(clean, corrupt, layer)
            if self.method == "integrated":
                slope = self._average_slope(pair, corrupt, difference, layer)
            else:
                slopes = slopes or self._slopes(pair)
                slope = slopes.tensor(self.places.site, layer).float()
            rows["difference"][at] = self.places.summed(difference.square()).sqrt().cpu().numpy()
            rows["estimate"][at] = self.places.effect(slope, difference).cpu().numpy()
        if "total" in rows:
            self._totals(pair, clean, corrupt)

    def _slopes(self, pair: int) -> Gradients:
        self._ask()
        kept = [layer for layer in self.places.layers if layer is not None]
        found = gradients(self.model, self.pairs[pair][1], self.metrics[pair], self.places.site, layers=kept or None,
                          router=self.router, rules="relp" if self.method == "relp" else "gradient")
        self._passed(1)
        return found

    def _held(self, corrupt: Run) -> list[Edit]:
        """What keeps the router where it was, while a frozen path is walked."""
        return [replay_routes(corrupt), patch("router.weights", corrupt)] if self.router == "frozen" else []

    def _average_slope(self, pair: int, corrupt: Run, difference: Tensor, layer: int | None) -> Tensor:
        """The slope at a layer's site, averaged over the straight way from corrupt to clean."""
        points, weights = np.polynomial.legendre.leggauss(self.steps)  # on (-1, 1), weights sum to 2
        start, site = corrupt.tensor(self.places.site, layer), self.places.site
        way = difference.sum(1) if self.places.by == "expert" else difference
        at_once = max(1, TOKENS_BACKWARD // len(corrupt))
        total = torch.zeros_like(start, dtype=torch.float32)
        for first in range(0, self.steps, at_once):
            self._ask()
            some = range(first, min(first + at_once, self.steps))
            edits = [self.places.put((start + (points[step] + 1) / 2 * way).to(start.dtype), layer, row)
                     for row, step in enumerate(some)]
            found = gradients(self.model, [corrupt.ids] * len(some), self.metrics[pair],
                              capture(site, None if layer is None else layer), router=self.router,
                              edits=[*self._held(corrupt), *edits])
            for step, one in zip(some, found, strict=True):
                total += weights[step] / 2 * one.tensor(site, layer).float()
            self._passed(len(some))
        return total

    def _totals(self, pair: int, clean: Run, corrupt: Run) -> None:
        def whole(number: int, row: int) -> Edit:
            return self.places.patch_layer(clean, self.places.layers[number], row)

        todo = np.flatnonzero(np.isnan(self.arrays["total"][pair])).tolist()
        for numbers, effects in self._effects(pair, corrupt, todo, whole, self._held(corrupt)):
            self.arrays["total"][pair, numbers] = effects

    def _check(self) -> None:
        """Patch the largest estimates exactly, and some of the others."""
        chosen = np.concatenate(self.chosen())
        for pair in range(len(self.pairs)):
            exact = self.arrays["exact"][pair].reshape(-1)  # a view
            todo = [int(place) for place in chosen if np.isnan(exact[place])]
            if todo:
                clean, corrupt = self.runs(pair)
                for some, effects in self._effects(pair, corrupt, todo, partial(self._patch, clean, corrupt), []):
                    exact[some] = effects

    def chosen(self) -> tuple[np.ndarray, np.ndarray]:
        """Flat indices of the largest estimates, and of the others to check."""
        return ranking(self.arrays["estimate"].mean(0), self.top, self.others, candidates(self.arrays["difference"]))

    def _patch(self, clean: Run, corrupt: Run, place: int, row: int) -> Edit:
        at = dict(zip(self.places.dims, map(int, np.unravel_index(place, self.shape)), strict=True))
        layer = self.places.layers[at.pop("layer", 0)]
        return self.places.patch_one(clean, corrupt, layer, at, row)

    def _effects(
        self, pair: int, corrupt: Run, todo: Sequence[int], edit: Callable[[int, int], Edit], held: Sequence[Edit],
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        """What each edit does to the corrupt prompt's metric, exactly: some of ``todo``, their effects (some,)."""
        at_once = max(1, TOKENS_FORWARD // len(corrupt))
        for first in range(0, len(todo), at_once):
            self._ask()
            some = list(todo[first:first + at_once])
            runs = self.model.run([corrupt.ids] * len(some),
                                  edits=[*held, *(edit(one, row) for row, one in enumerate(some))])
            values = self.metrics[pair].of(self.model, self._last(list(runs)))
            yield some, (values - float(self.arrays["corrupt"][pair])).cpu().numpy()
            self._passed(len(some))

    def _last(self, runs: Sequence[Run]) -> Tensor:
        """Logits after the last token, (run, vocab)."""
        if self.places.site == "logits":
            return torch.stack([run.logits[-1] for run in runs])
        return self.model.transformer.unembed(torch.stack([run.hidden[-1] for run in runs]))

    # what came of it ----------------------------------------------------------------------------------------------

    def result(self) -> xr.Dataset:
        """The arrays with their labels, and what the checks say."""
        clean, corrupt = (Run(self.model, ids, torch.empty(0), {}, range(len(ids))) for ids in self.pairs[0])
        dims: tuple[str, ...] = ("pair", *self.places.dims)
        own = self.places.token_dim
        shapes = {"clean": ("pair",), "corrupt": ("pair",), "total": ("pair", "layer")}
        made = {name: (shapes.get(name, dims), values) for name, values in self.arrays.items()}
        for name in () if self.single else ("estimate", "exact"):
            ends = student_interval(self.arrays[name])
            made |= {f"{name}_{end}": (dims[1:], values)
                     for end, values in zip(("mean", "low", "high"), ends, strict=True)}
        coords: dict[str, object] = {"pair": range(len(self.pairs)), **clean.token_coords(own)}
        if "layer" in dims:
            coords |= {"layer": list(self.places.layers),
                       "band": ("layer",
                                [self.model.config.bands[layer] for layer in self.places.layers if layer is not None])}
        coords |= {dim: range(self.shape[dims.index(dim) - 1]) for dim in ("head", "kv_head", "slot", "expert")
                   if dim in dims}
        if "key" in dims:
            coords["key"] = _objects([*range(len(clean)), *[SINK] * (self.places.site == "attn.pattern")])
        for which, name in enumerate(("clean_prompt", "corrupt_prompt")):
            coords[name] = ("pair", _objects([self.model.decode(pair[which]) for pair in self.pairs]))
        if self.single:
            coords["corrupt_text"] = (own, _objects(corrupt.tokens))
        result = xr.Dataset(made, coords, self._attrs(corrupt))
        return result.isel(pair=0, drop=True) if self.single else result

    def _attrs(self, corrupt: Run) -> dict[str, object]:
        flat = {name: self.arrays[name].mean(0).ravel() for name in ("estimate", "exact")}
        attrs: dict[str, object] = {
            "site": self.places.site, "by": self.places.by or "", "router": self.router, "method": self.method,
            "metric": ", ".join(dict.fromkeys(one.name for one in self.metrics)), "top": self.top,
            "model": self.model.name, "question": self.question}
        finished = False
        if not np.isnan(flat["estimate"]).any():
            top, others = self.chosen()
            checks = flat["exact"][np.concatenate((top, others))]
            finished = not np.isnan(checks).any()
            if finished:
                attrs |= agreement(flat["estimate"], flat["exact"], top, others)
        passes = self.plan.passes  # at most: where places do not differ, it ends before
        attrs |= completeness(passes if finished else min(self.done, passes - 1), passes, "passes")
        attrs["provenance"] = with_method(
            corrupt.provenance, "attribution", pairs=self.pairs, site=self.places.site, by=self.places.by,
            layers=self.places.layers, router=self.router, estimator=self.method, steps=self.steps, top=self.top,
            others=self.others, metric=[one.name for one in self.metrics])
        return attrs


def _pairs(model: Model, clean: Prompt, corrupt: Prompt) -> list[tuple[list[int], list[int]]]:
    """Token ids of each pair, all equally long."""
    sides = [_as_batch(side) for side in (clean, corrupt)]
    if (sides[0] is None) != (sides[1] is None) or len(sides[0] or ()) != len(sides[1] or ()):
        counts = ["one prompt" if side is None else f"{len(side)} prompts" for side in sides]
        raise ExperimentError("Clean and corrupt prompts come in pairs.", expected="two prompts, or two equal lists",
                              got=f"{counts[0]} clean, {counts[1]} corrupt")
    both = zip(sides[0] or [clean], sides[1] or [corrupt], strict=True)
    pairs = [(model.encode(one), model.encode(other)) for one, other in both]
    lengths = sorted({len(ids) for pair in pairs for ids in pair})
    if len(lengths) > 1:
        odd = next(number for number, pair in enumerate(pairs) if {*map(len, pair)} != {len(pairs[0][0])})
        texts = [[model.vocabulary.token_text(id) for id in ids] for ids in pairs[odd]]
        raise ExperimentError(
            "The prompts have different lengths, so their tokens don't face each other.",
            expected=f"{len(pairs[0][0])} tokens in all", got=f"pair {odd}: {texts[0]} and {texts[1]}"[:300],
            hint="Choose words of equally many tokens.")
    return pairs


def _objects(values: Sequence[object]) -> np.ndarray:
    made = np.empty(len(values), dtype=object)
    made[:] = values
    return made
