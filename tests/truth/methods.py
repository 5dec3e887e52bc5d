"""The methods that are scored: each a function of (model, pair) -> scores (layer, index, token).

A score is in logits towards the clean answer unless the method says otherwise; the larger, the more the method holds
the place responsible. ``index`` counts heads or experts and has length 1 where a place is a whole layer at a token. NaN
means that the method says nothing about the place. To score another method, add it to ``METHODS``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr

import gptoss_workbench as wb
from gptoss_workbench.model.model import Model
from gptoss_workbench.model.transformer import Transformer
from gptoss_workbench.planted import Pair
from tests.truth.base import EXPERT, HEAD, WHERE, Method, both, grid
from tests.truth.calls import CHECKED, IMPORTANCE, LAYERWISE, RELP, TRACING

STEPS = 8  # of integrated gradients
Router = Literal["frozen", "live"]
Put = Callable[..., None]

# running ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def each_alone(model: Model, ids: Sequence[int], pair: Pair, site: str, places: np.ndarray, put: Put) -> np.ndarray:
    """The metric with each change alone, less the metric without any, (place,).

    One forward pass over a copy of the prompt for each place and one untouched copy. The changes are made by a tap of
    this module's own: no edit of the workbench is involved, which are held to these numbers in test_methods.py.

    Args:
        places: (place, 2 or more) int: layer, then what ``put`` needs.
        put: changes a layer's tensor at ``site``, (copy, ...), in place: put(x, layer, copies, rest of the places).
    """
    rows = [list(ids)] * (len(places) + 1)
    batch, positions = model.pad_left(rows)

    def tap(name: str, layer: int | None, x: torch.Tensor, start: int = 0) -> torch.Tensor:
        own = np.flatnonzero(places[:, 0] == layer) if name == site else []
        if len(own):
            x = x.clone()
            put(x, layer, torch.from_numpy(own), *torch.from_numpy(places[own, 1:].T))
        return x

    plain = Transformer(model.config, model.weights, model.transformer.kernels, scores_at_once=None)
    hidden = plain(batch, positions, model.new_cache(len(rows)), tap)[:, -1]
    values = pair.metric.of(model, plain.unembed(hidden)).double().numpy()
    return values[:-1] - values[-1]


def all_places(*sizes: int) -> np.ndarray:
    """Every index of an array of that shape, one a row."""
    return np.stack(np.unravel_index(np.arange(np.prod(sizes)), sizes), -1)


# exact: put a value there and run ---------------------------------------------------------------------------------


def patch_residual(model: Model, pair: Pair) -> np.ndarray:
    return patch_tokens(model, pair, "resid_pre")


def patch_router(model: Model, pair: Pair) -> np.ndarray:
    return patch_tokens(model, pair, "router.logits")


def patch_tokens(model: Model, pair: Pair, site: str) -> np.ndarray:
    """A site as a whole at every token: (layer, 1, token)."""
    source = both(model, pair)[0].tensor(site)
    sizes = len(source), len(pair.clean)

    def put(x: torch.Tensor, layer: int, copies: torch.Tensor, tokens: torch.Tensor) -> None:
        x[copies, tokens] = source[layer, tokens]

    return each_alone(model, pair.corrupt, pair, site, all_places(*sizes), put).reshape(sizes)[:, None]


def patch_heads(model: Model, pair: Pair, noising: bool = False) -> np.ndarray:
    into = pair.clean if noising else pair.corrupt
    source = both(model, pair)[int(noising)].tensor("attn.z")

    def put(x: torch.Tensor, layer: int, copies: torch.Tensor, heads: torch.Tensor, tokens: torch.Tensor) -> None:
        x[copies, tokens, heads] = source[layer, tokens, heads]

    return over_heads(model, into, pair, "attn.z", put) * (-1 if noising else 1)


def over_heads(model: Model, ids: Sequence[int], pair: Pair, site: str, put: Put) -> np.ndarray:
    """Every head at every token: (layer, head, token)."""
    sizes = model.config.num_hidden_layers, model.config.num_attention_heads, len(ids)
    return each_alone(model, ids, pair, site, all_places(*sizes), put).reshape(sizes)


@lru_cache(maxsize=32)
def expert_change(model: Model, pair: Pair) -> np.ndarray:
    """What each expert adds to the stream in the clean run less what it adds in the corrupt one,
    (layer, expert, token, d_model); zero where it serves in neither."""
    parts = [wb.expert_contributions(model, run).values for run in both(model, pair)]
    return (parts[0] - parts[1]).transpose(0, 2, 1, 3)


def patch_experts(model: Model, pair: Pair, noising: bool = False) -> np.ndarray:
    change = expert_change(model, pair) * (-1 if noising else 1)
    out = grid(model, model.config.num_local_experts, len(pair.clean))
    places = np.argwhere(np.abs(change).max(-1) > 0)

    def put(x: torch.Tensor, layer: int, copies: torch.Tensor, experts: torch.Tensor, tokens: torch.Tensor) -> None:
        x[copies, tokens] += torch.from_numpy(change[layer, experts, tokens])

    into = pair.clean if noising else pair.corrupt
    out[tuple(places.T)] = each_alone(model, into, pair, "mlp.out", places, put) * (-1 if noising else 1)
    return out


# knock-out: take it away ------------------------------------------------------------------------------------------


def zero_heads(model: Model, pair: Pair) -> np.ndarray:
    def put(x: torch.Tensor, layer: int, copies: torch.Tensor, heads: torch.Tensor, tokens: torch.Tensor) -> None:
        x[copies, tokens, heads] = 0

    return -over_heads(model, pair.clean, pair, "attn.z", put)


def silence_experts(model: Model, pair: Pair) -> np.ndarray:
    """The metric without the weight of one expert at one token; nobody steps in."""
    chosen = both(model, pair)[0].tensor("router.experts").numpy()
    out = grid(model, model.config.num_local_experts, len(pair.clean))
    places = all_places(*chosen.shape)  # layer, token, slot

    def put(x: torch.Tensor, layer: int, copies: torch.Tensor, tokens: torch.Tensor, slots: torch.Tensor) -> None:
        x[copies, tokens, slots] = 0

    layers, tokens, _ = places.T
    out[layers, chosen.ravel(), tokens] = -each_alone(model, pair.clean, pair, "router.weights", places, put)
    return out


def close_sinks(model: Model, pair: Pair) -> np.ndarray:
    """What the corrupt run gains when one head's sink is closed to one query, so that the keys share what it took."""
    def put(x: torch.Tensor, layer: int, copies: torch.Tensor, heads: torch.Tensor, queries: torch.Tensor) -> None:
        x[copies, heads, queries, -1] = 0
        x[copies, heads, queries] /= x[copies, heads, queries].sum(-1, keepdim=True)

    return over_heads(model, pair.corrupt, pair, "attn.pattern", put)


