"""The table of hook points. Shapes, labels, completion, docs and error texts all come from here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from gptoss_workbench.errors import SiteError


@dataclass(frozen=True)
class Site:
    """A named place in the forward pass.

    Attributes:
        name: e.g. ``resid_post``.
        dims: the dimensions of the tensor there, without the leading prompt; ``query`` plays the part of ``token`` in
            attention maps.
        per_layer: False for the places before the first and after the last layer.
        meaning: one line.
        pooled: True for a statistic of the attention, which can be captured but is no place to edit.
    """

    name: str
    dims: tuple[str, ...]
    per_layer: bool
    meaning: str
    pooled: bool = False

    @property
    def token_dim(self) -> str:
        return "query" if "query" in self.dims else "token"


_RESID = ("token", "d_model")
_HEADS = ("token", "head", "d_head")
_KV = ("token", "kv_head", "d_head")
_SLOTS = ("token", "slot")

_TABLE = (
    Site("embed", _RESID, False, "token embeddings"),
    Site("resid_pre", _RESID, True, "residual stream entering the layer"),
    Site("attn.norm", _RESID, True, "normalised input of the attention"),
    Site("attn.q", _HEADS, True, "queries, rotated"),
    Site("attn.k", _KV, True, "keys, rotated"),
    Site("attn.v", _KV, True, "values"),
    Site("attn.scores", ("head", "query", "key"), True, "scaled scores, -inf where the band can't look"),
    Site("attn.pattern", ("head", "query", "key"), True, "attention, the sink as its own last key; rows sum to 1"),
    Site("attn.z", _HEADS, True, "values mixed by the pattern"),
    Site("attn.out", _RESID, True, "what the attention adds to the residual stream"),
    Site("resid_mid", _RESID, True, "residual stream between attention and experts"),
    Site("mlp.norm", _RESID, True, "normalised input of router and experts"),
    Site("router.logits", ("token", "expert"), True, "one logit per expert, bias included"),
    Site("router.experts", _SLOTS, True, "the chosen experts, best first"),
    Site("router.weights", _SLOTS, True, "softmax over the chosen experts' logits"),
    Site("expert.gate", ("token", "slot", "d_ff"), True, "gate half of an expert's first map"),
    Site("expert.up", ("token", "slot", "d_ff"), True, "linear half of an expert's first map"),
    Site("expert.act", ("token", "slot", "d_ff"), True, "after the clamped SwiGLU"),
    Site("expert.out", ("token", "slot", "d_model"), True, "each chosen expert's output, before its weight"),
    Site("mlp.out", _RESID, True, "weighted sum of the experts, added to the residual stream"),
    Site("resid_post", _RESID, True, "residual stream leaving the layer"),
    Site("final_norm", _RESID, False, "after the last norm, before the unembedding"),
    Site("logits", ("token", "vocab"), False, "next-token logits"),
)

SITES: dict[str, Site] = {site.name: site for site in _TABLE}

_ROWS = ("head", "query")
_STATISTICS = (
    Site("attn.top_key", (*_ROWS, "rank"), True, "the keys with the most attention, best first; -1 for none", True),
    Site("attn.top_mass", (*_ROWS, "rank"), True, "the attention on each of them", True),
    Site("attn.sink_mass", _ROWS, True, "the attention that rests on the sink", True),
    Site("attn.entropy", _ROWS, True, "entropy of the attention over keys and sink, in nats", True),
    Site("attn.window_mass", _ROWS, True, "the attention on keys nearer than the sliding window", True),
    Site("attn.distance_mass", (*_ROWS, "distance"), True, "the attention on keys 0, 1, 2-3, 4-7, ... back", True),
    Site("attn.span_mass", ("head", "query_span", "key_span"), True,
         "the attention from span to span, mean over the queries of a span", True),
)

POOLED: dict[str, Site] = {site.name: site for site in _STATISTICS}
"""Statistics of ``attn.pattern``, computed while the pattern passes by, so that it need not be kept."""

EVERY: dict[str, Site] = {**SITES, **POOLED}
"""All that can be captured."""

GROUPS: dict[str, tuple[str, ...]] = {
    "router": ("router.logits", "router.experts", "router.weights"),
    "resid": ("resid_pre", "resid_mid", "resid_post"),
    "expert": ("expert.gate", "expert.up", "expert.act", "expert.out"),
    "attn.top": ("attn.top_key", "attn.top_mass"),
    "attn.pooled": tuple(POOLED),
}


def site(name: str) -> Site:
    """The site of that name.

    Raises:
        SiteError: there is none; the message lists the nearest names.
    """
    if not isinstance(name, str) or name not in SITES:
        raise _unknown(name)
    return SITES[name]


def _unknown(name: str) -> SiteError:
    if not isinstance(name, str):
        return SiteError("A site is named by a string.", expected='one name, e.g. "resid_post"', got=f"{name!r:.80}",
                         hint="wb.SITES lists every site. An edit acts at one: make one edit for each.")
    if name in POOLED or name in GROUPS:
        what = "a statistic" if name in POOLED else f"a group of {', '.join(GROUPS[name])}"
        return SiteError(f"{name!r} is {what}: it can be captured, but an edit needs one site.",
                         expected="a site of wb.SITES", got=repr(name))
    near = get_close_matches(str(name), [*EVERY, *GROUPS], n=3, cutoff=0.4)
    return SiteError(
        f"There is no site {name!r}.", expected=", ".join(near or SITES), got=repr(name),
        hint="wb.SITES lists every site with its dimensions, wb.POOLED the statistics of the attention.",
    )


def expand(names: Iterable[str]) -> tuple[str, ...]:
    """Names of sites and statistics with the groups written out, each once, in the order of the forward pass.

    Raises:
        SiteError: a name that is neither.
    """
    names = list(names)
    for name in names:
        if not isinstance(name, str):
            raise _unknown(name)
    wanted = {member for name in names for member in GROUPS.get(name, (name,))}
    for name in wanted:
        if name not in EVERY:
            raise _unknown(name)
    return tuple(name for name in EVERY if name in wanted)
