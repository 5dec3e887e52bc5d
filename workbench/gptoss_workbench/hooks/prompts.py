"""The prompts of a run: how long each is, what its tokens are, and which of them a selection means."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

from gptoss_workbench.errors import SiteError
from gptoss_workbench.harmony.spans import SpanParser, TokenLabel, labels, parse
from gptoss_workbench.harmony.vocabulary import Vocabulary
from gptoss_workbench.hooks.selection import Frozen, Slice, Where, resolve

FOREVER = 1 << 60
"""End of a stretch of tokens that goes on for as long as the text does."""

Chosen = range | list[int]


class Prompts:
    """Rows of tokens that selections are resolved against. Negative indices count from the end of each prompt.

    Args:
        rows: token ids of each prompt, without padding.
        vocabulary: gives the vocabulary, for selections by label or text; None where there are no such selections.
        open_ended: tokens may follow (generation), so that a later position is no mistake.
    """

    def __init__(
        self, rows: Sequence[Sequence[int]], vocabulary: Callable[[], Vocabulary] | None, open_ended: bool,
    ) -> None:
        self.lengths, self.open_ended = [len(row) for row in rows], open_ended
        self._rows, self._vocabulary = rows, vocabulary
        self._facts: dict[int, list[dict[str, object]]] = {}
        self._parsers: dict[int, SpanParser] = {}
        self._chosen: dict[tuple[Frozen, int], Chosen] = {}
        self._scanned: dict[tuple[Where, int], int] = {}

    def __len__(self) -> int:
        return len(self.lengths)

    # what the tokens are --------------------------------------------------------------------------------------------

    def facts(self, row: int) -> list[dict[str, object]]:
        """What is known of each token that was read: the labels of ``selection.TOKEN_LABELS`` by name."""
        if row not in self._facts:
            ids = self._rows[row]
            found = labels(ids, self._words(), finished=not self.open_ended)
            self._facts[row] = [self._fact(id, label) for id, label in zip(ids, found, strict=True)]
        return self._facts[row]

    def read(self, row: int, first: int, ids: Sequence[int]) -> None:
        """Note the tokens at positions ``first`` and on, as far as they are new: those that were generated."""
        facts = self.facts(row)
        for position, id in enumerate(ids, first):
            if position < len(facts):
                continue
            if row not in self._parsers:
                self._parsers[row] = SpanParser(self._words())
                for before in self._rows[row]:
                    self._parsers[row].feed(before)
            facts.append(self._fact(id, self._parsers[row].feed(id)))

    def _fact(self, id: int, label: TokenLabel) -> dict[str, object]:
        return {"id": id, "text": self._words().token_text(id), "role": label.role, "channel": label.channel,
                "recipient": label.recipient, "message": label.message, "field": label.field}

    def spans(self, row: int) -> tuple[tuple[int, int], ...]:
        """The spans of a prompt as (start, stop), without what was generated after it."""
        found = parse(self._rows[row], self._words(), finished=not self.open_ended)
        return tuple((span.start, span.stop) for span in found)

    def _words(self) -> Vocabulary:
        if self._vocabulary is None:
            raise SiteError("These tokens have no labels.", expected="a run of a model", got="rows of ids alone")
        return self._vocabulary()

    def said(self, name: str) -> list[object]:
        """The values that a label has in these prompts, each once, for messages."""
        return list(dict.fromkeys(fact[name] for row in range(len(self)) for fact in self.facts(row)))

    # what a selection means -----------------------------------------------------------------------------------------

    def chosen(self, selection: Frozen, row: int) -> Chosen:
        """The positions that a selection of tokens means in one prompt, ascending, each once; maybe without end."""
        if isinstance(selection, Where):
            return self._by_label(selection, row)
        key = (selection, row)
        if key not in self._chosen:
            self._chosen[key] = self._resolve(selection, self.lengths[row])
        return self._chosen[key]

    def _resolve(self, selection: Frozen, length: int) -> Chosen:
        end = FOREVER if self.open_ended else length
        if selection is None:
            return range(end)
        if isinstance(selection, Slice):
            step = selection.step or 1
            if step < 1:
                raise SiteError("A slice of tokens runs forwards.", expected="a positive step", got=repr(selection))
            start = _from_start(selection.start or 0, length)
            stop = end if selection.stop is None else min(end, _from_start(selection.stop, length))
            return range(start, max(start, stop), step)
        assert not isinstance(selection, Where)
        indices = (selection,) if isinstance(selection, int) else selection
        return sorted({_from_start(index, length) for index in indices})

    def _by_label(self, selection: Where, row: int) -> list[int]:
        key, facts = (selection, row), self.facts(row)
        found = self._chosen.setdefault(key, [])
        assert isinstance(found, list)
        start = self._scanned.get(key, 0)
        found += [position for position, fact in enumerate(facts[start:], start) if selection.picks(fact)]
        self._scanned[key] = len(facts)
        return found

    def count(self, selection: Frozen, row: int) -> int | None:
        """How many positions a selection means in one prompt; None while that is open."""
        chosen = self.chosen(selection, row)
        if isinstance(selection, Where) and self.open_ended:
            return None
        return None if isinstance(chosen, range) and chosen.stop >= FOREVER else len(chosen)

    def check(self, selection: Frozen, rows: Sequence[int]) -> None:
        """Raises SiteError for an index beyond a prompt, unless tokens may follow."""
        indices = (selection,) if isinstance(selection, int) else selection
        if not isinstance(indices, tuple):
            return
        for row in rows:
            for index in indices:
                if index < 0 or not self.open_ended:
                    resolve(index, self.lengths[row], "token")


def within(chosen: Chosen, first: int, stop: int) -> Chosen:
    """Those of ascending positions that lie in [first, stop)."""
    if isinstance(chosen, range):
        begin = chosen.start + max(0, -(-(first - chosen.start) // chosen.step)) * chosen.step
        return range(begin, max(begin, min(stop, chosen.stop)), chosen.step)
    return chosen[bisect_left(chosen, first):bisect_left(chosen, stop)]


def rank(chosen: Chosen, position: int) -> int:
    """The place of a position among those that were chosen."""
    return chosen.index(position) if isinstance(chosen, range) else bisect_left(chosen, position)


def _from_start(index: int, length: int) -> int:
    return max(0, index + length) if index < 0 else index
