"""One number per token: how surprising, how uncertain, how firmly routed, how idle."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import xarray as xr
from torch import Tensor

from gptoss_workbench.errors import ExperimentError
from gptoss_workbench.experiments.rows import entropy, token_log_probs
from gptoss_workbench.model.model import Model
from gptoss_workbench.model.provenance import with_method
from gptoss_workbench.model.run import Run


def _surprisal(model: Model, run: Run) -> Tensor:
    ids = torch.tensor(run.ids, device=model.device)
    following = -token_log_probs(model, run.hidden[:-1], ids[1:])
    return torch.cat((following.new_full((1,), math.nan), following))


def _entropy(model: Model, run: Run) -> Tensor:
    return entropy(model, run.hidden)


def _router_entropy(model: Model, run: Run) -> Tensor:
    log_p = torch.log_softmax(run.tensor("router.logits").float(), dim=-1)
    finite = torch.where(log_p.isfinite(), log_p, 0.0)  # a banned expert has no probability and adds nothing
    return (-(log_p.exp() * finite).sum(-1) / math.log(2)).mean(0)


def _router_margin(model: Model, run: Run) -> Tensor:
    k = model.config.num_experts_per_tok
    best = run.tensor("router.logits").float().topk(k + 1, dim=-1).values
    return (best[..., k - 1] - best[..., k]).mean(0)


def _sink(model: Model, run: Run) -> Tensor:
    return run.tensor("attn.pattern")[..., -1].float().mean((0, 1))


def _resid_norm(model: Model, run: Run) -> Tensor:
    return run.tensor("resid_post")[-1].float().norm(dim=-1)


_QUANTITIES: dict[str, tuple[str, str, Callable[[Model, Run], Tensor]]] = {
    "surprisal": ("how unexpected the token was, given what came before", "nats", _surprisal),
    "entropy": ("how open it is what comes next", "nats", _entropy),
    "router_entropy": ("how evenly the router would spread over all experts, mean over layers", "bits",
                       _router_entropy),
    "router_margin": ("logit gap between the last chosen and the first unchosen expert, mean over layers", "logits",
                      _router_margin),
    "sink": ("share of attention that rests on the sink, mean over layers and heads", "share", _sink),
    "resid_norm": ("length of the residual stream after the last layer", "norm", _resid_norm),
}

TOKEN_QUANTITIES: dict[str, str] = {name: f"{text} ({unit})" for name, (text, unit, _) in _QUANTITIES.items()}


@torch.no_grad()
def token_quantity(model: Model, run: Run, name: str) -> xr.DataArray:
    """One of ``wb.TOKEN_QUANTITIES`` for every token of a run: (token,) float32, labelled.

    Raises:
        ExperimentError: no such quantity.
        SiteError: the run lacks what it is computed from (router, attn.pattern or resid_post).
    """
    if name not in _QUANTITIES:
        raise ExperimentError(f"There is no token quantity {name!r}.", expected=", ".join(_QUANTITIES), got=repr(name))
    text, unit, compute = _QUANTITIES[name]
    values = compute(model, run).float().cpu().numpy()
    coords = run.token_coords("token")
    if len(values) != len(run.positions):  # computed from all tokens although only some were captured
        values = values[run.positions]
    record = with_method(run.provenance, "token_quantity", name=name)
    return xr.DataArray(values, dims="token", coords=coords, name=name,
                        attrs={"long_name": text, "units": unit, "provenance": record})
