"""One run's captures and edits, as the tap of the forward pass. Made for a run, gone with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gptoss_workbench.errors import EditError, EditNeverFired, SiteError
from gptoss_workbench.hooks.capture import Capture
from gptoss_workbench.hooks.edits import SINK, Edit, Frozen
from gptoss_workbench.hooks.selection import resolve
from gptoss_workbench.hooks.sites import SITES

Kept = dict[tuple[str, "int | None"], list[Tensor]]


class Taps:
    """Applies edits, then keeps captures. Call ``begin`` before each chunk and ``finish`` at the end.

    Args:
        layers: how many the model has.
        sizes: how long each fixed dimension of the sites is (``ModelConfig.dimensions``).
        capture: what to keep.
        edits: applied in the given order at each place.
        lengths: tokens of each prompt of the batch, padding not counted.
        open_ended: True when tokens may follow the prompt (generation), so that later positions are no mistake.

    Raises:
        SiteError: a layer, head, expert, token or prompt that does not exist.
    """

    def __init__(
        self, layers: int, sizes: Mapping[str, int], capture: Capture, edits: Sequence[Edit],
        lengths: Sequence[int], open_ended: bool = False,
    ) -> None:
        self._layer_count, self._sizes = layers, sizes
        self._lengths, self._open = list(lengths), open_ended
        self._pads = [max(lengths) - n for n in lengths]
        self._tokens = capture.tokens
        self.kept: list[Kept] = [{} for _ in lengths]
        self._capture: set[tuple[str, int | None]] = set()
        self._edits: dict[tuple[str, int | None], list[int]] = {}
        self._all = tuple(edits)
        self._fired = [0] * len(self._all)
        for site in capture.sites:
            self._capture.update((site, layer) for layer in self._layers(site, capture.layers))
        self._check_tokens(capture.tokens, range(len(lengths)))
        for number, edit in enumerate(self._all):
            self._plan(number, edit)
        self._places = self._capture | self._edits.keys()

    def __contains__(self, site: str) -> bool:
        """Whether anything looks at this site."""
        return any(name == site for name, _ in self._places)

    def begin(self, rows: Sequence[int], positions: Tensor) -> None:
        """Announce a chunk: which prompts of the batch it continues, and the positions (row, token) of its columns."""
        self._rows, self._positions = list(rows), positions

    def __call__(self, site: str, layer: int | None, x: Tensor) -> Tensor:
        place = (site, layer)
        if place not in self._places:
            return x
        for number in self._edits.get(place, ()):
            x = self._apply(number, layer, x)
        if place in self._capture:
            self._keep(place, x)
        return x

    def positions_of(self, row: int, read: int) -> list[int]:
        """Which of a prompt's ``read`` tokens the captures are of."""
        if self._tokens is None:
            return list(range(read))
        at = torch.arange(read)[None]
        return self._mask(self._tokens, at, [row])[0].nonzero()[:, 0].tolist()

    def finish(self) -> None:
        """Raises EditNeverFired, naming the edits that changed nothing because their place never came by."""
        idle = [repr(edit) for edit, count in zip(self._all, self._fired, strict=True) if not count]
        if idle:
            ends = ", ".join(str(n - 1) for n in sorted(set(self._lengths))[:4])
            raise EditNeverFired(
                "An edit never fired: the place it names did not come by.",
                expected="every edit to act at least once", got="; ".join(idle[:3]),
                hint=f"The prompt's tokens are 0 to {ends}; check tokens=, prompt= and layer=.",
            )

    # planning ---------------------------------------------------------------------------------------------------

    def _layers(self, site: str, selection: Frozen) -> Sequence[int | None]:
        if not SITES[site].per_layer:
            return [None]
        return resolve(selection, self._layer_count, "layer")

    def _plan(self, number: int, edit: Edit) -> None:
        if not isinstance(edit, Edit):
            raise EditError("edits= takes edits.", expected="wb.set(...), wb.add(...), wb.ban_experts(...), ...",
                            got=f"{type(edit).__name__}")
        for name, selection in edit.place.dims:
            if name in self._sizes:
                resolve(selection, self._sizes[name], name)  # type: ignore[arg-type]
        rows = resolve(edit.place.prompt, len(self._lengths), "prompt")
        self._check_tokens(edit.place.tokens, rows)
        for layer in self._layers(edit.place.site, edit.place.layer):
            self._edits.setdefault((edit.place.site, layer), []).append(number)

    def _check_tokens(self, selection: Frozen, rows: Sequence[int]) -> None:
        """An index beyond the prompt is a mistake, unless tokens may follow."""
        indices = (selection,) if isinstance(selection, int) else selection
        if not isinstance(indices, tuple):
            return
        for row in rows:
            for index in indices:
                if index < 0 or not self._open:
                    resolve(index, self._lengths[row], "token")

    # acting -----------------------------------------------------------------------------------------------------

    def _mask(self, selection: Frozen, at: Tensor, rows: Sequence[int]) -> Tensor:
        """Which columns at positions ``at`` (row, token) a selection of tokens means; never padding."""
        mask = at >= 0
        if selection is None:
            return mask
        lengths = torch.tensor([self._lengths[row] for row in rows], device=at.device)[:, None]
        if isinstance(selection, slice):
            step = selection.step or 1
            if step < 1:
                raise SiteError("A slice of tokens runs forwards.", expected="a positive step", got=repr(selection))
            start = _from_start(selection.start or 0, lengths)
            mask &= (at >= start) & ((at - start) % step == 0)
            if selection.stop is not None:
                mask &= at < _from_start(selection.stop, lengths)
            return mask
        indices = (selection,) if isinstance(selection, int) else selection
        hit = torch.zeros_like(mask)
        for index in indices:
            hit |= at == _from_start(index, lengths)
        return mask & hit

    def _apply(self, number: int, layer: int | None, x: Tensor) -> Tensor:
        edit = self._all[number]
        spec = SITES[edit.place.site]
        mask = self._mask(edit.place.tokens, self._positions, self._rows)
        if edit.place.prompt is not None:
            wanted = set(resolve(edit.place.prompt, len(self._lengths), "prompt"))
            mask = mask & torch.tensor([row in wanted for row in self._rows], device=mask.device)[:, None]
        row, column = mask.nonzero(as_tuple=True)
        axis = 1 + spec.dims.index(spec.token_dim)
        y = x.movedim(axis, 1)
        index = self._index(edit, row, column, y)
        if index is None or not len(row):
            return x
        chosen = y[index]
        new = edit.change(chosen, layer, self._positions[row, column])
        y = y.clone()
        try:
            y[index] = torch.as_tensor(new, dtype=y.dtype, device=y.device).expand_as(chosen)
        except RuntimeError as error:
            shape = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise EditError(
                f"The value of an edit does not fit {edit.place.site!r}.",
                expected=f"a value that broadcasts to {tuple(chosen.shape)} (selected tokens, then the site's rest)",
                got=f"{shape} from {edit!r}",
            ) from error
        self._fired[number] += len(row)
        x = y.movedim(1, axis)
        if edit.place.site == "router.logits":
            self._enough_experts(x, edit)
        return x

    def _index(self, edit: Edit, row: Tensor, column: Tensor, y: Tensor) -> tuple[Tensor, ...] | None:
        """Indices of the selected values of y (row, token, rest...), or None when a selected key is not there yet."""
        rest = [dim for dim in SITES[edit.place.site].dims if dim != SITES[edit.place.site].token_dim]
        selections = dict(edit.place.dims)
        if not selections:
            return row, column
        lead = (-1,) + (1,) * len(rest)
        index = [row.view(lead), column.view(lead)]
        for number, dim in enumerate(rest):
            shape = [1] * (len(rest) + 1)
            if dim == "key" and dim in selections:
                keys = self._key_columns(selections[dim], y.shape[2 + number], edit.place.site == "attn.pattern")
                if keys is None:
                    return None
                shape[0], shape[number + 1] = len(row), -1
                index.append(keys.to(row.device)[row].view(shape))
            else:
                wanted = resolve(selections.get(dim), y.shape[2 + number], dim)  # type: ignore[arg-type]
                shape[number + 1] = -1
                index.append(torch.tensor(wanted, dtype=torch.int64, device=row.device).view(shape))
        return tuple(index)

    def _key_columns(self, selection: object, width: int, has_sink: bool) -> Tensor | None:
        """Columns (row, n) of the selected keys; positions count in each prompt, the sink is the last column."""
        keys = width - has_sink
        parts = (selection,) if isinstance(selection, int | str) else selection
        columns = []
        for row in self._rows:
            pad, length = self._pads[row], self._lengths[row]
            if parts is None or isinstance(parts, slice):
                wanted: list[int] = list(range(keys - pad))[parts or slice(None)]
            else:
                given = [item for item in parts if item != SINK]  # type: ignore[union-attr]
                wanted = [item + length if item < 0 else item for item in given]
                wanted = [item for item in wanted if item < keys - pad]
                if SINK in parts:  # type: ignore[operator]
                    if not has_sink:
                        raise SiteError("Scores have no sink column.", expected='"attn.pattern"', got='key="sink"')
                    wanted.append(keys - pad)
            columns.append([item + pad for item in wanted])
        if not columns[0] or len({len(c) for c in columns}) > 1:
            return None
        return torch.tensor(columns)

    def _enough_experts(self, logits: Tensor, edit: Edit) -> None:
        slots, experts = self._sizes["slot"], self._sizes["expert"]
        left = int((logits > -math.inf).sum(-1)[self._positions >= 0].min())
        if left < slots:
            raise EditError(
                "Too many experts are banned for one token.",
                expected=f"at least {slots} of {experts} left",
                got=f"{left} left after {edit!r}",
            )

    # keeping ----------------------------------------------------------------------------------------------------

    def _keep(self, place: tuple[str, int | None], x: Tensor) -> None:
        """File each prompt's part of the chunk without padding. The forward pass never writes in place: no copy."""
        spec = SITES[place[0]]
        axis = spec.dims.index(spec.token_dim)
        mask = self._mask(self._tokens, self._positions, self._rows)
        for i, row in enumerate(self._rows):
            part = x[i]
            if self._pads[row] and "key" in spec.dims:
                part = part[..., self._pads[row]:]
            if not bool(mask[i].all()):
                part = part.index_select(axis, mask[i].nonzero()[:, 0])
            if part.shape[axis]:
                self.kept[row].setdefault(place, []).append(part)


def _from_start(index: int, lengths: Tensor) -> Tensor:
    return lengths + index if index < 0 else torch.full_like(lengths, index)