# gradients: what would happen to first order -----------------------------------------------------------------------


@lru_cache(maxsize=128)  # several methods read the same gradients of a model's pairs
def slopes(model: Model, pair: Pair, router: Router = "frozen", integrated: bool = False) -> dict[str, torch.Tensor]:
    """d metric / d site at the corrupt prompt by site, each stacked over layers; ``integrated``: the mean over the way
    to the clean one, in STEPS steps between the two prompts' embeddings."""
    sites = ["resid_pre", "attn.z", "mlp.out", *(["router.logits"] if router == "live" else [])]
    ends = [run.tensor("embed", None) for run in reversed(both(model, pair))]
    steps = [(step + 0.5) / STEPS for step in range(STEPS)] if integrated else [0.0]
    edits = [wb.set("embed", torch.lerp(ends[0], ends[1], way), prompt=row) for row, way in enumerate(steps)]
    found = wb.gradients(model, [list(pair.corrupt)] * len(steps), pair.metric, sites, router=router, edits=edits)
    return {site: torch.stack([one.tensor(site) for one in found]).mean(0) for site in sites}


def change(model: Model, pair: Pair, site: str) -> torch.Tensor:
    """The site in the clean run less the site in the corrupt one, stacked over layers."""
    clean, corrupt = (run.tensor(site) for run in both(model, pair))
    return clean - corrupt


def attribute_residual(model: Model, pair: Pair, **how: Any) -> np.ndarray:
    return (slopes(model, pair, **how)["resid_pre"] * change(model, pair, "resid_pre")).sum(-1).numpy()[:, None]


def attribute_heads(model: Model, pair: Pair, **how: Any) -> np.ndarray:
    found = (slopes(model, pair, **how)["attn.z"] * change(model, pair, "attn.z")).sum(-1)
    return found.transpose(1, 2).numpy()


def attribute_experts(model: Model, pair: Pair, **how: Any) -> np.ndarray:
    return (slopes(model, pair, **how)["mlp.out"].numpy()[:, None] * expert_change(model, pair)).sum(-1)


def attribute_router(model: Model, pair: Pair, integrated: bool = False) -> np.ndarray:
    slope = slopes(model, pair, router="live", integrated=integrated)["router.logits"]
    return (slope * change(model, pair, "router.logits")).sum(-1).numpy()[:, None]


def attribute_sinks(model: Model, pair: Pair) -> np.ndarray:
    """How much the corrupt prompt's metric would rise with a lower sink, to first order."""
    found = wb.gradients(model, list(pair.corrupt), pair.metric, "attn.sink")
    return -found.tensor("attn.sink").transpose(1, 2).numpy()


# looking, without changing anything --------------------------------------------------------------------------------


