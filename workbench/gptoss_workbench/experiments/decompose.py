"""The residual stream as the sum it is: the embedding, what every head wrote, what every expert wrote.

Every sublayer adds its output to the stream, an attention's output is a sum over its heads and a bias, and an expert
layer's is a sum over the chosen experts. So the stream at any place is a sum of parts, exactly (Elhage et al. 2021, "A
mathematical framework for transformer circuits"). All is computed in float32 from what the run captured, after edits.

Two decisions. The bias of the attention's output projection belongs to no head and has a label of its own. The bias of
an expert's second map belongs to the expert: the model adds it before the router's weight is applied, so it comes and
goes with the expert's choice, and the experts alone sum to ``mlp.out``.
"""

from __future__ import annotations

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from gptoss_workbench.errors import ExperimentError
from gptoss_workbench.experiments.parts import (
    BIAS,
    captured,
    columns,
    component_coords,
    components,
    head_outputs,
    slot_outputs,
    token_coords,
)
from gptoss_workbench.hooks.selection import Indices, freeze, resolve
from gptoss_workbench.model.model import Model
from gptoss_workbench.model.provenance import with_method
from gptoss_workbench.model.run import Run


@torch.no_grad()
def head_contributions(model: Model, run: Run, layers: Indices = None, tokens: Indices = None) -> xr.DataArray:
    """What each attention head added to the residual stream.

    Args:
        run: captured ``attn.z`` (all heads).
        layers, tokens: which; None for all that were captured. A single index drops the dimension.

    Returns:
        (layer, token, head, d_model) float32. The last head is called "bias", the bias of the output projection; the
        sum over ``head`` is ``attn.out``.

    Raises:
        SiteError: the run holds no ``attn.z``, or not of that layer or token.
    """
    at, chosen = columns(run, tokens), _layers(run, "attn.z", layers)
    out = []
    for layer in chosen:
        heads = head_outputs(model, layer, captured(model, run, "attn.z", layer)[at])
        bias = model.weights.layers[layer].o_bias.float().expand(len(at), 1, -1)
        out.append(torch.cat((heads, bias), dim=1))
    names = np.empty(model.config.num_attention_heads + 1, dtype=object)
    names[:] = [*range(model.config.num_attention_heads), BIAS]
    return _labelled(run, out, "head", names, chosen, at, layers, tokens)


@torch.no_grad()
def expert_contributions(model: Model, run: Run, layers: Indices = None, tokens: Indices = None) -> xr.DataArray:
    """What each expert added to the residual stream: its output times the router's weight, zero where not chosen.

    Args:
        run: captured ``router`` and ``expert.out``.
        layers, tokens: which; None for all that were captured. A single index drops the dimension.

    Returns:
        (layer, token, expert, d_model) float32, every expert of the layer by its number. The sum over ``expert`` is
        ``mlp.out``. For slots instead of experts, multiply ``expert.out`` by ``router.weights`` of ``run.data``.

    Raises:
        SiteError: the run holds no router or expert outputs, or not of that layer or token.
    """
    at, chosen = columns(run, tokens), _layers(run, "expert.out", layers)
    count = model.config.num_local_experts
    out = []
    for layer in chosen:
        slots, experts = slot_outputs(model, run, layer, at)
        into = experts.unsqueeze(-1).expand_as(slots)
        out.append(slots.new_zeros(len(at), count, slots.shape[-1]).scatter_add_(1, into, slots))
    return _labelled(run, out, "expert", np.arange(count), chosen, at, layers, tokens)


@torch.no_grad()
def decompose_residual(
    model: Model, run: Run, layer: int = -1, site: str = "resid_post", tokens: Indices = None,
) -> xr.DataArray:
    """The residual stream at one place as the sum of everything that was written into it before.

    Args:
        run: ``model.run(prompt, capture=wb.COMPONENT_SITES)``, and ``site`` if it is another one.
        layer, site: the place: ``resid_pre``, ``resid_mid`` or ``resid_post`` of a layer, by default where the stream
            leaves the last one.
        tokens: positions; None for all that were captured. A single index drops the dimension.

    Returns:
        (component, token, d_model) float32. Components are "embed", "layer 3 head 2", "layer 3 bias", "layer 3
        expert 5" (experts that served none of the tokens are left out) and "rest"; coordinates ``layer``, ``kind`` and
        ``index`` say the same in parts, so ``.groupby("kind").sum()`` or ``.groupby("layer").sum()`` coarsen it.
        The sum over ``component`` is the captured stream. "rest" is what the parts leave unexplained: rounding, and
        edits that were written straight into the stream or into a sublayer's output.

    Memory: components * tokens * d_model * 4 bytes; for gpt-oss-20b at least 19 MB a token.

    Raises:
        SiteError: the run lacks one of the sites, or the place does not exist.
    """
    if site not in ("resid_pre", "resid_mid", "resid_post"):
        raise ExperimentError(f"{site!r} is no place of the residual stream.",
                              expected="resid_pre, resid_mid or resid_post", got=repr(site))
    (layer,) = resolve(int(layer), model.config.num_hidden_layers, "layer")
    at = columns(run, tokens)
    rest = captured(model, run, site, layer)[at].float()
    names, outputs = [], []
    for name, output in components(model, run, at, layer, site):
        names.append(name)
        outputs.append(output)
        rest = rest - output
    out = xr.DataArray(
        torch.stack([*outputs, rest]).cpu().numpy(), dims=("component", "token", "d_model"), name=site,
        coords={**component_coords(names), **token_coords(run, at)}, attrs={
            "model": model.name, "layer": layer, "provenance": with_method(
                run.provenance, "decompose_residual", layer=layer, site=site, tokens=[run.positions[i] for i in at]),
        },
    )
    return out.isel(token=0) if isinstance(freeze(tokens), int) else out


def _layers(run: Run, site: str, layers: Indices) -> list[int]:
    kept = run.layers(site)
    if layers is None and kept:
        return kept
    return resolve(freeze(layers), run.model.config.num_hidden_layers, "layer")


def _labelled(
    run: Run, values: list[Tensor], dim: str, names: np.ndarray, chosen: list[int], at: list[int], layers: Indices,
    tokens: Indices,
) -> xr.DataArray:
    bands = ("layer", [run.model.config.bands[layer] for layer in chosen])
    record = with_method(run.provenance, f"{dim}_contributions", layers=chosen, tokens=[run.positions[i] for i in at])
    out = xr.DataArray(
        torch.stack(values).cpu().numpy(), dims=("layer", "token", dim, "d_model"),
        coords={"layer": chosen, "band": bands, dim: names, **token_coords(run, at)},
        attrs={"model": run.model.name, "provenance": record},
    )
    single = {name: 0 for name, given in (("layer", layers), ("token", tokens)) if isinstance(freeze(given), int)}
    return out.isel(single)
