"""Which tokens, layers, heads or experts a capture or an edit means."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

from gptoss_workbench.errors import SiteError

Indices = int | slice | Sequence[int] | None


def freeze(selection: Indices | Iterable[int]) -> int | slice | tuple[int, ...] | None:
    """A selection as a value that can't change: an int, a slice, a tuple of ints, or None for all.

    Raises:
        SiteError: it is none of these.
    """
    if selection is None or isinstance(selection, slice):
        return selection
    if isinstance(selection, bool | str | float):
        raise _wrong_type(selection)
    try:
        return operator.index(selection)  # type: ignore[arg-type]  # ints of every kind, numpy's too
    except TypeError:
        pass
    try:
        return tuple(operator.index(item) for item in selection)  # type: ignore[union-attr]
    except TypeError:
        raise _wrong_type(selection) from None


def _wrong_type(selection: object) -> SiteError:
    return SiteError(
        "A selection must be an index, a slice, a list of indices, or None for all.",
        expected="int, slice, list of int, or None", got=f"{selection!r} ({type(selection).__name__})",
    )


def resolve(selection: int | slice | tuple[int, ...] | None, size: int, what: str) -> list[int]:
    """The indices that a frozen selection means in a dimension of ``size``; negative ones count from the end.

    Raises:
        SiteError: an index lies outside 0 .. size - 1.
    """
    if selection is None:
        return list(range(size))
    if isinstance(selection, slice):
        return list(range(size))[selection]
    wanted = (selection,) if isinstance(selection, int) else selection
    for index in wanted:
        if not -size <= index < size:
            raise SiteError(
                f"There is no {what} {index}.", expected=f"{what} 0 to {size - 1}" if size else f"no {what} at all",
                got=str(index),
            )
    return [index % size for index in wanted]
