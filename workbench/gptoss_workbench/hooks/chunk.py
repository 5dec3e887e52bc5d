"""A stretch of tokens of some prompts, as the forward pass reads them together."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gptoss_workbench.hooks.prompts import Prompts, rank, within
from gptoss_workbench.hooks.selection import Frozen
from gptoss_workbench.hooks.sites import Site


class Chunk:
    """Which tokens the columns of the tensors are that pass by.

    Attributes:
        rows: the prompts of the batch that it continues.
        firsts: the position of each row's first column; negative in left padding.
        width: how many columns it has.
        routes: ``router.experts`` (row, token, slot) of the layer that is being computed, where somebody needs it.
    """

    def __init__(self, rows: Sequence[int], firsts: Sequence[int], width: int, prompts: Prompts) -> None:
        self.rows, self.firsts, self.width, self._prompts = rows, firsts, width, prompts
        self.routes: Tensor | None = None
        longest = max(prompts.lengths, default=0)
        self.pads = [longest - prompts.lengths[row] for row in rows]
        """Columns of padding before the first key of each row."""
        self._found: dict[tuple[Frozen, int, int, int], tuple[Sequence[int], Sequence[int]]] = {}

    def select(self, selection: Frozen, i: int, start: int, width: int) -> tuple[Sequence[int], Sequence[int]]:
        """The tokens of the i-th row that a selection means, among ``width`` columns from ``start`` on.

        Returns:
            Their positions in the prompt, and their columns counted from ``start``; never padding.
        """
        key = (selection, i, start, width)
        if key not in self._found:
            first = self.firsts[i] + start
            positions = within(self._prompts.chosen(selection, self.rows[i]), max(0, first), max(0, first + width))
            self._found[key] = positions, [position - first for position in positions]
        return self._found[key]

    def order(self, selection: Frozen, i: int, positions: Sequence[int]) -> list[int]:
        """The place of positions among all that a selection means in the prompt of the i-th row."""
        chosen = self._prompts.chosen(selection, self.rows[i])
        return [rank(chosen, position) for position in positions]

    def part(self, spec: Site, x: Tensor, i: int) -> Tensor:
        """The i-th prompt of x: tokens first, keys without padding. A view."""
        part = x[i].movedim(spec.dims.index(spec.token_dim), 0)
        return part[..., self.pads[i]:] if "key" in spec.dims else part
