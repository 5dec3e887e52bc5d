"""Which tokens, layers, heads or experts a capture or an edit means: selections as values."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from gptoss_workbench.errors import SiteError
from gptoss_workbench.harmony.spans import Span

TOKEN_LABELS = ("role", "channel", "recipient", "message", "field", "text", "id")
"""What is known of each token, as in the coordinates of a run."""


@dataclass(frozen=True)
class Slice:
    """A slice that can be hashed and compared (Python's own can't be hashed before 3.12)."""

    start: int | None = None
    stop: int | None = None
    step: int | None = None

    def __repr__(self) -> str:
        return f"slice({self.start}, {self.stop}{'' if self.step is None else f', {self.step}'})"

    def of(self, size: int) -> range:
        """The indices in a dimension of ``size``."""
        return range(*slice(self.start, self.stop, self.step).indices(size))


@dataclass(frozen=True)
class Where:
    """The tokens that carry certain labels. Make one with ``wb.where(channel="analysis")``.

    Attributes:
        labels: (name, allowed values); all must hold.
        matching: a regular expression that the token's text holds somewhere; None for any.
        test: a function of the token's text; None for none.
    """

    labels: tuple[tuple[str, tuple[object, ...]], ...] = ()
    matching: str | None = None
    test: Callable[[str], object] | None = None

    def __repr__(self) -> str:
        parts = [f"{name}={(allowed[0] if len(allowed) == 1 else list(allowed))!r}" for name, allowed in self.labels]
        if self.matching is not None:
            parts.append(f"matching={self.matching!r}")
        if self.test is not None:
            parts.append(f"test={getattr(self.test, '__name__', type(self.test).__name__)}")
        return f"wb.where({', '.join(parts)})"

    def picks(self, facts: Mapping[str, object]) -> bool:
        """Whether a token with these facts (the names of ``TOKEN_LABELS``) is meant."""
        text = str(facts["text"])
        return (all(facts[name] in allowed for name, allowed in self.labels)
                and (self.matching is None or re.search(self.matching, text) is not None)
                and (self.test is None or bool(self.test(text))))


Indices = int | slice | Sequence[int] | Span | Sequence[Span] | Where | Callable[[str], object] | None
Frozen = int | Slice | tuple[int, ...] | Where | None


def where(*, matching: str | None = None, test: Callable[[str], object] | None = None, **labels: object) -> Where:
    """Tokens by what they are, e.g. ``wb.where(channel="analysis", field="content")`` for the chain of thought.

    Args:
        labels: any of role, channel, recipient, message, field, text, id; a value or a list of values.
        matching: a regular expression searched for in the token's text.
        test: a function of the token's text that says whether it is meant. It can't be written to JSON.

    While text is generated, the tokens of a header carry what has been said so far; everything else is final.

    Raises:
        SiteError: a label that tokens do not have, a faulty expression, or nothing to go by.
    """
    for name in labels:
        if name not in TOKEN_LABELS:
            raise SiteError(f"Tokens have no label {name!r}.", expected=", ".join(TOKEN_LABELS), got=name)
    if matching is not None:
        try:
            re.compile(matching)
        except (re.error, TypeError) as error:
            raise SiteError("matching= is no regular expression.", expected="an expression for re.search",
                            got=repr(matching), hint=str(error)) from None
    if test is not None and not callable(test):
        raise SiteError("test= is no function.", expected="a function of the token's text", got=type(test).__name__)
    if not labels and matching is None and test is None:
        raise SiteError("wb.where was not told what to look for.", expected="labels, matching= or test=",
                        got="nothing", hint="tokens=None means all tokens.")
    allowed = {name: tuple(value) if isinstance(value, list | tuple | set) else (value,)
               for name, value in sorted(labels.items())}
    return Where(tuple(allowed.items()), matching, test)


def freeze(selection: Indices | Frozen | Iterable[int]) -> Frozen:
    """A selection as a value that can't change; a span becomes its positions, a function a test of the text.

    Raises:
        SiteError: it is no selection.
    """
    if selection is None or isinstance(selection, Where | Slice):
        return selection
    if isinstance(selection, slice):
        return Slice(*(None if end is None else operator.index(end)
                       for end in (selection.start, selection.stop, selection.step)))
    if isinstance(selection, Span):
        return Slice(selection.start, selection.stop)
    if isinstance(selection, bool | str | float):
        raise _wrong_type(selection)
    try:
        return operator.index(selection)  # type: ignore[arg-type]  # ints of every kind, numpy's too
    except TypeError:
        pass
    if callable(selection):
        return where(test=selection)
    try:
        items = list(selection)  # type: ignore[arg-type]
        if items and all(isinstance(item, Span) for item in items):
            return tuple(position for span in items for position in range(span.start, span.stop))
        if any(_is_truth(item) for item in items):
            raise _mask(selection)
        return tuple(operator.index(item) for item in items)
    except TypeError:
        raise _wrong_type(selection) from None


def _is_truth(item: object) -> bool:
    """Whether an item is True or False, in Python, NumPy or torch: a mask read as indices would mean 0 and 1."""
    return isinstance(item, bool) or str(getattr(item, "dtype", "")) in ("bool", "torch.bool")


def _mask(selection: object) -> SiteError:
    return SiteError("A mask is no selection.", expected="indices", got=f"{selection!r:.80}",
                     hint="mask.nonzero()[:, 0] of a tensor, numpy.flatnonzero(mask) of an array or a list.")


def _wrong_type(selection: object) -> SiteError:
    return SiteError(
        "A selection must be an index, a slice, a list of indices, or None for all.",
        expected="int, slice, list of int, None; for tokens also a Span, wb.where(...) or a function of the text",
        got=f"{selection!r} ({type(selection).__name__})",
    )


def resolve(selection: Frozen | slice, size: int, what: str) -> list[int]:
    """The indices that a frozen selection means in a dimension of ``size``; negative ones count from the end.

    Raises:
        SiteError: an index lies outside 0 .. size - 1, or the selection goes by the labels of tokens.
    """
    if selection is None:
        return list(range(size))
    if isinstance(selection, slice):
        return list(range(size))[selection]
    if isinstance(selection, Slice):
        return list(selection.of(size))
    if isinstance(selection, Where):
        raise SiteError(f"A {what} can't be chosen by the labels of tokens.", expected="an index, a slice or a list",
                        got=repr(selection))
    wanted = (selection,) if isinstance(selection, int) else selection
    for index in wanted:
        if not -size <= index < size:
            raise SiteError(
                f"There is no {what} {index}.", expected=f"{what} 0 to {size - 1}" if size else f"no {what} at all",
                got=str(index),
            )
    return [index % size for index in wanted]
