"""Applying edits to what passes by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gptoss_workbench.errors import EditError, SiteError, WorkbenchError
from gptoss_workbench.hooks.changes import KINDS, At
from gptoss_workbench.hooks.chunk import Chunk
from gptoss_workbench.hooks.edits import SINK, Edit, Place
from gptoss_workbench.hooks.prompts import Prompts, within
from gptoss_workbench.hooks.selection import Slice, Where, resolve
from gptoss_workbench.hooks.sites import SITES, Site


class Editor:
    """The edits of one run.

    Attributes:
        fired: how many tokens (or slots) each edit has acted on.
        served: the experts seen where an edit looked for experts in slots.
    """

    def __init__(self, edits: Sequence[Edit], prompts: Prompts, sizes: Mapping[str, int]) -> None:
        self._edits, self._prompts, self._sizes = edits, prompts, sizes
        self.fired = [0] * len(edits)
        self.served: set[int] = set()
        self._recall: dict[tuple[int, int | None, int], dict[int, Tensor]] = {}
        self._rows: dict[int, set[int]] = {}

    def change(
        self, numbers: Sequence[int], site: str, layer: int | None, x: Tensor, chunk: Chunk, start: int,
    ) -> Tensor:
        """x (row, the site's dimensions...) after these edits, in their order; x itself when there is nothing to do."""
        spec, mine, last = SITES[site], None, None
        width = x.shape[1 + spec.dims.index(spec.token_dim)]
        for number in numbers:
            edit = self._edits[number]
            for i, row in enumerate(chunk.rows):
                if row not in self._rows_of(number):
                    continue
                now = x if mine is None else mine
                self._remember(number, layer, chunk.part(spec, now, i), chunk, i, start, width)
                positions, columns = chunk.select(edit.place.tokens, i, start, width)
                if not positions:
                    continue
                if mine is None:
                    mine = x.clone()
                part = chunk.part(spec, mine, i)
                if self._act(number, spec, layer, part, chunk, i, positions, columns, start):
                    last = edit
        if mine is None or last is None:
            return x
        if site == "router.logits":
            self._enough_experts(mine, chunk, last)
        if site == "router.experts":
            self._existing_experts(mine, last)
        return mine

    def _rows_of(self, number: int) -> set[int]:
        if number not in self._rows:
            self._rows[number] = {*resolve(self._edits[number].place.prompt, len(self._prompts), "prompt")}
        return self._rows[number]

    def _act(
        self, number: int, spec: Site, layer: int | None, part: Tensor, chunk: Chunk, i: int,
        positions: Sequence[int], columns: Sequence[int], start: int,
    ) -> bool:
        """Change one prompt's part (token, rest...) in place. False when nothing is selected there."""
        edit = self._edits[number]
        dims = tuple(dim for dim in spec.dims if dim != spec.token_dim)
        selected = self._selected(edit.place, spec, dims, part, chunk.rows[i])
        order, experts = chunk.order(edit.place.tokens, i, positions), None
        if edit.place.by_expert:
            hits = self._hits(edit.place, chunk, i, [column + start for column in columns])
            positions, order = [positions[t] for t, _, _ in hits], [order[t] for t, _, _ in hits]
            experts = [expert for _, _, expert in hits]
            leading = [[columns[t] for t, _, _ in hits], [slot for _, slot, _ in hits]]
        else:
            leading = [list(columns)]
        if not leading[0] or any(not indices for indices in selected.values()):
            return False
        index = _mesh(leading, dims[len(leading) - 1:], selected, part)
        count = self._prompts.count(edit.place.tokens, chunk.rows[i])
        at = At(edit.place.site, layer, positions, order, count, dims, selected, experts,
                self._recall.get((number, layer, chunk.rows[i]), {}))
        self._write(edit, part, index, at)
        self.fired[number] += len(leading[0])
        return True

    def _write(self, edit: Edit, part: Tensor, index: tuple[Tensor, ...], at: At) -> None:
        args = dict(edit.args)
        chosen = part[index]
        if "change" in args:
            new = args["change"](chosen)  # of the user's own: what it raises is not ours to dress up
        else:
            try:
                new = KINDS[edit.name].change(chosen, at, **args)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, IndexError) as error:
                raise _does_not_fit(edit, chosen, str(error).partition("\n")[0]) from error
        try:
            new = torch.as_tensor(new, device=part.device)
            if not part.is_floating_point() and new.is_floating_point() and bool((new != new.round()).any()):
                raise EditError("Experts are whole numbers.", expected="integers", got=repr(edit)[:200])
            part[index] = new.to(part.dtype).expand_as(chosen)
        except (RuntimeError, TypeError, ValueError) as error:
            got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise _does_not_fit(edit, chosen, str(got)) from error

    # what is selected ---------------------------------------------------------------------------------------------

    def _selected(
        self, place: Place, spec: Site, dims: Sequence[str], part: Tensor, row: int,
    ) -> dict[str, Sequence[int]]:
        """The selected indices of the further dimensions that were selected."""
        found: dict[str, Sequence[int]] = {}
        for name, selection in place.dims:
            if name == "key":
                found[name] = self._keys(selection, part.shape[-1], place.site == "attn.pattern", row)
            elif name in spec.dims:
                found[name] = resolve(selection, part.shape[1 + dims.index(name)], name)
        return found

    def _keys(self, selection: Any, width: int, has_sink: bool, row: int) -> Sequence[int]:
        """Columns of the selected keys that are there; positions count in the prompt, the sink is the last column."""
        keys = width - has_sink
        if isinstance(selection, Slice | Where):
            return list(within(self._prompts.chosen(selection, row), 0, keys))
        given = (selection,) if isinstance(selection, int | str) else selection
        wanted = [item for item in given if isinstance(item, int)]
        found = list(within(self._prompts.chosen(tuple(wanted), row), 0, keys))
        if SINK in given and not has_sink:
            raise SiteError("Scores have no sink column.", expected='"attn.pattern"', got='key="sink"',
                            hint="wb.scale_sink(0.0) closes the sink.")
        return [*found, keys] if SINK in given else found

    def _hits(self, place: Place, chunk: Chunk, i: int, columns: Sequence[int]) -> list[tuple[int, int, int]]:
        """(which of the selected tokens, slot, expert) for every slot in which one of the place's experts serves."""
        assert chunk.routes is not None
        wanted = {*resolve(dict(place.dims)["expert"], self._sizes["expert"], "expert")}
        served = chunk.routes[i][list(columns)].tolist()
        self.served.update(expert for slots in served for expert in slots)
        return [(t, slot, expert) for t, slots in enumerate(served) for slot, expert in enumerate(slots)
                if expert in wanted]

    # values of this pass for a patch from another token -----------------------------------------------------------

    def _remember(
        self, number: int, layer: int | None, part: Tensor, chunk: Chunk, i: int, start: int, width: int,
    ) -> None:
        args = dict(self._edits[number].args)
        if self._edits[number].name != "patch" or args["run"] is not None:
            return
        memory = self._recall.setdefault((number, layer, chunk.rows[i]), {})
        positions, columns = chunk.select(args["source"], i, start, width)
        for position, column in zip(positions, columns, strict=True):
            memory[position] = part[column].clone()

    # what the router needs ----------------------------------------------------------------------------------------

    def _enough_experts(self, logits: Tensor, chunk: Chunk, edit: Edit) -> None:
        slots, experts = self._sizes["slot"], self._sizes["expert"]
        real = [max(0, -first) for first in chunk.firsts]
        left = min(int((logits[i, pad:] > -math.inf).sum(-1).min()) for i, pad in enumerate(real)
                   if pad < logits.shape[1])
        if left < slots:
            raise EditError(
                "Too many experts are banned for one token.",
                expected=f"at least {slots} of {experts} left",
                got=f"{left} left after {edit!r}",
            )

    def _existing_experts(self, chosen: Tensor, edit: Edit) -> None:
        experts = self._sizes["expert"]
        low, high = int(chosen.min()), int(chosen.max())
        if low < 0 or high >= experts:
            raise SiteError("An edit chose an expert that does not exist.", expected=f"expert 0 to {experts - 1}",
                            got=f"{low if low < 0 else high} after {edit!r}")


def _mesh(
    leading: Sequence[Sequence[int]], dims: Sequence[str], selected: Mapping[str, Sequence[int]], part: Tensor,
) -> tuple[Tensor, ...]:
    """Indices into part: the leading ones go together, each further dimension crosses with them."""
    def indices(values: Sequence[int], *shape: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=part.device).view(shape)

    if not any(dim in selected for dim in dims):
        return tuple(indices(values, -1) for values in leading)
    count = len(dims)
    index = [indices(values, -1, *(1,) * count) for values in leading]
    for number, dim in enumerate(dims):
        wanted = selected.get(dim, range(part.shape[len(leading) + number]))
        index.append(indices(list(wanted), *(1,) * (number + 1), -1, *(1,) * (count - number - 1)))
    return tuple(index)


def _does_not_fit(edit: Edit, chosen: Tensor, got: str) -> WorkbenchError:
    return EditError(
        f"The value of an edit does not fit {edit.place.site!r}.",
        expected=f"a value that broadcasts to {tuple(chosen.shape)} (selected tokens, then the site's rest)",
        got=f"{got} from {edit!r:.200}",
    )
