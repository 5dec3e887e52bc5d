"""What wrote into the residual stream: every component of a run, one after the other, in float32."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from gptoss_workbench.errors import ExperimentError, SiteError
from gptoss_workbench.hooks.prompts import Prompts
from gptoss_workbench.hooks.selection import Indices, Where, freeze, resolve
from gptoss_workbench.hooks.sites import SITES
from gptoss_workbench.model.model import Model
from gptoss_workbench.model.run import Run

COMPONENT_SITES = ("embed", "attn.z", "router.experts", "router.weights", "expert.out", "resid_post")
"""What a run must capture to be taken apart."""

BIAS, REST = "bias", "rest"


@dataclass(frozen=True)
class Component:
    """One thing that writes into the stream. ``layer`` and ``index`` are -1 where it has none."""

    kind: str
    layer: int = -1
    index: int = -1

    def __str__(self) -> str:
        where, which = f"layer {self.layer} " * (self.layer >= 0), f" {self.index}" * (self.index >= 0)
        return where + self.kind + which


def components(
    model: Model, run: Run, at: list[int], layer: int, site: str,
) -> Iterator[tuple[Component, Tensor]]:
    """Everything written before ``site`` of ``layer``, in the order it was written.

    Args:
        at: columns of the captured tensors.

    Yields:
        the component, and what it wrote, (token, d_model) float32.
    """
    yield Component("embed"), captured(model, run, "embed", None)[at].float()
    for number in range(layer + 1):
        if number < layer or site != "resid_pre":
            heads = head_outputs(model, number, captured(model, run, "attn.z", number)[at])
            for index in range(heads.shape[1]):
                yield Component("head", number, index), heads[:, index]
            yield Component(BIAS, number), model.weights.layers[number].o_bias.float().expand(len(at), -1)
        if number < layer or site == "resid_post":
            slots, experts = slot_outputs(model, run, number, at)
            for index in experts.unique().tolist():
                own = (experts == index).unsqueeze(-1)
                yield Component("expert", number, index), torch.where(own, slots, 0.0).sum(1)


def component_coords(parts: Sequence[Component]) -> dict[Hashable, object]:
    """Labels of the components, and of the rest after them."""
    every = [*parts, Component(REST)]
    return {
        "component": np.array([str(part) for part in every], dtype=object),
        "kind": ("component", np.array([part.kind for part in every], dtype=object)),
        "layer": ("component", [part.layer for part in every]),
        "index": ("component", [part.index for part in every]),
    }


def head_outputs(model: Model, layer: int, z: Tensor) -> Tensor:
    """z (token, head, d_head) -> each head's part of ``attn.out``, (token, head, d_model) float32, without the bias.

    The output projection reads the heads side by side, so a head owns d_head of its columns.
    """
    weight = model.weights.layers[layer].o_weight.float()
    return torch.einsum("thk,dhk->thd", z.float(), weight.unflatten(1, z.shape[1:]))


def slot_outputs(model: Model, run: Run, layer: int, at: list[int]) -> tuple[Tensor, Tensor]:
    """What each slot added to the stream, (token, slot, d_model) float32, and whose slot it was, (token, slot)."""
    outputs = captured(model, run, "expert.out", layer)[at].float()
    weights, experts = (captured(model, run, f"router.{what}", layer)[at] for what in ("weights", "experts"))
    return weights.float().unsqueeze(-1) * outputs, experts


def captured(model: Model, run: Run, site: str, layer: int | None) -> Tensor:
    """A site of a run with all its heads, slots and channels.

    Raises:
        SiteError: it was not captured.
        ExperimentError: only some of them were.
    """
    tensor, dims, sizes = run.tensor(site, layer), SITES[site].dims, model.config.dimensions
    whole = all(list(labels) == list(range(sizes[dim])) for dim, labels in run.layout.coords.items() if dim in dims)
    if not whole or run.layout.dims.get(site, dims) != dims:
        raise ExperimentError(
            f"The run kept only a part of {site!r}, and a part does not sum to the whole.",
            expected="every " + ", ".join(dims[1:]), got=str(tuple(tensor.shape)),
            hint="Capture it without heads= and experts=.",
        )
    return tensor


def columns(run: Run, tokens: Indices) -> list[int]:
    """Where in the captured tensors the chosen positions stand.

    Raises:
        SiteError: there is no such token, or it was not captured.
        ExperimentError: the run is a batch.
    """
    if not isinstance(run, Run):
        raise ExperimentError("Take one run at a time.", expected="a Run; batch[0] is the first of a batch",
                              got=type(run).__name__)
    if tokens is None:
        return list(range(len(run.positions)))
    at, frozen = {position: column for column, position in enumerate(run.positions)}, freeze(tokens)
    if isinstance(frozen, Where):
        wanted = list(Prompts([run.ids], lambda: run.model.vocabulary, open_ended=False).chosen(frozen, 0))
    else:
        wanted = resolve(frozen, len(run), "token")
    if not wanted:
        raise SiteError("That selects no token.", expected="at least one token of the run", got=repr(tokens))
    return [resolve(at.get(position, len(at)), len(at), "captured token")[0] for position in wanted]


def token_coords(run: Run, at: list[int]) -> dict[Hashable, xr.DataArray]:
    """The labels of the tokens at some captured columns."""
    return dict(xr.Dataset(coords=run.token_coords("token")).isel(token=at).coords)