@lru_cache(maxsize=32)
def decomposed(model: Model, pair: Pair) -> list[xr.DataArray]:
    """Direct logit attribution of the clean and of the corrupt run."""
    return [wb.direct_logit_attribution(model, run, pair.answer, pair.other) for run in both(model, pair)]


def direct_logits(model: Model, pair: Pair, kind: str, count: int) -> np.ndarray:
    """Direct logit attribution of the clean run less that of the corrupt one, at the last token."""
    out = grid(model, count, len(pair.clean), np.nan)
    out[..., -1] = 0.0
    for sign, shares in zip((1, -1), decomposed(model, pair), strict=True):
        own = shares.where(shares["kind"] == kind, drop=True)
        out[own["layer"].values, own["index"].values, -1] += sign * own.values
    return out


def lens(model: Model, pair: Pair) -> np.ndarray:
    """How much each layer raises the log-odds of the answer as the logit lens reads them at the last token, in nats."""
    seen = wb.logit_lens(model, both(model, pair)[0], top=model.config.vocab_size)
    odds = []
    for layer in seen["layer"].values:
        row = seen.sel(layer=layer)
        by_id = dict(zip(row["id"].values.tolist(), row["prob"].values.tolist()))
        odds.append(np.log(by_id[pair.answer]) - np.log(by_id[pair.other]))
    out = grid(model, 1, len(pair.clean), np.nan)
    out[:, 0, -1] = np.diff(odds, prepend=0.0)
    return out


def attention(model: Model, pair: Pair) -> np.ndarray:
    """Share of each query's attention that rests on earlier tokens in which the two prompts differ."""
    pattern = both(model, pair)[0].tensor("attn.pattern")[..., :-1].clone()
    pattern.diagonal(dim1=-2, dim2=-1).zero_()
    differ = torch.tensor([a != b for a, b in zip(pair.clean, pair.corrupt)])
    return pattern[..., differ].sum(-1).numpy()


def usage(model: Model, pair: Pair) -> np.ndarray:
    """Router weight of each expert at each token, less its mean over the prompt."""
    run = both(model, pair)[0]
    each = [wb.expert_usage(run, [token]).values for token in range(len(run))]
    return np.stack(each, -1) - wb.expert_usage(run).values[..., None]


# the table ---------------------------------------------------------------------------------------------------------

HEADS, EXPERTS = 4, 8

METHODS: tuple[Method, ...] = (
    Method("exact patching, residual stream", "residual", patch_residual, WHERE),
    Method("exact patching, heads", "head", patch_heads, HEAD),
    Method("exact patching, experts", "expert", patch_experts, EXPERT),
    Method("exact patching, router", "router", patch_router, WHERE),
    Method("exact patching, heads, noising", "head", partial(patch_heads, noising=True), HEAD, few=True),
    Method("exact patching, experts, noising", "expert", partial(patch_experts, noising=True), EXPERT, few=True),
    Method("knock-out, heads zeroed", "head", zero_heads, HEAD),
    Method("knock-out, experts silenced", "expert", silence_experts, EXPERT),
    Method("knock-out, sinks closed", "sink", close_sinks, HEAD),
    *IMPORTANCE,
    *TRACING,
    Method("gradient x difference, residual stream", "residual", attribute_residual, WHERE),
    Method("gradient x difference, heads", "head", attribute_heads, HEAD),
    Method("gradient x difference, experts", "expert", attribute_experts, EXPERT),
    Method("gradient x difference, heads, router live", "head", partial(attribute_heads, router="live"), HEAD,
           few=True),
    Method("gradient x difference, experts, router live", "expert", partial(attribute_experts, router="live"), EXPERT,
           few=True),
    Method("gradient x difference, router", "router", attribute_router, WHERE),
    Method("integrated gradients, residual stream", "residual", partial(attribute_residual, integrated=True), WHERE),
    Method("integrated gradients, heads", "head", partial(attribute_heads, integrated=True), HEAD),
    Method("integrated gradients, experts", "expert", partial(attribute_experts, integrated=True), EXPERT),
    Method("integrated gradients, router", "router", partial(attribute_router, integrated=True), WHERE),
    *LAYERWISE,
    *RELP,
    *CHECKED,
    Method("gradient of the sink", "sink", attribute_sinks, HEAD),
    Method("direct logit attribution, heads", "head", partial(direct_logits, kind="head", count=HEADS), HEAD),
    Method("direct logit attribution, experts", "expert", partial(direct_logits, kind="expert", count=EXPERTS), EXPERT),
    Method("logit lens", "lens", lens, ("layer",), in_logits=False),
    Method("attention to what differs", "head", attention, HEAD, in_logits=False),
    Method("expert usage", "expert", usage, EXPERT, in_logits=False),
)
EXACT = tuple(method for method in METHODS if method.name.startswith("exact"))
