"""Which columns of which half of a layer each case has to compute: whole numbers alone, known before anything runs.

Forwards, a change spreads from its column to the later ones, in a sliding layer no further than the window. Backwards,
the last column sees everything in a full layer and the window in a sliding one. A case needs what lies in both cones.
While edits are still to come, everything that changed is kept up, since each of them must act.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gptoss_workbench.hooks.edits import Edit
from gptoss_workbench.hooks.prompts import Prompts
from gptoss_workbench.hooks.selection import resolve
from gptoss_workbench.hooks.sites import SITES
from gptoss_workbench.model.config import ModelConfig

# What reaches the keys and values of its layer, and by them the later tokens.
_KEYED = {"embed", "resid_pre", "resid_post", "attn.norm", "attn.k", "attn.v"}
_ENTRANCES = {"embed", "resid_pre", "resid_post"}
_EXPERTS = ("resid_mid", "mlp.", "router.", "expert.")


def halves(config: ModelConfig) -> int:
    """How many halves a run has, the one after the last layer included."""
    return 2 * config.num_hidden_layers + 1


def half_of(site: str, layer: int | None, config: ModelConfig) -> int:
    """The half in which a site is computed; what leaves a layer belongs to the half that it enters."""
    if layer is None:
        return 0 if site == "embed" else halves(config) - 1
    return 2 * layer + 2 * (site == "resid_post") + site.startswith(_EXPERTS)


@dataclass(frozen=True)
class Touch:
    """One edit at one layer.

    Attributes:
        site, layer: where.
        half: see ``half_of``.
        start, stop: the stretch of tokens that it changes or reads.
        whole: it can't act on a part of its tokens: it reads tokens of the same pass, or is a function of them all.
    """

    site: str
    layer: int | None
    half: int
    start: int
    stop: int
    whole: bool


def touches(edits: Sequence[Edit], prompts: Prompts, config: ModelConfig) -> list[Touch]:
    """Every place at which edits of one prompt act; those whose tokens are none are left out."""
    found = []
    for edit in edits:
        site, args = edit.place.site, dict(edit.args)
        tokens, reads = [*prompts.chosen(edit.place.tokens, 0)], edit.name == "patch" and args["run"] is None
        if reads:
            tokens += prompts.chosen(args["source"], 0)
        layers = resolve(edit.place.layer, config.num_hidden_layers, "layer") if SITES[site].per_layer else [None]
        if tokens:
            found += [Touch(site, layer, half_of(site, layer, config), min(tokens), max(tokens) + 1,
                            reads or "change" in args)
                      for layer in layers]
    return found


@dataclass(frozen=True)
class Cones:
    """Stretches of columns, int64 (half, case); empty where stop <= start. Columns count with the padding on the left.

    Attributes:
        start, stop: what changed on the way into the half; the attention makes keys and values of it.
        out_start, out_stop: what the half computes.
        begins: the half at which each case begins.
    """

    start: np.ndarray
    stop: np.ndarray
    out_start: np.ndarray
    out_stop: np.ndarray
    begins: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        """How many columns of each case go through each half, (half, case)."""
        ends = [np.maximum(self.stop - self.start, 0), np.maximum(self.out_stop - self.out_start, 0)]
        both = np.maximum(np.minimum(self.stop, self.out_stop) - np.maximum(self.start, self.out_start), 0)
        return ends[0] + ends[1] - both

    def of(self, cases: Sequence[int]) -> Cones:
        """The same for some cases."""
        at = list(cases)
        return Cones(self.start[:, at], self.stop[:, at], self.out_start[:, at], self.out_stop[:, at],
                     self.begins[at])


def cones(
    own: Sequence[Sequence[Touch]], always: Sequence[Sequence[Touch]], pads: Sequence[int], width: int,
    config: ModelConfig,
) -> Cones:
    """The cones of cases whose prompts are padded on the left to ``width`` columns.

    Args:
        own: where the edits of each case act.
        always: where the edits act that its prompt's own run has too.
        pads: columns of padding of each case's prompt.
    """
    count, end = len(own), halves(config)
    begin, stop = np.full((end, count), width), np.zeros((end, count), dtype=np.int64)
    keyed = np.zeros((end, count), dtype=bool)
    begins, last = np.full(count, end), np.full(count, -1)
    for case, (mine, theirs) in enumerate(zip(own, always, strict=True)):
        for touch in mine:
            half = touch.half
            begin[half, case] = min(begin[half, case], touch.start + pads[case])
            stop[half, case] = max(stop[half, case], touch.stop + pads[case])
            keyed[half, case] |= touch.site in _KEYED
            begins[case] = min(begins[case], half)
        for touch in theirs:
            if touch.whole and touch.half >= begins[case]:
                begin[touch.half, case] = min(begin[touch.half, case], touch.start + pads[case])
                stop[touch.half, case] = max(stop[touch.half, case], touch.stop + pads[case])
                keyed[touch.half, case] |= touch.site in _KEYED
        # What acts at the entrance of an attention half needs its tokens there, but nothing of what comes out.
        kept = [touch.half - (touch.site in _ENTRANCES and touch.half < end - 1) for touch in mine]
        last[case] = max([*kept, *(touch.half for touch in theirs)], default=-1)
    seen = _seen_from_the_end(width, config)
    now = np.full(count, width), np.zeros(count, dtype=np.int64)
    steps: list[tuple[np.ndarray, ...]] = []
    for half in range(end):
        into = np.minimum(now[0], begin[half]), np.maximum(now[1], stop[half])
        needed = np.where(half <= last, 0, seen[half])
        out = into
        if half % 2 == 0 and half < end - 1:
            spreads = (now[1] > now[0]) | keyed[half]
            window = config.sliding_window if config.bands[half // 2] == "sliding" else width
            out = into[0], np.where(spreads & (into[1] > into[0]), np.minimum(into[1] + window - 1, width), into[1])
        out = np.maximum(out[0], needed), out[1]
        if half % 2 or half == end - 1:
            into = out  # the experts work on each token alone
        gone = out[1] <= out[0]  # no column that counts can see it: the case ends as its prompt's own run does
        steps.append((np.where(gone, width, into[0]), np.where(gone, 0, into[1]),
                      np.where(gone, width, out[0]), np.where(gone, 0, out[1])))
        now = steps[-1][2:]  # type: ignore[assignment]
    start, stop, out_start, out_stop = (np.stack([step[part] for step in steps]) for part in range(4))
    return Cones(start, stop, out_start, out_stop, begins)


def _seen_from_the_end(width: int, config: ModelConfig) -> list[int]:
    """By half, the first column whose outcome the last column depends on."""
    seen, first = [width - 1], width - 1
    for layer in reversed(range(config.num_hidden_layers)):
        seen += [first, first]  # the experts of a layer, its attention
        first = max(0, first - config.sliding_window + 1) if config.bands[layer] == "sliding" else 0
    return seen[::-1]
