"""The pictures of one text, linked by the selected token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

import gptoss_workbench as wb
from gptoss_jupyter import present, views
from gptoss_jupyter.reading import Banned, Reading, sites
from gptoss_workbench.harmony.spans import Span
from gptoss_workbench.plots.labels import visible

if TYPE_CHECKING:
    from gptoss_workbench.model.model import Model
    from gptoss_workbench.model.run import Run

LENS_RANKS = 5
NEXT_TOP = 10
NEXT_SEARCHED = 20  # how deep to look for the other side's probability of a token

GRID_HINT = "Bar beside a layer: hollow sliding, solid full attention. Click a cell to ban that expert."


class Board:
    """Strip, expert grid, routes, lens and next-token bars, made once and repainted together.

    ``paint`` is called from one thread at a time. ``state`` is what was painted last, as plain data.
    """

    def __init__(self, model: Model) -> None:
        config = model.config
        self._model = model
        text_rows, grid_rows = row_heights(config.num_hidden_layers)
        self.strip = views.StripView(title="What does the model read?")
        self.grid = views.GridView(title="Which experts does a token go to?", bands=list(config.bands),
                                   row_height=grid_rows, hint=GRID_HINT)
        self.routes = views.RoutesView(title="In which shares?", row_height=text_rows,
                                       note=f"router weight, top {config.num_experts_per_tok}",
                                       hint="Each layer's experts, heaviest first; width is router weight.")
        self.lens = views.LensView(title="What would each layer say next?", row_height=text_rows,
                                   hint="Likeliest tokens, if the model ended at that layer.")
        self.next = views.NextView(title="What comes next?")
        self.state: dict[str, Any] = {}

    @property
    def all(self) -> tuple[views.View, ...]:
        """The views in reading order."""
        return self.strip, self.grid, self.routes, self.lens, self.next

    def paint(self, reading: Reading, quantity: str, selected: int, whole_text: bool, banned: Banned) -> None:
        """Show a reading with one token selected."""
        model, vocabulary, run = self._model, self._model.vocabulary, reading.run
        text = f"“{visible(vocabulary.token_bytes(reading.ids[selected]), 12)}”"
        # Each view is shown as soon as its numbers are there: the experts do not wait for the unembedding.
        routes = present.routes(run, selected)
        usage = wb.expert_usage(run, tokens=None if whole_text else selected)
        grid = present.grid(usage, [[expert for expert, _ in slots] for _, slots in routes], whole_text, text)
        self.grid.show(**grid, stale=False)
        self.routes.show(rows=routes, stale=False)

        spans: list[Span] = wb.harmony.parse(reading.ids, vocabulary)
        strip = present.strip(vocabulary, reading.ids, spans, self._values(run, quantity), model.known(reading.ids))
        self.strip.show(**strip, selected=selected, stale=False)

        lens = present.lens(vocabulary, wb.logit_lens(model, run, token=selected, top=LENS_RANKS))
        self.lens.show(rows=lens, stale=False)

        now = wb.next_tokens(model, run, token=selected, top=NEXT_SEARCHED)
        before = None if reading.clean is None else wb.next_tokens(
            model, reading.clean, token=selected, top=NEXT_SEARCHED)
        bars = present.next_tokens(vocabulary, now, before, NEXT_TOP)
        self.next.show(**bars, title=f"What comes after {text}?", stale=False,
                       hint="Clean: the same text without the edits." if before is not None else "")
        self.state = {
            "ids": list(reading.ids), "prompt_length": reading.prompt_length,
            "tokens": [vocabulary.token_text(token) for token in reading.ids], "groups": strip["groups"],
            "quantity": quantity, "unit": strip["unit"],
            "values": np.frombuffer(strip["values"], dtype=np.float32).tolist(), "high": strip["high"],
            "selected": selected, "usage": usage.values.tolist(), "routes": routes, "lens": lens,
            "next": bars["rows"], "banned": [list(pair) for pair in banned],
        }

    def _values(self, run: Run, quantity: str) -> xr.DataArray:
        """The quantity of each token; nothing measured where the run does not hold what it takes."""
        if "attn.pattern" in sites(quantity) and not run.layers("attn.pattern"):
            return xr.DataArray(np.full(len(run.ids), np.nan, dtype=np.float32), dims="token", name=quantity)
        return wb.token_quantity(self._model, run, quantity)

    def outdated(self) -> None:
        """Dim the pictures: they belong to an earlier input."""
        for view in self.all:
            view.show(stale=True)


def row_heights(layers: int) -> tuple[int, int]:
    """Pixels a layer gets: in rows of text, and in the grid; equal as long as both fit a screen."""
    fitting = 360 // max(1, layers)
    return min(26, max(15, fitting)), min(26, max(9, fitting))
