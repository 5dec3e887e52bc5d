"""The places that patching puts another run's values into, one edit each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from gptoss_kernels.mxfp4 import Mxfp4Tensor, dequantize
from gptoss_workbench.errors import ExperimentError
from gptoss_workbench.hooks.edits import Edit, add, patch, zero
from gptoss_workbench.hooks.selection import Indices, freeze, resolve
from gptoss_workbench.hooks.sites import site as site_named
from gptoss_workbench.model.model import Model
from gptoss_workbench.model.run import Run

SHARES = {"expert.out": ("expert",), "expert.act": ("expert", "neuron")}
"""Sites with slots: patched is what an expert, or a neuron of one, adds to ``mlp.out``, and nothing where neither run
sends the token there."""


@dataclass(frozen=True)
class Grid:
    """Which places are patched.

    Attributes:
        site: what is patched.
        by: the dimensions in which places differ; the rest of the site is patched as one.
        chosen: the indices of every dimension that was selected or that ``by`` names; tokens are counted from 0.
    """

    site: str
    by: tuple[str, ...]
    chosen: Mapping[str, tuple[int, ...]]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(self.chosen[dim]) for dim in self.by)

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def captures(self) -> tuple[str, ...]:
        """What both runs must keep."""
        return (self.site, "router.experts", "router.weights") if self.site in SHARES else (self.site,)

    def places(self) -> list[dict[str, tuple[int, ...]]]:
        """The indices of each place by dimension, in the order of the result's entries."""
        rest = {dim: indices for dim, indices in self.chosen.items() if dim not in self.by}
        return [{**rest, **{dim: (index,) for dim, index in zip(self.by, at, strict=True)}}
                for at in product(*(self.chosen[dim] for dim in self.by))]


def grid(model: Model, site: str, by: Sequence[str], tokens: int, selected: Mapping[str, Indices]) -> Grid:
    """Check what is to be patched.

    Args:
        tokens: how many the prompts have.
        selected: selections by dimension, None for all.

    Raises:
        ExperimentError: the site can't be patched so.
        SiteError: the site, or an index, does not exist.
    """
    spec, by = site_named(site), tuple(by)
    dims = ("layer", "token", *SHARES[site]) if site in SHARES else \
        (*("layer",) * spec.per_layer, *(dim for dim in spec.dims if dim in ("token", "head", "kv_head", "expert")))
    if not {*by} <= {*dims} or "token" not in spec.dims or spec.dims == ("token", "slot") or len({*by}) < len(by):
        words = " by ".join(by)
        raise ExperimentError(f"{site!r} can't be patched {words}.", got=", ".join(spec.dims),
                              expected=f"a site with {', '.join(by)}, such as resid_pre (layer, token), attn.z (layer, "
                              "token, head), router.logits, expert.out (layer, token, expert)")
    named = {*by, *(dim for dim, selection in selected.items() if selection is not None)}
    if site == "expert.act" and not {"expert", "neuron"} <= named:
        raise ExperimentError("Say which experts and neurons.", got=f"by={by}",
                              expected='by=("layer", "expert", "neuron"), neurons=[...]',
                              hint="expert.out patches whole experts.")
    sizes = {**model.config.dimensions, "layer": model.config.num_hidden_layers, "token": tokens,
             "neuron": model.config.intermediate_size}
    chosen = {}
    for dim in dims:
        selection = selected.get(dim)
        if dim in by or selection is not None:
            chosen[dim] = tuple(sorted({*resolve(freeze(selection), sizes[dim], dim)}))
    unknown = {dim for dim, selection in selected.items() if selection is not None} - {*dims}
    if unknown or not all(chosen.values()):
        raise ExperimentError(f"{site!r} can't be selected so.", expected=f"some of {', '.join(dims)}",
                              got=", ".join(sorted(unknown)) or "an empty selection")
    return Grid(site, by, chosen)


def edits_of(model: Model, where: Grid, source: Run, target: Run) -> list[Edit]:
    """For each place, the edit that puts the source's values into the target's run."""
    if where.site in SHARES:
        shares = _Shares(model, where.site, source, target)
        return [shares.edit(place) for place in where.places()]
    return [patch(where.site, source, **_selected(place)) for place in where.places()]


def outlines(where: Grid) -> list[Edit]:
    """Edits at the places of ``edits_of``, known before there are runs to take values from. They cost the same."""
    if where.site in SHARES:
        within = [{dim: some for dim, some in place.items() if dim in ("layer", "token")} for place in where.places()]
        return [zero("mlp.out", **_selected(place)) for place in within]
    return [zero(where.site, **_selected(place)) for place in where.places()]


def _selected(place: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    names = {"token": "tokens"}
    return {names.get(dim, dim): indices[0] if len(indices) == 1 else indices for dim, indices in place.items()}


class _Shares:
    """What experts or their neurons would add to ``mlp.out`` more in the source's run than in the target's."""

    def __init__(self, model: Model, site: str, source: Run, target: Run) -> None:
        self._model, self._site, self._runs = model, site, (source, target)
        self._columns: tuple[int, int, Tensor] | None = None

    def edit(self, place: Mapping[str, tuple[int, ...]]) -> Edit:
        tokens = list(place.get("token", range(len(self._runs[0]))))
        layers = place.get("layer", range(self._model.config.num_hidden_layers))
        if len(layers) != 1:
            raise ExperimentError("Experts of different layers are different experts.", got=f"layers {list(layers)}",
                                  expected='"layer" in by=, or one layer in layers=')
        layer, experts = layers[0], place.get("expert", range(self._model.config.num_local_experts))
        delta = sum(self._share(run, sign, layer, expert, tokens, place.get("neuron"))
                    for expert in experts for run, sign in zip(self._runs, (1, -1), strict=True))
        assert isinstance(delta, Tensor)
        return add("mlp.out", delta, layer=layer, tokens=tokens)

    def _share(
        self, run: Run, sign: int, layer: int, expert: int, tokens: list[int], neurons: tuple[int, ...] | None,
    ) -> Tensor:
        """(token, d_model) float32: weight times output, of all neurons or of some."""
        serves = run.tensor("router.experts", layer)[tokens] == expert  # (token, slot)
        weight = (run.tensor("router.weights", layer)[tokens].float() * serves).sum(-1, keepdim=True) * sign
        slot = serves.int().argmax(-1)
        values = run.tensor(self._site, layer)[tokens, slot].float()
        if neurons is None:
            return weight * values
        return weight * values[:, list(neurons)] @ self._down(layer, expert)[:, list(neurons)].T

    def _down(self, layer: int, expert: int) -> Tensor:
        """(d_model, neuron) float32, of the expert last asked for."""
        if self._columns is None or self._columns[:2] != (layer, expert):
            packed = self._model.weights.layers[layer].down
            matrix = dequantize(packed[expert], torch.float32) if isinstance(packed, Mxfp4Tensor) else packed[expert]
            self._columns = layer, expert, matrix.float()
        return self._columns[2]
