"""What a capture will take, known before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gptoss_workbench.errors import CaptureTooLarge
from gptoss_workbench.hooks.capture import Capture
from gptoss_workbench.hooks.pooled import DISTANCES
from gptoss_workbench.hooks.prompts import Prompts, within
from gptoss_workbench.hooks.selection import Where, resolve
from gptoss_workbench.hooks.sites import EVERY

_INTEGERS = ("router.experts", "attn.top_key")


@dataclass(frozen=True)
class Item:
    """What one site takes.

    Attributes:
        name: the site or statistic.
        shape: its dimensions with their sizes, of one layer and of the longest prompt.
        layers: how many layers of it are kept.
        nbytes: of all prompts and layers.
    """

    name: str
    shape: tuple[tuple[str, int], ...]
    layers: int
    nbytes: int


@dataclass(frozen=True)
class CapturePlan:
    """What a capture keeps. Printing it shows a table.

    Attributes:
        items: one for each site.
        tokens, prompts: how many tokens are kept in all, of how many prompts.
        free: free bytes where the model computes; None when nobody asked.
    """

    items: tuple[Item, ...]
    tokens: int
    prompts: int = 1
    free: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of everything kept."""
        return sum(item.nbytes for item in self.items)

    @property
    def fits(self) -> bool:
        return self.free is None or self.nbytes <= self.free

    def __repr__(self) -> str:
        lines = [f"{item.name:20} {readable(item.nbytes):>10}  "
                 + (f"{item.layers} layers x " if item.layers else "")
                 + " x ".join(f"{size} {dim}" for dim, size in item.shape) for item in self.items]
        free = "" if self.free is None else f" of {readable(self.free)} free"
        return "\n".join([*lines, f"{'together':20} {readable(self.nbytes):>10}{free}"])


def readable(count: int) -> str:
    """Bytes in a unit that a person reads; 1 MB is 10^6."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def plan(
    capture: Capture, prompts: Prompts, layers: int, sizes: Mapping[str, int], itemsize: int, *, more: int = 0,
    free: int | None = None,
) -> CapturePlan:
    """What a capture of these prompts keeps.

    Args:
        layers: how many the model has.
        sizes: how long each fixed dimension of the sites is.
        itemsize: bytes of a number in the compute dtype.
        more: tokens that may follow each prompt.
        free: free bytes, for comparison.

    Raises:
        SiteError: the capture names what does not exist.
    """
    rows = resolve(capture.prompts, len(prompts), "prompt")
    ends = [prompts.lengths[row] + more for row in rows]
    kept = [_kept(capture, prompts, row, end) for row, end in zip(rows, ends, strict=True)]
    known = {**sizes, "rank": capture.top, "distance": len(DISTANCES)}
    for dim, selection in capture.selections().items():
        known[dim] = len(resolve(selection, sizes[dim], dim))
    layer_count = len(resolve(capture.layers, layers, "layer"))
    items = []
    for name in capture.names:
        spec, nbytes, largest = EVERY[name], 0, ()
        for end, count, row in zip(ends, kept, rows, strict=True):
            spans = _spans(capture, prompts, row) if name == "attn.span_mass" else 0
            own = {**known, "token": count, "query": count, "key": end + (name == "attn.pattern"),
                   "query_span": spans + 1, "key_span": spans + 2}
            shape = tuple((dim, own[dim]) for dim in capture.dims(name))
            nbytes += math.prod(size for _, size in shape)
            largest = max(largest, shape, key=lambda shape: math.prod(size for _, size in shape) if shape else -1)
        width = 8 if name in _INTEGERS else 4 if spec.pooled else itemsize
        count = layer_count if spec.per_layer else 0
        items.append(Item(name, largest, count, nbytes * width * max(1, count)))
    return CapturePlan(tuple(items), sum(kept), len(rows), free)


def _kept(capture: Capture, prompts: Prompts, row: int, end: int) -> int:
    """How many tokens of a prompt are kept; all of those whose labels are not known yet."""
    count = len(within(prompts.chosen(capture.tokens, row), 0, end))
    return count + end - prompts.lengths[row] if isinstance(capture.tokens, Where) else count


def _spans(capture: Capture, prompts: Prompts, row: int) -> int:
    return len(prompts.spans(row) if capture.spans is None else capture.spans)


def check(capture: Capture, made: CapturePlan) -> None:
    """Refuse a capture that does not fit.

    Raises:
        CaptureTooLarge: with what it takes, what is free, and the selections that fit.
    """
    if made.fits:
        return
    assert made.free is not None
    largest = sorted(made.items, key=lambda item: -item.nbytes)[:3]
    raise CaptureTooLarge(
        "The capture would not fit into memory.", expected=f"at most {readable(made.free)}, which are free",
        got=f"{readable(made.nbytes)}: " + ", ".join(f"{item.name} {readable(item.nbytes)}" for item in largest),
        hint=_way_out(capture, made, made.free),
    )


def _way_out(capture: Capture, made: CapturePlan, free: int) -> str:
    """The selections nearest to what was asked for that fit."""
    fitting: list[str] = []
    layers = max((item.layers for item in made.items), default=0)
    by_layer = sum(item.nbytes for item in made.items if item.layers)
    most = (free - made.nbytes + by_layer) * layers // max(1, by_layer)
    if 1 <= most < layers:
        fitting.append(f"layers=slice({layers - most}, None)" if capture.layers is None
                       else f"layers= with {most} of those {layers}")
    by_token = sum(item.nbytes for item in made.items if "query_span" not in dict(item.shape))
    tokens = (free - made.nbytes + by_token) * made.tokens // max(1, by_token) // made.prompts
    if 1 <= tokens < made.tokens:
        fitting.append(f"tokens=slice({-tokens}, None)")
    maps = [item for item in made.items if item.name in ("attn.scores", "attn.pattern")]
    if maps and made.nbytes - sum(item.nbytes for item in maps) <= free:
        fitting.append('the statistics "attn.pooled" instead of ' + " and ".join(item.name for item in maps))
    least = by_layer / max(1, layers) / max(1, made.tokens) * made.prompts
    uniform = by_layer == by_token == made.nbytes and layers > 1 and made.tokens > made.prompts
    if not fitting and uniform and least <= free:
        most = int(min(free // least, made.tokens // made.prompts))
        fitting.append(f"layers={-1 if capture.layers is None else 'one of those'}, tokens=slice({-most}, None)")
    return "fits: " + "; or ".join(fitting) if fitting else "nothing smaller fits: free some memory first"
