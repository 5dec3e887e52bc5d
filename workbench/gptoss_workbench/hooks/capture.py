"""What a run should keep."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gptoss_workbench.errors import SiteError
from gptoss_workbench.harmony.spans import Span
from gptoss_workbench.hooks import sites
from gptoss_workbench.hooks.pooled import Spans, check_spans
from gptoss_workbench.hooks.selection import Frozen, Indices, freeze
from gptoss_workbench.hooks.sites import EVERY


@dataclass(frozen=True)
class Capture:
    """What to keep, and of which layers, tokens, heads, experts and prompts. Make one with ``wb.capture(...)``.

    Attributes:
        sites: in the order of the forward pass; empty for nothing.
        layers, tokens, heads, kv_heads, experts, prompts: None for all.
        pooled: statistics of the attention, in the order of ``wb.POOLED``.
        top: how many keys ``attn.top_key`` names.
        spans: stretches of tokens that ``attn.span_mass`` pools over; None for the spans of the prompt.
    """

    sites: tuple[str, ...] = ()
    layers: Frozen = None
    tokens: Frozen = None
    heads: Frozen = None
    kv_heads: Frozen = None
    experts: Frozen = None
    prompts: Frozen = None
    pooled: tuple[str, ...] = ()
    top: int = 8
    spans: Spans | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Sites and statistics."""
        return self.sites + self.pooled

    def selections(self) -> dict[str, Frozen]:
        """The selections along dimensions of the sites, by dimension."""
        every = {"head": self.heads, "kv_head": self.kv_heads, "expert": self.experts}
        return {dim: selection for dim, selection in every.items() if selection is not None}

    def dims(self, name: str) -> tuple[str, ...]:
        """The dimensions that a site has in this capture: ``slot`` gives way to ``expert`` when experts are chosen."""
        dims = EVERY[name].dims
        return tuple("expert" if dim == "slot" else dim for dim in dims) if self.experts is not None else dims


@dataclass(frozen=True)
class Layout:
    """How captured tensors are labelled where the site alone does not tell.

    Attributes:
        dims: dimensions of a captured tensor by site, without layer and prompt.
        coords: labels of the dimensions of which a part was kept, and of those that statistics have.
    """

    dims: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    coords: Mapping[str, Sequence[object]] = field(default_factory=dict)


def capture(
    names: str | Iterable[str], layers: Indices = None, tokens: Indices = None, *, heads: Indices = None,
    kv_heads: Indices = None, experts: Indices = None, prompts: Indices = None, top: int = 8,
    spans: Iterable[Span | tuple[int, int]] | None = None,
) -> Capture:
    """Keep these sites, e.g. ``wb.capture(["resid_post", "router"], layers=[2, 3], tokens=-1)``.

    Only what is asked for is kept, and a selection applies to the sites that have such a dimension; the others are
    kept whole in it.

    Args:
        names: one or more names of sites, statistics (``wb.POOLED``) or groups (``router``, ``resid``, ``expert``,
            ``attn.top``, ``attn.pooled``).
        layers: which layers; None for all.
        tokens: positions (queries of attention maps), a slice, a Span or several, ``wb.where(channel="analysis")``, or
            a function of the token's text. Negative positions count from the end of each prompt.
        heads, kv_heads: which heads.
        experts: which experts. At ``router.logits`` a part of the expert dimension; at the sites with slots the
            dimension ``slot`` becomes ``expert``, and a token that an expert did not serve has NaN there (-1 at
            ``router.experts``).
        prompts: which rows of a batch.
        top: how many keys ``attn.top_key`` and ``attn.top_mass`` name.
        spans: disjoint stretches of tokens for ``attn.span_mass``: Spans or (start, stop) pairs; None for the spans of
            the prompt. Tokens outside all of them count as one more, "rest"; generated ones too.

    Raises:
        SiteError: a name that is no site, a selection of the wrong type, or one that no site has the dimension for.
    """
    every = sites.expand((names,) if isinstance(names, str) else tuple(names))
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise SiteError("top= is the number of keys to name.", expected="1 or more", got=repr(top))
    if spans is not None:
        spans = check_spans(tuple(_ends(span) for span in spans))
    made = Capture(
        tuple(name for name in every if name in sites.SITES), freeze(layers), freeze(tokens), freeze(heads),
        freeze(kv_heads), freeze(experts), freeze(prompts), tuple(name for name in every if name in sites.POOLED),
        top, spans,
    )
    for dim, selection in made.selections().items():
        if selection == ():
            raise SiteError(f"The capture selects no {dim}.", expected=f"at least one {dim}, or None for all", got="[]")
        if not any(dim in made.dims(name) for name in every):
            raise SiteError(f"No site of this capture has a dimension {dim!r}.", got=", ".join(every),
                            expected=", ".join(site.name for site in EVERY.values() if dim in site.dims)[:200])
    return made


def _ends(span: Any) -> tuple[int, int]:
    if isinstance(span, Span):
        return span.start, span.stop
    try:
        start, stop = span
        return operator.index(start), operator.index(stop)
    except (TypeError, ValueError):
        raise SiteError("spans= takes stretches of tokens.", expected="Spans or pairs (start, stop)",
                        got=f"{span!r:.80}") from None


def as_capture(value: Capture | str | Iterable[str] | None) -> Capture:
    """Whatever a person passes as ``capture=``."""
    if value is None:
        return Capture()
    if isinstance(value, Capture):
        return value
    try:
        return capture(value)
    except TypeError:
        raise SiteError(
            "capture= takes site names or wb.capture(...).", expected="a name or a list of names",
            got=f"{type(value).__name__}", hint="wb.SITES lists every site.",
        ) from None
