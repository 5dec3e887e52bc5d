"""Filing what passes by: each prompt's part, without padding, cut to what was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gptoss_workbench.errors import SiteError
from gptoss_workbench.hooks import pooled
from gptoss_workbench.hooks.capture import Capture, Layout
from gptoss_workbench.hooks.chunk import Chunk
from gptoss_workbench.hooks.pooled import Spans
from gptoss_workbench.hooks.prompts import Prompts
from gptoss_workbench.hooks.selection import resolve
from gptoss_workbench.hooks.sites import SITES

Part = tuple[int, tuple[str, "int | None"], Tensor]


class Keeper:
    """Keeps what a capture asks for. A kept tensor shares memory with the pass only where it is all of a tensor.

    Args:
        window: reach of ``attn.window_mass``.

    Attributes:
        rows: the prompts that are captured.
        seen: whether any token that was asked for has come by.
    """

    def __init__(self, capture: Capture, prompts: Prompts, sizes: Mapping[str, int], window: int) -> None:
        self._capture, self._prompts, self._window = capture, prompts, window
        self.rows = resolve(capture.prompts, len(prompts), "prompt") if capture.names else []
        self.seen = False
        self._chosen = {dim: resolve(selection, sizes[dim], dim) for dim, selection in capture.selections().items()}
        self._whole = capture.tokens is None and len({*self.rows}) == len(prompts) and len({*prompts.lengths}) == 1
        self._spans: dict[int, Spans] = {}
        self._span_numbers: dict[int, Tensor] = {}

    @property
    def by_expert(self) -> bool:
        """Whether captures are cut by the experts that served, so that somebody has to tell which did."""
        return "expert" in self._chosen

    def keep(
        self, site: str, layer: int | None, x: Tensor, chunk: Chunk, start: int, ours: bool = False,
    ) -> list[Part]:
        """The parts of x (row, the site's dimensions...) that were asked for, as (prompt, place, part).

        Args:
            ours: x was made for the captures of a step, so that views of it may be kept.
        """
        spec = SITES[site]
        dims = [dim for dim in self._capture.dims(site) if dim in self._chosen]
        if self._whole and not dims:
            self.seen = True
            return [(row, (site, layer), x[i].contiguous()) for i, row in enumerate(chunk.rows)]
        axis = spec.dims.index(spec.token_dim)
        parts = []
        for i, row in enumerate(chunk.rows):
            positions, columns = chunk.select(self._capture.tokens, i, start, x.shape[1 + axis])
            if not positions or row not in self.rows:
                continue
            self.seen = True
            part = x[i]
            if len(columns) < part.shape[axis]:
                part = part.index_select(axis, torch.tensor(columns, device=x.device))
            if "key" in spec.dims:
                part = part[..., chunk.pads[i]:]
            for dim in dims:
                part = self._by_expert(part, chunk, i, columns) if dim not in spec.dims else \
                    part.index_select(spec.dims.index(dim), torch.tensor(self._chosen[dim], device=x.device))
            parts.append((row, (site, layer), part.clone() if not ours and _is_view(part) else part))
        return parts

    def _by_expert(self, part: Tensor, chunk: Chunk, i: int, columns: Sequence[int]) -> Tensor:
        """(token, slot, ...) -> (token, expert, ...) for the chosen experts; NaN or -1 where one did not serve."""
        if chunk.routes is None:
            raise SiteError("Nobody knows here which experts served.", expected="a capture without experts=",
                            got=f"experts={self._chosen['expert']}")
        served = chunk.routes[i][list(columns)]  # (token, slot)
        wanted = torch.tensor(self._chosen["expert"], device=part.device)
        hits = served[:, None, :] == wanted[:, None]  # (token, expert, slot)
        slots = hits.to(torch.int8).argmax(-1)  # (token, expert)
        rest = part.shape[2:]
        index = slots.view(*slots.shape, *(1,) * len(rest)).expand(*slots.shape, *rest)
        found = part.gather(1, index)
        absent = ~hits.any(-1).view(*slots.shape, *(1,) * len(rest))
        return found.masked_fill(absent, float("nan") if part.is_floating_point() else -1)

    def pool(self, names: Sequence[str], layer: int | None, x: Tensor, chunk: Chunk, start: int) -> list[Part]:
        """Statistics of a block of patterns (row, head, query, key + 1), as (prompt, place, part)."""
        spec, parts = SITES["attn.pattern"], []
        for i, row in enumerate(chunk.rows):
            positions, columns = chunk.select(self._capture.tokens, i, start, x.shape[2])
            if not positions or row not in self.rows:
                continue
            self.seen = True
            part = chunk.part(spec, x, i).transpose(0, 1)  # (head, query, key + 1)
            if len(columns) < part.shape[1]:
                part = part[:, columns]
            if "head" in self._chosen:
                part = part[self._chosen["head"]]
            spans, numbers = None, 0
            if "attn.span_mass" in names:
                spans, numbers = self._numbers(row, part), len(self._spans_of(row))
            found = pooled.reduce(names, part, positions, top=self._capture.top, window=self._window, span_of=spans,
                                  spans=numbers)
            parts += [(row, (name, layer), value) for name, value in found.items()]
        return parts

    def _spans_of(self, row: int) -> Spans:
        if row not in self._spans:
            given = self._capture.spans
            self._spans[row] = self._prompts.spans(row) if given is None else given
        return self._spans[row]

    def _numbers(self, row: int, pattern: Tensor) -> Tensor:
        keys = pattern.shape[-1] - 1
        if row not in self._span_numbers or len(self._span_numbers[row]) < keys:
            room = max(2 * keys, self._prompts.lengths[row])  # grows while text is generated
            self._span_numbers[row] = pooled.span_numbers(self._spans_of(row), room, pattern.device)
        return self._span_numbers[row]

    def layout(self, row: int) -> Layout:
        """How the captures of a prompt are labelled."""
        capture = self._capture
        if row not in self.rows:
            return Layout()
        dims = {name: capture.dims(name) for name in capture.names}
        coords: dict[str, Sequence[object]] = dict(self._chosen)
        if capture.pooled:
            spans = len(self._spans_of(row)) if "attn.span_mass" in capture.pooled else 0
            coords |= pooled.coords(capture.top, spans)
        used = {dim for of in dims.values() for dim in of}
        return Layout(dims, {dim: labels for dim, labels in coords.items() if dim in used})


def _is_view(part: Tensor) -> bool:
    """Whether a tensor keeps alive more memory than its own values need."""
    return part.untyped_storage().nbytes() > part.numel() * part.element_size()
