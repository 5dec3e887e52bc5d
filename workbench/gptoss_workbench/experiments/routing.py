"""How the routers spread the tokens over the experts, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr

from gptoss_workbench.experiments.routes import Routes, routes_of
from gptoss_workbench.hooks.selection import Indices
from gptoss_workbench.model.model import Model
from gptoss_workbench.model.provenance import with_method
from gptoss_workbench.model.run import Run


def routing_stats(runs: Run | Sequence[Run], tokens: Indices = None) -> xr.Dataset:
    """Usage, load, balance and certainty of every layer's router.

    Args:
        runs: one run or several, captured ``router``.
        tokens: the positions that count, e.g. ``wb.where(channel="analysis")``; None for all captured.

    Returns:
        Dataset. ``usage`` (layer, expert): the share of tokens that an expert serves; sums to the number of slots.
        ``load`` (layer, expert): its mean share of the router's weight; sums to 1. ``balance`` (layer): how many
        experts would share the work alike to be as mixed as this one, as a part of all: exp(entropy of usage) /
        experts, 1 when all serve alike (the balance that Fedus et al. 2021, arXiv 2101.03961, train for).
        ``entropy`` (layer, token): of the softmax over all experts' logits, in bits. ``margin`` (layer, token): the
        logit of the last chosen expert minus that of the first not chosen; near 0 the choice hangs on rounding.
        ``decisiveness`` (layer, token): the weight of the first expert. All float32; the tokens of all runs under each
        other, ``prompt`` and ``position`` telling which they are.

    Raises:
        SiteError: a run lacks the router or a token.

    Pitfalls: usage counts a barely chosen expert like the first; load does not. Tokens of one prompt, the shared
    system message above all, are no independent samples.
    """
    routes = routes_of(runs, tokens)
    model = routes.runs[0].model
    config = model.config
    logits = np.concatenate([_logits(run, routes, number) for number, run in enumerate(routes.runs)], 1)
    usage = routes.served(config.num_local_experts).mean(1, dtype=np.float64)
    share = usage / usage.sum(1, keepdims=True)
    mixed = np.exp(-(share * np.log(np.where(share > 0, share, 1))).sum(1)) / config.num_local_experts
    log_p = torch.log_softmax(torch.from_numpy(logits), -1)
    entropy = -(log_p.exp() * log_p.where(log_p.isfinite(), torch.zeros(()))).sum(-1) / np.log(2)
    best = np.sort(logits, -1)
    slots = config.num_experts_per_tok
    margin = best[..., -slots] - best[..., -slots - 1] if slots < config.num_local_experts else \
        np.full(best.shape[:2], np.inf)
    by_expert, by_token = ("layer", "expert"), ("layer", "token")
    return xr.Dataset(
        {"usage": (by_expert, usage.astype(np.float32)),
         "load": (by_expert, routes.received(config.num_local_experts).mean(1, dtype=np.float64).astype(np.float32)),
         "balance": ("layer", mixed.astype(np.float32)),
         "entropy": (by_token, entropy.numpy().astype(np.float32)),
         "margin": (by_token, margin.astype(np.float32)),
         "decisiveness": (by_token, routes.weights.max(-1))},
        coords={**layer_coords(model, routes), "expert": range(config.num_local_experts), **token_labels(routes)},
        attrs={"model": model.name, "tokens": len(routes.prompt),
               "provenance": method_of(routes, "routing_stats", tokens=repr(tokens))},
    )


def expert_coactivation(runs: Run | Sequence[Run], tokens: Indices = None) -> xr.Dataset:
    """Which experts of a layer serve the same tokens.

    Args:
        runs, tokens: as for ``wb.routing_stats``.

    Returns:
        Dataset over (layer, expert, other), float32: ``together``, the share of tokens that both serve (the diagonal is
        ``usage``), and ``lift``, how much more often than if who is chosen beside an expert were drawn by usage alone:
        together / expected, NaN where one of them never serves, and on the diagonal.

    Raises:
        SiteError: as ``wb.routing_stats``.

    The expectation respects that the slots of a token go to different experts: it is that of drawing the slots one
    after the other, without putting back, with chances chosen so that the usages come out (conditional Bernoulli
    sampling; Chen, Dempster & Liu 1994, Biometrika 81). Plain usage[i] * usage[j] would make every pair look shy.

    Pitfall: tokens repeat. Two experts that both serve the full stop are together as often as there are full stops.
    """
    routes = routes_of(runs, tokens)
    model = routes.runs[0].model
    count = model.config.num_local_experts
    served = routes.served(count).astype(np.float64)
    together = np.einsum("lte,lto->leo", served, served) / served.shape[1]
    expected = np.stack([expected_together(np.diagonal(layer), routes.experts.shape[-1]) for layer in together])
    with np.errstate(divide="ignore", invalid="ignore"):
        lift = np.where(expected > 0, together / expected, np.nan)
    lift[:, np.arange(count), np.arange(count)] = np.nan
    dims = ("layer", "expert", "other")
    return xr.Dataset(
        {"together": (dims, together.astype(np.float32)), "lift": (dims, lift.astype(np.float32))},
        coords={**layer_coords(model, routes), "expert": range(count), "other": range(count)},
        attrs={"model": model.name, "tokens": len(routes.prompt),
               "provenance": method_of(routes, "expert_coactivation", tokens=repr(tokens))},
    )


def expected_together(usage: np.ndarray, slots: int, rounds: int = 200) -> np.ndarray:
    """usage (expert,), summing to ``slots`` -> the chance of each pair if only usage mattered, (expert, expert).

    A random set of ``slots`` experts, each set as likely as the product of its experts' odds. The odds are found by
    iterative fitting; sums over sets are elementary symmetric polynomials, so nothing is drawn.
    """
    count = len(usage)
    always, never = usage >= 1 - 1e-12, usage <= 1e-12
    free = ~(always | never)
    odds = np.where(free, usage / np.where(free, 1 - usage, 1), 0.0)
    left = slots - int(always.sum())
    pair = np.outer(always, usage) + np.outer(usage, always) - np.outer(always, always)
    if left < 1:
        return pair
    itself = np.eye(count, dtype=bool)
    for _ in range(rounds):
        chance = odds * _symmetric(np.where(itself, 0, odds), left - 1) / _symmetric(odds, left)
        if np.abs(chance - usage)[free].max() < 1e-9:
            break
        odds = np.where(free, odds * usage / np.where(free, chance, 1), 0.0)
    if left >= 2:
        without = np.where(itself[:, None] | itself[None], 0, odds)  # (expert, other, expert): all but these two
        pair = pair + np.outer(odds, odds) * _symmetric(without, left - 2) / _symmetric(odds, left)
    return pair


def _symmetric(odds: np.ndarray, degree: int) -> np.ndarray:
    """odds (..., expert) -> the sum over all sets of ``degree`` of them of their products, (...)."""
    sums = np.zeros((degree + 1, *odds.shape[:-1]))
    sums[0] = 1.0
    for one in np.moveaxis(odds, -1, 0):
        sums[1:] += one * sums[:-1].copy()
    return sums[degree]


def _logits(run: Run, routes: Routes, number: int) -> np.ndarray:
    at = {position: column for column, position in enumerate(run.positions)}
    own = [at[position] for position in routes.position[routes.prompt == number]]
    return run.tensor("router.logits")[:, own].float().cpu().numpy()


def layer_coords(model: Model, routes: Routes) -> dict[str, object]:
    return {"layer": routes.layers, "band": ("layer", [model.config.bands[layer] for layer in routes.layers])}


def token_labels(routes: Routes) -> dict[str, object]:
    """Coordinates of the tokens of all runs; ``token`` counts them through."""
    labels = {name: ("token", values) for name, values in routes.labels.items()}
    return {"token": range(len(routes.prompt)), "prompt": ("token", routes.prompt),
            "position": ("token", routes.position), **labels}


def method_of(routes: Routes, method: str, **arguments: object) -> str:
    """The record of the first run, with the ids of the others among the arguments."""
    others = [run.ids for run in routes.runs[1:]]
    return with_method(routes.runs[0].provenance, method, **arguments, **({"other_prompts": others} if others else {}))
