"""Who served: how much router weight each expert received."""

from __future__ import annotations

import torch
import xarray as xr

from gptoss_workbench.hooks.selection import Indices, freeze, resolve
from gptoss_workbench.model.provenance import with_method
from gptoss_workbench.model.run import Run


def expert_usage(run: Run, tokens: Indices = None) -> xr.DataArray:
    """Mean router weight of every expert over the chosen tokens.

    Args:
        run: captured ``router`` (weights and experts).
        tokens: positions; None for all captured ones.

    Returns:
        (layer, expert) float32; each layer sums to 1. An expert that was not chosen counts 0.

    Raises:
        SiteError: the run holds no router, or not of those tokens.
    """
    weights, experts = run.tensor("router.weights").float(), run.tensor("router.experts")
    columns = resolve(freeze(tokens), len(run), "token") if tokens is not None else run.positions
    at = {position: column for column, position in enumerate(run.positions)}
    chosen = [resolve(at.get(position, len(at)), len(at), "captured token")[0] for position in columns]
    weights, experts = weights[:, chosen], experts[:, chosen]
    layers, count = weights.shape[:2]
    received = torch.zeros(layers, run.model.config.num_local_experts)
    received.scatter_add_(1, experts.reshape(layers, -1).cpu(), weights.reshape(layers, -1).cpu())
    kept = run.layers("router.weights")
    return xr.DataArray(
        (received / max(count, 1)).numpy(), dims=("layer", "expert"), name="router weight",
        coords={"layer": kept, "band": ("layer", [run.model.config.bands[layer] for layer in kept]),
                "expert": range(received.shape[1])},
        attrs={"tokens": count, "units": "mean share of the router's weight",
               "provenance": with_method(run.provenance, "expert_usage", tokens=list(columns))},
    )
