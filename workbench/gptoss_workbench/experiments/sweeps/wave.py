"""Cases that go through the model together, half a layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from gptoss_workbench.experiments.sweeps.base import Base
from gptoss_workbench.experiments.sweeps.cones import Cones, half_of, halves
from gptoss_workbench.hooks.taps import Place, Taps
from gptoss_workbench.model.model import Model
from gptoss_workbench.model.transformer import SCORES_AT_ONCE, Sight, no_tap

_LOOKING = ("attn.q", "attn.z", "attn.out")
SCORES_TOGETHER = SCORES_AT_ONCE >> 4
"""Attention scores computed together: few enough to stay in a processor's cache, which was fastest."""


class Wave:
    """Some cases of some prompts, run to the end by ``logits``.

    Rows are columns of cases laid end to end, case by case: all that works on one token at a time sees (1, row, ...).

    Args:
        prompt: which row of ``base`` each case changes.
        taps: the edits of each case, those of its prompt's own run first.
        inherited: how many of them are of the prompt's own run.
        cones: what each case has to compute.
        always: halves in which prompts' own runs have edits too.
        should_stop: asked before each half.
    """

    def __init__(
        self, model: Model, base: Base, prompt: Sequence[int], taps: Sequence[Taps], inherited: Sequence[int],
        cones: Cones, always: Container[int], should_stop: Callable[[], bool],
    ) -> None:
        self._model, self._base, self._cones, self._always, self._stop = model, base, cones, always, should_stop
        self._taps, self._inherited = taps, inherited
        self._at: dict[Place, list[int]] = {}  # cases with something to do at a place
        self._within: dict[int, list[int]] = {}  # and in a half
        for case, tap in enumerate(taps):
            for place in tap.places:
                self._at.setdefault(place, []).append(case)
                within = self._within.setdefault(half_of(*place, model.config), [])
                if within[-1:] != [case]:
                    within.append(case)
        self._device = model.device
        self._prompt = torch.tensor(prompt, device=self._device)
        self._positions = base.positions[self._prompt]  # (case, column)
        self._alive = np.ones(len(taps), dtype=bool)
        self._rows: list[int] = []  # where each case's rows begin
        self._looking: list[int] = []  # and those of them that look

    def logits(self) -> Tensor | None:
        """After the last token, (case, vocab); None when it was stopped on the way.

        Raises:
            EditNeverFired: an edit of a case did not act.
        """
        config, begins = self._model.config, self._cones.begins
        end = halves(config) - 1
        mask = torch.zeros_like(self._positions, dtype=torch.bool)
        x = self._base.states[0].new_empty(0, config.hidden_size)
        for half in range(int(begins.min()), end + 1):
            if self._stop():
                return None
            x, mask = self._enter(half, x, mask)
            x, mask = self._drop_unchanged(half, x, mask)
            if half < end and len(x):
                x, mask = self._experts(x, mask, half) if half % 2 else self._attention(x, mask, half)
        logits = self._finish(x, mask)
        for taps, inherited in zip(self._taps, self._inherited, strict=True):
            taps.finish(inherited)
        return logits

    # entering a half ------------------------------------------------------------------------------------------------

    def _enter(self, half: int, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of this half: those that come from the one before, and others as they are in the prompt's own run."""
        layers = self._model.config.num_hidden_layers
        wanted = self._out(half) | self._stretch(self._cones.start[half], self._cones.stop[half])
        if torch.equal(wanted, mask):
            rows = x
        else:
            rows = self._own(half, wanted)
            if len(x):
                rows[mask[wanted]] = x[wanted[mask]]
        self._rows = self._looking = _offsets(wanted)
        for one in self._within.get(half, ()):
            if self._rows[one + 1] > self._rows[one]:
                self._taps[one].begin([0], self._positions[one][wanted[one]][None])
        for site, layer in _entries(half, layers):
            rows = self._tap(site, layer, rows[None])[0]
        return rows, wanted

    def _own(self, half: int, mask: Tensor) -> Tensor:
        """What enters a half in the prompts' own runs: (case, column) bool -> (row, d_model)."""
        case, column = mask.nonzero(as_tuple=True)
        states = self._base.states[half]
        return states.flatten(0, 1).index_select(0, self._prompt[case] * states.shape[1] + column)

    def _out(self, half: int) -> Tensor:
        return self._stretch(self._cones.out_start[half], self._cones.out_stop[half])

    def _stretch(self, start: np.ndarray, stop: np.ndarray) -> Tensor:
        """(case,) and (case,) -> (case, column) bool; none of a case that has come to its end."""
        column = np.arange(self._positions.shape[1])
        inside = (column >= start[:, None]) & (column < stop[:, None]) & self._alive[:, None]
        return torch.from_numpy(inside).to(self._device)

    def _drop_unchanged(self, half: int, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Cases whose edits are all done, and changed no bit, end as their prompt's own run does."""
        fresh = [] if half in self._always else [
            one for one in np.flatnonzero((self._cones.begins == half) & self._alive).tolist() if self._done(one, half)]
        if not fresh:
            return x, mask
        new = torch.zeros(len(mask), 1, dtype=torch.bool, device=self._device)
        new[fresh] = True
        new = mask & new
        changed = torch.ne(x[new[mask]], self._own(half, new)).any(-1)
        touched = {*new.nonzero()[changed, 0].tolist()}
        gone = [one for one in fresh if one not in touched]
        if not gone:
            return x, mask
        self._alive[gone] = False
        kept = mask & torch.from_numpy(self._alive)[:, None].to(self._device)
        self._rows = self._looking = _offsets(kept)
        return x[kept[mask]], kept

    def _done(self, case: int, half: int) -> bool:
        """Whether a case has nothing to do any more behind the entrance of a half."""
        config = self._model.config
        entries = _entries(half, config.num_hidden_layers)
        return all(place in entries or half_of(*place, config) < half for place in self._taps[case].places)

    # the tap --------------------------------------------------------------------------------------------------------

    def _tap(self, site: str, layer: int | None, x: Tensor, start: int = 0) -> Tensor:
        """x (1, row, ...): every case's edits on its own rows."""
        ends = self._looking if site in _LOOKING else self._rows
        edited = [case for case in self._at.get((site, layer), ()) if ends[case + 1] > ends[case]]
        out = x.clone() if edited else x
        for case in edited:
            own = slice(ends[case], ends[case + 1])
            out[:, own] = self._taps[case](site, layer, x[:, own])
        return out

    def _map_tap(self, cases: Sequence[int], counts: Sequence[int], site: str, layer: int | None, x: Tensor,
                 start: int = 0) -> Tensor:
        """x (case, head, query, key): the same for attention maps, padding left out."""
        edited = {*self._at.get((site, layer), ())}.intersection(cases)
        out = x.clone() if edited else x
        for at, (case, count) in enumerate(zip(cases, counts, strict=True)):
            if case in edited and count > start:
                pad = int((self._positions[case] < 0).sum())
                own = (slice(at, at + 1), slice(None), slice(0, count - start), slice(pad, None))
                out[own] = self._taps[case](site, layer, x[own], start)
        return out

    # the halves -----------------------------------------------------------------------------------------------------

    def _attention(self, x: Tensor, mask: Tensor, half: int) -> tuple[Tensor, Tensor]:
        """Rows of ``mask`` in; of those that this half computes, the residual stream after the attention."""
        transformer, layer, out = self._model.transformer, half // 2, self._out(half)
        positions = self._positions[mask][None]
        turns = transformer.frequencies, transformer.concentration, x.dtype
        cos, sin = transformer.kernels.rope_tables(positions, *turns)
        looking = out[mask]
        queries = None if bool(looking.all()) else looking.nonzero()[:, 0]
        self._looking = _offsets(out)
        norm = transformer.norm(x[None], transformer.weights.layers[layer].attn_norm)
        q, k, v = transformer.project(norm, layer, cos, sin, self._tap, queries)
        z = torch.empty_like(q[0])
        counts, keyed = out.sum(1), mask.sum(1)
        first, first_key = (count.cumsum(0) - count for count in (counts, keyed))
        steps = torch.arange(mask.shape[1], device=self._device)
        for cases in self._blocks(counts.tolist(), self._base.keys[layer].shape[1]):
            at = torch.tensor(cases, device=self._device)
            there = steps[: int(counts[at].max())] < counts[at, None]  # (case, query)
            rows = (first[at, None] + steps[: there.shape[1]])[there]
            some = mask[at]
            own = torch.cat([torch.arange(int(first_key[case]), int(first_key[case] + keyed[case])) for case in cases])
            keys, values = self._base.keys[layer][self._prompt[at]], self._base.values[layer][self._prompt[at]]
            keys[some], values[some] = k[0, own], v[0, own]
            asking = q.new_zeros(*there.shape, *q.shape[2:])
            asking[there] = q[0, rows]
            # Each row counts up by one from where a case's queries begin; what is beyond its end is left out below.
            where = self._positions[at].gather(1, out[at].int().argmax(1, keepdim=True)) + steps[: there.shape[1]]
            sight = Sight(where, self._positions[at], self._model.config, SCORES_AT_ONCE)
            tap = partial(self._map_tap, cases, counts[at].tolist())
            z[rows] = transformer.look(asking, keys, values, layer, sight, tap)[there]
        stream = x if queries is None else x[queries]
        return stream + transformer.write(z[None], layer, self._tap)[0], out

    def _blocks(self, counts: Sequence[int], columns: int) -> list[list[int]]:
        """Cases of about equally many queries, so that little is padded, few enough for their scores to fit."""
        order = sorted((case for case, count in enumerate(counts) if count), key=lambda case: counts[case])
        room = max(1, SCORES_TOGETHER // (self._model.config.num_attention_heads * columns))
        blocks: list[list[int]] = []
        for case in order:
            if not blocks or (len(blocks[-1]) + 1) * counts[case] > room:
                blocks.append([])
            blocks[-1].append(case)
        return blocks

    def _experts(self, x: Tensor, mask: Tensor, half: int) -> tuple[Tensor, Tensor]:
        transformer, layer = self._model.transformer, half // 2
        places = (place for case in self._within.get(half, ()) for place in self._taps[case].places)
        seen = any(half_of(*place, self._model.config) == half and place not in _entries(half, layer)
                   for place in places)
        norm = transformer.norm(x[None], transformer.weights.layers[layer].mlp_norm)
        return x + transformer.experts(norm, layer, self._tap if seen else no_tap)[0], mask

    def _finish(self, x: Tensor, mask: Tensor) -> Tensor:
        """Rows before the final norm -> logits (case, vocab) after the last token."""
        transformer, logits = self._model.transformer, self._base.logits[self._prompt]
        if not len(x):
            return logits
        hidden = self._tap("final_norm", None, transformer.norm(x[None], transformer.weights.final_norm))
        last = mask[:, -1]
        at = mask.sum(1).cumsum(0)[last] - 1
        if ("logits", None) in self._at:
            logits[last] = self._tap("logits", None, transformer.unembed(hidden))[0, at]
        else:
            logits[last] = transformer.unembed(hidden[0, at])
        return logits


def _offsets(mask: Tensor) -> list[int]:
    """(case, column) bool -> where each case's rows begin, and the end."""
    return [0, *mask.sum(1).cumsum(0).tolist()]


def _entries(half: int, layers: int) -> list[tuple[str, int | None]]:
    """The sites that are passed on the way into a half, in their order."""
    layer = half // 2
    if half % 2:
        return [("resid_mid", layer)]
    before: list[tuple[str, int | None]] = [("embed", None) if layer == 0 else ("resid_post", layer - 1)]
    return before if layer == layers else [*before, ("resid_pre", layer)]
