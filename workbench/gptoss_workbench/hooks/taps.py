"""One run's captures and edits, as the tap of the forward pass. Made for a run, gone with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from gptoss_workbench.errors import EditError, EditNeverFired, SiteError
from gptoss_workbench.hooks.acting import Editor
from gptoss_workbench.hooks.capture import Capture, Layout
from gptoss_workbench.hooks.chunk import Chunk
from gptoss_workbench.hooks.edits import Edit
from gptoss_workbench.hooks.feeding import Feed, why_not
from gptoss_workbench.hooks.keeping import Keeper
from gptoss_workbench.hooks.prompts import FOREVER, Prompts, within
from gptoss_workbench.hooks.selection import Frozen, Slice, Where, resolve
from gptoss_workbench.hooks.sites import POOLED, SITES
from gptoss_workbench.hooks.values import Held

Place = tuple[str, "int | None"]
Kept = dict[Place, list[Tensor]]
Filed = list[tuple[int, Place, Tensor]]
"""Captured parts: prompt, site and layer, tensor."""


@dataclass
class _Work:
    """What is to be done at one place: numbers of edits in their order, sites and statistics to keep."""

    edits: list[int] = field(default_factory=list)
    keep: bool = False
    pooled: list[str] = field(default_factory=list)
    routes: bool = False


class Taps:
    """Applies edits, then keeps captures. Call ``begin`` before each chunk and ``finish`` at the end.

    Args:
        layers: how many the model has.
        sizes: how long each fixed dimension of the sites is (``ModelConfig.dimensions``).
        window: reach of the sliding layers in tokens.
        capture: what to keep.
        edits: applied in the given order at each place.
        prompts: the rows of the batch.

    Raises:
        SiteError: a layer, head, expert, token or prompt that does not exist.
        EditError: something that is no edit.
    """

    def __init__(
        self, layers: int, sizes: Mapping[str, int], window: int, capture: Capture, edits: Sequence[Edit],
        prompts: Prompts,
    ) -> None:
        self._layer_count, self._sizes, self._window, self._prompts = layers, sizes, window, prompts
        self._capture, self._edits = capture, tuple(edits)
        self._work: dict[Place, _Work] = {}
        self._filed: Filed = []
        self._labelled = isinstance(capture.tokens, Where)
        self._chunk = Chunk([], [], 0, prompts)
        self._keeper = Keeper(capture, prompts, sizes, window)
        self._editor = Editor(self._edits, prompts, sizes)
        self._plan_capture()
        for number, edit in enumerate(self._edits):
            self._plan_edit(number, edit)

    def __contains__(self, site: str) -> bool:
        """Whether anything looks at this site."""
        return any(name == site for name, _ in self._work)

    def watches(self, layer: int, *sites: str) -> bool:
        """Whether anything looks at one of these sites in this layer."""
        return any((site, layer) in self._work for site in sites)

    @property
    def places(self) -> list[Place]:
        """The sites and layers at which there is something to do."""
        return list(self._work)

    def begin(self, rows: Sequence[int], positions: Tensor, ids: Tensor | None = None) -> None:
        """Announce a chunk.

        Args:
            rows: which prompts of the batch it continues.
            positions: (row, token), where its columns stand in their prompts; each row counts up by one from its first.
            ids: (row, token), the tokens; needed where labels of generated tokens are selected.
        """
        firsts = positions[:, 0].tolist()
        self.note(rows, firsts, ids)
        self._chunk = Chunk(list(rows), firsts, positions.shape[1], self._prompts)

    def note(self, rows: Sequence[int], firsts: Sequence[int], ids: Tensor | None) -> None:
        """Take down what the tokens of a chunk are, (row, token), where selections ask for that."""
        if self._labelled and ids is not None:
            for row, first, line in zip(rows, firsts, ids.tolist(), strict=True):
                self._prompts.read(row, max(0, first), line[max(0, -first):])

    def __call__(self, site: str, layer: int | None, x: Tensor, start: int = 0) -> Tensor:
        """The tap: x (prompt, the site's dimensions...) in, the same or an edited copy out.

        Args:
            start: the column of the chunk that x begins at; attention maps come in blocks of queries.
        """
        work = self._work.get((site, layer))
        if work is None:
            return x
        if work.edits:
            x = self._editor.change(work.edits, site, layer, x, self._chunk, start)
        if work.routes:
            self._chunk.routes = x
        if work.keep:
            self._filed += self._keeper.keep(site, layer, x, self._chunk, start)
        if work.pooled:
            self._filed += self._keeper.pool(work.pooled, layer, x, self._chunk, start)
        return x

    def changed(self, row: int, first: int, edits: Sequence[Edit]) -> Taps:
        """The same captures, and from position ``first`` of a prompt on other edits; see ``Generation.change``.

        Raises:
            EditError: an edit whose tokens can't be cut in two.
        """
        after = [cut(edit, row, self._prompts, first, None) for edit in edits]
        before = []
        for edit in self._edits:
            of = resolve(edit.place.prompt, len(self._prompts), "prompt")
            others = tuple(one for one in of if one != row)
            if others:
                before.append(replace(edit, place=replace(edit.place, prompt=others)) if row in of else edit)
            if row in of:
                before.append(cut(edit, row, self._prompts, 0, first))
        taps = Taps(self._layer_count, self._sizes, self._window, self._capture, [*before, *after], self._prompts)
        taps._keeper, taps._filed = self._keeper, self._filed
        taps._editor.fired[: len(before)] = [1] * len(before)  # what was taken back need not act any more
        return taps

    @property
    def edits(self) -> tuple[Edit, ...]:
        return self._edits

    def feed(self, rows: Sequence[int], firsts: Sequence[int]) -> Feed | str:
        """What is left to do from these positions on, as the same operations for every token; or why that can't be.

        Args:
            rows: which prompts go on.
            firsts: the position of the next token of each.
        """
        reason = why_not(self._edits, self._prompts, rows, firsts)
        if reason is not None:
            return reason
        kept = [place for place, work in self._work.items() if work.keep]
        pooled = {layer: work.pooled for (_, layer), work in self._work.items() if work.pooled}
        return Feed(self._edits, self._keeper, self._prompts, self._sizes, kept, pooled, self._editor.fired,
                    self._layers, rows, firsts)

    def take(self) -> Filed:
        """What was kept since the last time."""
        filed, self._filed = self._filed, []
        return filed

    @property
    def kept(self) -> list[Kept]:
        """What was kept and not taken, by prompt and place, in the order of the chunks."""
        return group(self._filed, len(self._prompts))

    def positions_of(self, row: int, read: int) -> list[int]:
        """Which of a prompt's ``read`` tokens the captures are of."""
        if self._capture.names and row not in self._keeper.rows:
            return []
        return list(within(self._prompts.chosen(self._capture.tokens, row), 0, read))

    def layout(self, row: int) -> Layout:
        """How the captures of a prompt are labelled."""
        return self._keeper.layout(row)

    def finish(self, since: int = 0) -> None:
        """Say if something was asked for that never came by.

        Args:
            since: edits before this one have acted elsewhere and need not have done so here.

        Raises:
            EditNeverFired: edits that changed nothing because their place never came by.
            SiteError: a capture whose tokens never came by.
        """
        idle = [edit for edit, count in zip(self._edits[since:], self._editor.fired[since:], strict=True)
                if not count]
        if idle:
            raise EditNeverFired(
                "An edit never fired: the place it names did not come by.",
                expected="every edit to act at least once", got="; ".join(map(repr, idle[:3])),
                hint=self._what_there_is(idle[0].place.tokens, idle[0]),
            )
        if self._capture.names and not self._keeper.seen:
            raise SiteError("The capture selects no token.", expected="at least one token of a prompt",
                            got=f"tokens={self._capture.tokens!r}", hint=self._what_there_is(self._capture.tokens))

    def _what_there_is(self, tokens: Frozen, edit: Edit | None = None) -> str:
        """The names that do exist, for an error."""
        if isinstance(tokens, Where) and tokens.labels:
            name = tokens.labels[0][0]
            return f"The values of {name} here: {', '.join(map(repr, self._prompts.said(name)[:8]))}."
        if edit is not None and edit.place.by_expert:
            return f"The experts that served there: {sorted(self._editor.served) or 'none of these tokens came by'}."
        ends = ", ".join(str(length - 1) for length in sorted({*self._prompts.lengths})[:4])
        return f"The prompt's tokens are 0 to {ends}; check tokens=, prompt= and layer=."

    # planning ---------------------------------------------------------------------------------------------------

    def _at(self, site: str, layer: int | None) -> _Work:
        return self._work.setdefault((site, layer), _Work())

    def _layers(self, site: str, selection: Frozen) -> Sequence[int | None]:
        if not SITES[site].per_layer:
            return [None]
        return resolve(selection, self._layer_count, "layer")

    def _plan_capture(self) -> None:
        capture = self._capture
        self._prompts.check(capture.tokens, self._keeper.rows)
        for dim, selection in capture.selections().items():
            resolve(selection, self._sizes[dim], dim)
        for site in capture.sites:
            for layer in self._layers(site, capture.layers):
                self._at(site, layer).keep = True
                if capture.experts is not None and "slot" in SITES[site].dims:
                    self._at("router.experts", layer).routes = True
        for name in capture.pooled:
            assert name in POOLED
            for layer in self._layers("attn.pattern", capture.layers):
                self._at("attn.pattern", layer).pooled.append(name)

    def _plan_edit(self, number: int, edit: Edit) -> None:
        if not isinstance(edit, Edit):
            raise EditError("edits= takes edits.", expected="wb.set(...), wb.add(...), wb.ban_experts(...), ...",
                            got=f"{type(edit).__name__}")
        place = edit.place
        for name, selection in place.dims:
            if name in self._sizes:
                resolve(selection, self._sizes[name], name)
        rows = resolve(place.prompt, len(self._prompts), "prompt")
        self._prompts.check(place.tokens, rows)
        keys = dict(place.dims).get("key")
        self._labelled |= isinstance(place.tokens, Where) or isinstance(keys, Where)
        for layer in self._layers(place.site, place.layer):
            self._at(place.site, layer).edits.append(number)
            if place.by_expert:
                self._at("router.experts", layer).routes = True


def cut(edit: Edit, row: int, prompts: Prompts, first: int, stop: int | None) -> Edit:
    """The edit at those of its tokens in one prompt that lie within [first, stop).

    Raises:
        EditError: its tokens are chosen by label, or what it does to one depends on which others it acts on.
    """
    place, args = edit.place, dict(edit.args)
    rest = len(SITES[place.site].dims) - 1
    rows = any(isinstance(value, Held) and value.tensor.dim() > rest and len(value.tensor) > 1
               for name, value in edit.args if name in ("value", "run"))
    if isinstance(place.tokens, Where) or rows or (edit.name == "patch" and (args["run"] is None or "source" in args)):
        raise EditError("Such an edit can't begin or end in the middle of a text.", got=f"{edit!r:.120}",
                        expected="tokens by position, and one value for all or each by its position")
    chosen = within(prompts.chosen(place.tokens, row), first, FOREVER if stop is None else stop)
    tokens: Frozen = tuple(chosen) if isinstance(chosen, list) else \
        Slice(chosen.start, None if chosen.stop >= FOREVER else chosen.stop, None if chosen.step == 1 else chosen.step)
    return replace(edit, place=replace(place, prompt=row, tokens=tokens))


def group(filed: Filed, prompts: int) -> list[Kept]:
    """Captured parts by prompt and place."""
    kept: list[Kept] = [{} for _ in range(prompts)]
    for row, place, part in filed:
        kept[row].setdefault(place, []).append(part)
    return kept
