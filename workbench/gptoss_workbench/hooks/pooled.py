"""Statistics of the attention, computed from the pattern while it passes by.

A whole pattern of one layer is (head, query, key): 8.6 GB for 64 heads and 8k tokens in bfloat16. It passes in blocks
of queries, and each block is reduced here at once, so that no more than a block is ever there. All are float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptoss_workbench.errors import SiteError

Spans = tuple[tuple[int, int], ...]

DISTANCES = (0, *(1 << power for power in range(18)))
"""The nearest distance of each bin of ``attn.distance_mass``: 0, 1, 2, 4, ... 131072; the last one has no end."""

REST, SINK = "rest", "sink"


def reduce(
    names: Sequence[str], pattern: Tensor, positions: Sequence[int], *, top: int, window: int, span_of: Tensor | None,
    spans: int,
) -> dict[str, Tensor]:
    """The statistics of some queries of one prompt and layer.

    Args:
        names: which of ``sites.POOLED``.
        pattern: (head, query, key + 1), the sink last, no padding; key i is token i.
        positions: the token of each query.
        top: how many keys ``attn.top_key`` names.
        window: reach of ``attn.window_mass`` in tokens, the query's own included.
        span_of: the number of the span of each token, ``spans`` for one outside all; needed for ``attn.span_mass``.

    Returns:
        By name: (head, query, ...) each; ``attn.span_mass`` as sums over the queries of a span, with their number in
        a last column, for ``join``.
    """
    pattern = pattern.float()
    body, sink = pattern[..., :-1], pattern[..., -1]
    at = torch.tensor(positions, device=pattern.device)
    distance = at[:, None] - torch.arange(body.shape[-1], device=pattern.device)  # (query, key)
    found: dict[str, Tensor] = {}
    if "attn.top_key" in names or "attn.top_mass" in names:
        mass, keys = body.topk(min(top, body.shape[-1]), dim=-1)
        keys = keys.masked_fill(mass <= 0, -1)
        missing = top - keys.shape[-1]
        found["attn.top_key"] = torch.nn.functional.pad(keys, (0, missing), value=-1)
        found["attn.top_mass"] = torch.nn.functional.pad(mass, (0, missing))
    if "attn.sink_mass" in names:
        found["attn.sink_mass"] = sink.clone()
    if "attn.entropy" in names:
        found["attn.entropy"] = torch.special.entr(pattern).sum(-1)
    if "attn.window_mass" in names:
        found["attn.window_mass"] = (body * (distance < window)).sum(-1)
    if "attn.distance_mass" in names:
        edges = torch.tensor(DISTANCES, device=pattern.device)
        bins = torch.bucketize(distance.clamp(min=0), edges, right=True) - 1
        sums = body.new_zeros(*body.shape[:2], len(DISTANCES))
        found["attn.distance_mass"] = sums.scatter_add_(2, bins.expand(body.shape), body)
    if "attn.span_mass" in names:
        assert span_of is not None
        to = body.new_zeros(*body.shape[:2], spans + 1).index_add_(2, span_of[: body.shape[-1]], body)
        rows = torch.cat((to, sink[..., None], torch.ones_like(sink)[..., None]), dim=-1)
        sums = rows.new_zeros(len(rows), spans + 1, spans + 3)
        found["attn.span_mass"] = sums.index_add_(1, span_of[at], rows)
    return {name: found[name] for name in names}


def join(name: str, chunks: Sequence[Tensor]) -> Tensor:
    """The parts of one prompt put together: (head, query, ...), or the mean over the queries of each span.

    A span without a query has NaN.
    """
    if name != "attn.span_mass":
        return chunks[0] if len(chunks) == 1 else torch.cat(list(chunks), dim=1)
    total = torch.stack(list(chunks)).sum(0)
    return total[..., :-1] / total[..., -1:]


def coords(top: int, spans: int) -> dict[str, list[object]]:
    """The labels of the dimensions that only statistics have."""
    return {"rank": list(range(top)), "distance": list(DISTANCES), "query_span": [*range(spans), REST],
            "key_span": [*range(spans), REST, SINK]}


def check_spans(spans: Spans) -> Spans:
    """Spans as they must be: forward, and no token in two of them.

    Raises:
        SiteError: they are not.
    """
    last = 0
    for start, stop in sorted(spans):
        if not last <= start < stop:
            raise SiteError("The spans to pool over overlap or run backwards.",
                            expected="stretches of tokens (start, stop), none in another", got=f"{(start, stop)}")
        last = stop
    return spans


def span_numbers(spans: Spans, length: int, device: torch.device) -> Tensor:
    """The number of the span of each of ``length`` tokens, ``len(spans)`` for those outside all: (token,) int64."""
    numbers = torch.full((length,), len(spans), dtype=torch.int64)
    for number, (start, stop) in enumerate(spans):
        numbers[start:stop] = number
    return numbers.to(device)
