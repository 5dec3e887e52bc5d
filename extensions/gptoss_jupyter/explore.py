"""``wb.explore(model)``: type a prompt, see inside, change something, see what that did."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

import gptoss_workbench as wb
from gptoss_jupyter import controls, html, lifetime, present, views
from gptoss_jupyter.answering import Answer, Writer
from gptoss_jupyter.board import Board
from gptoss_jupyter.patch_panel import PatchPanel
from gptoss_jupyter.reading import Banned, Prompt, Reader, Reading
from gptoss_jupyter.words import plain_words
from gptoss_jupyter.worker import LatestWins
from gptoss_workbench.errors import SiteError

if TYPE_CHECKING:
    import xarray as xr

    from gptoss_workbench.model.generation import Generation
    from gptoss_workbench.model.model import Model

TOKEN, TEXT = "chosen token", "whole text"


def explore(
    model: Model | None = None, prompt: str = "What is 27 + 58?", *, system: str = "", developer: str = "",
    effort: str = "medium", quantity: str = "surprisal", max_tokens: int = 256,
) -> Explorer:
    """The live dashboard of a model. Running the cell again closes the one it made before.

    Args:
        model: a loaded model; the embedded one by default.
        prompt, system, developer, effort: what stands in the boxes at first.
        quantity: what colours the tokens, one of ``wb.TOKEN_QUANTITIES``.
        max_tokens: the longest answer.
    """
    asked = Prompt(prompt, system, developer, effort)
    made = Explorer(wb.load() if model is None else model, asked, quantity, max_tokens)
    lifetime.adopt(made)
    return made


class Explorer:
    """The dashboard. What can be done with the mouse can be done from Python, and waited for with ``flush``.

    Attributes:
        user, system, developer, effort, quantity, scope: ipywidgets; set ``.value``.
        board: the linked pictures (``strip``, ``grid``, ``routes``, ``lens``, ``next``).
        patch_panel: the patch experiment and its boxes.
        widget: the whole, for placing it in a layout of one's own.
        last_error: the exception behind the message now shown, or None.
    """

    def __init__(self, model: Model, prompt: Prompt, quantity: str, max_tokens: int) -> None:
        self.model, self.max_tokens, self.last_error = model, max_tokens, None
        self._name = Path(model.name).name if Path(model.name).is_absolute() else model.name
        self._reader, self._answer, self._writer = Reader(model), None, None
        self._banned: Banned = ()
        self._pinned: int | None = None
        self._shown = -1
        self._took = 0.0
        self._closed = False
        self._make_controls(prompt, quantity)
        self.board = Board(model)
        self.said = views.AnswerView(title="What does it answer?", empty="Press Answer to let the model speak.")
        self.edits = views.EditsView(hint="No edits. Click an expert in the grid to ban it.")
        self.status = views.StatusView(name=self._name, facts=_facts(model))
        self.patch_panel = PatchPanel(model, self.start_patch, self.stop)
        self.widget = self._lay_out()
        self._typing = LatestWins(self._refresh, self._failed, name="gptoss-typing")
        self._long = LatestWins(lambda job: job(), self._failed, interval=0.0, name="gptoss-answer")
        self._listen()
        self._typing.submit()
        self._typing.flush(120)

    def __repr__(self) -> str:
        return f"Explorer({self._name}, {self.user.value!r})"

    # what a person and a notebook do --------------------------------------------------------------------------------

    @property
    def selected(self) -> int:
        """The selected token's position; setting None follows the end of the text."""
        return self._shown

    @selected.setter
    def selected(self, position: int | None) -> None:
        self._pinned = None if position is None else int(position)
        self._typing.submit()

    @property
    def banned(self) -> list[tuple[int, int]]:
        """The banned experts as (layer, expert); set a new list to change them."""
        return list(self._banned)

    @banned.setter
    def banned(self, pairs: Iterable[tuple[int, int]]) -> None:
        config = self.model.config
        wanted = tuple(sorted({(int(layer), int(expert)) for layer, expert in pairs}))
        for layer, expert in wanted:
            if not (0 <= layer < config.num_hidden_layers and 0 <= expert < config.num_local_experts):
                raise SiteError("There is no such expert.", got=f"layer {layer}, expert {expert}", expected=(
                    f"layer 0 to {config.num_hidden_layers - 1}, expert 0 to {config.num_local_experts - 1}"))
        self._banned = wanted
        as_lists = [list(pair) for pair in wanted]
        for view in (self.board.grid, self.edits):
            if view.banned != as_lists:
                view.banned = as_lists
        self._typing.submit()

    @property
    def state(self) -> dict[str, Any]:
        """What is shown, as plain data: tokens, values, usage, routes, lens, next, banned, answer, patch, status.

        ``answer`` is [{"label": channel, "text": what was said}, ...]; ``messages`` are the same for display.
        """
        return {**self.board.state, "answer": [
                    {"label": message["label"], "text": "".join(text for _, text in message["pieces"])}
                    for message in self.said.messages],
                "messages": list(self.said.messages), "answer_note": self.said.note, "patch": self.patch_panel.state(),
                "status": self.status.message, "level": self.status.level}

    def flush(self, timeout: float = 60.0) -> bool:
        """Wait until nothing is being computed. False when that took longer than ``timeout`` seconds."""
        end = time.monotonic() + timeout
        while self._long.busy or self._typing.busy:
            left = end - time.monotonic()
            if left <= 0 or not (self._long.flush(left) and self._typing.flush(max(0.0, end - time.monotonic()))):
                return False
        return True

    def start(self) -> None:
        """Let the model answer what stands in the boxes. Returns at once; ``stop`` ends it, ``flush`` waits for it."""
        if self._busy():
            return
        try:
            self._writer = Writer(self.model, self._prompt(), self._banned, str(self.quantity.value), self.max_tokens,
                                  self._news, lambda: max(0.08, self._took))
        except Exception as error:
            self._failed(error)
            return
        self._news(self._writer.answer)
        self._working(True)
        self._long.submit(self._write)

    def answer(self, timeout: float = 600.0) -> Generation | None:
        """Let the model answer and wait. An interrupt is a stop: what there is so far is kept and returned."""
        self.start()
        try:
            self.flush(timeout)
        except KeyboardInterrupt:
            self.stop()
            self.flush()
        return self._writer.generation if self._writer else None

    def stop(self) -> None:
        """End the answer or the patch in progress after the step it is in; what there is stays."""
        if self._writer is not None:
            self._writer.stop()
        self.patch_panel.stop()

    def start_patch(self) -> None:
        """Run the patch experiment of the boxes in ``patch_panel``. Returns at once."""
        if self._busy():
            return
        self.patch_panel.prepare()
        self._working(True)
        self._long.submit(self._patch)

    def patch(self, timeout: float = 600.0) -> xr.DataArray | None:
        """Run the patch experiment and wait for its (layer, token) result; None if it failed, see the panel."""
        self.patch_panel.result = None
        self.start_patch()
        try:
            self.flush(timeout)
        except KeyboardInterrupt:
            self.stop()
            self.flush()
        return self.patch_panel.result

    def close(self) -> None:
        """Stop everything, end the threads, take the widgets out of the page."""
        if self._closed:
            return
        self._closed = True
        self.stop()
        self._long.close()
        self._typing.close()
        self._reader.forget()
        controls.close_all(self.widget)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        live: Any = {} if self._closed else self.widget._repr_mimebundle_()
        live = live[0] if isinstance(live, tuple) else live
        return {**(live or {}), "text/plain": repr(self), "text/html": html.snapshot(self._name, self.state)}

    # how it is built ------------------------------------------------------------------------------------------------

    def _make_controls(self, prompt: Prompt, quantity: str) -> None:
        self.user = controls.text_box("User", prompt.user, "Ask something …", 4, "user")
        self.system = controls.text_box("System (identity)", prompt.system, "You are ChatGPT, …", 1, "system")
        self.developer = controls.text_box("Developer (instructions)", prompt.developer, "none", 1, "developer")
        self.effort = controls.choice("Effort", ("low", "medium", "high"), prompt.effort, "effort")
        names = [(name.replace("_", " "), name) for name in wb.TOKEN_QUANTITIES]
        self.quantity = controls.menu("Colour tokens by", names, quantity, "quantity")
        self.scope = controls.choice("Expert grid shows the", (TOKEN, TEXT), TOKEN, "scope")
        self.answer_button = controls.button("Answer", "start", "Let the model answer", primary=True)
        self.stop_button = controls.button("Stop", "stop", "Stop and keep what is there", disabled=True)

    def _lay_out(self) -> widgets.Box:
        box, board = controls.box, self.board
        buttons = box([self.answer_button, self.stop_button], "gptoss-row")
        form = box([box([self.system, self.developer], "gptoss-column"), self.user,
                    box([self.effort, buttons], "gptoss-column", "gptoss-actions")], "gptoss-form")
        for view, name in ((board.strip, "strip"), (self.said, "answer"), (board.grid, "grid"),
                           (board.routes, "routes"), (board.lens, "lens"), (board.next, "next")):
            view.add_class("gptoss-card")
            view.add_class(f"gptoss-card-{name}")
        self.edits.add_class("gptoss-edit-list")
        experts = self.model.config.num_local_experts
        shape = "gptoss-few" if experts <= 16 else "gptoss-some" if experts <= 48 else "gptoss-many"
        panels = box([board.strip, self.said, board.next, board.grid, board.routes, board.lens], "gptoss-panels", shape)
        tools = box([self.quantity, self.scope], "gptoss-row", "gptoss-tools")
        return box([self.status, form, box([tools, self.edits], "gptoss-row", "gptoss-toolbar"), panels,
                    self.patch_panel.widget], "gptoss-dashboard")

    def _listen(self) -> None:
        for control in (self.user, self.system, self.developer, self.effort, self.quantity, self.scope):
            control.observe(lambda _: self._typing.submit(), "value")
        self.board.strip.observe(self._token_chosen, "selected")
        for view in (self.board.grid, self.edits):
            view.observe(lambda change: setattr(self, "banned", change["new"]), "banned")
        self.answer_button.on_click(lambda _: self.start())
        self.stop_button.on_click(lambda _: self.stop())

    # what happens in callbacks and workers --------------------------------------------------------------------------

    def _prompt(self) -> Prompt:
        return Prompt(self.user.value, self.system.value, self.developer.value, str(self.effort.value))

    def _token_chosen(self, change: Any) -> None:
        if change["new"] != self._shown:  # our own paint sets the trait too
            last = len(self.board.strip.tokens) - 1
            self.selected = None if change["new"] >= last else change["new"]

    def _busy(self) -> bool:
        if self._closed or self._long.busy:
            if not self._closed:
                self.status.show(message="One thing at a time: stop what is running first.", level="quiet")
            return True
        return False

    def _working(self, working: bool) -> None:
        self.answer_button.disabled, self.stop_button.disabled = working, not working
        self.patch_panel.start_button.disabled = working

    def _write(self) -> None:
        try:
            if self._writer is not None:
                self._writer.write()
        finally:
            self._working(False)

    def _patch(self) -> None:
        try:
            self.patch_panel.run()
        finally:
            self._working(False)

    def _news(self, answer: Answer) -> None:
        self._answer = answer
        self._typing.submit()

    def _failed(self, error: BaseException) -> None:
        self.last_error = error
        self.board.outdated()
        self.status.show(level="error", message=plain_words(error), pulse="")

    def _refresh(self, _: object) -> None:
        """Read what stands in the boxes now, run the model, paint. The typing worker's work."""
        begun = time.perf_counter()
        prompt, quantity, banned, answer = self._prompt(), str(self.quantity.value), self._banned, self._answer
        self._say(answer, prompt, banned)
        reading = self._read(prompt, quantity, banned, answer)
        last = len(reading.ids) - 1
        self._shown = last if self._pinned is None else max(0, min(self._pinned % (last + 1) if self._pinned < 0
                                                                   else self._pinned, last))
        self.board.paint(reading, quantity, self._shown, self.scope.value == TEXT, banned)
        self._took = time.perf_counter() - begun
        self.last_error = None
        self.status.show(level="quiet", message="", pulse=f"{len(reading.ids)} tokens, {1000 * self._took:.0f} ms")

    def _read(self, prompt: Prompt, quantity: str, banned: Banned, answer: Answer | None) -> Reading:
        """The prompt, and after it the answer as far as it belongs to that prompt."""
        if answer is None or answer.prompt != prompt:
            return self._reader.read(self.model.encode(prompt.conversation()), [], banned, quantity)
        ids = list(answer.prompt_ids)
        if not answer.running:
            return self._reader.read(ids, list(answer.tokens), banned, quantity)
        if answer.run is None:
            return self._reader.read(ids, [], answer.banned, quantity)
        return Reading(answer.run.ids, len(ids), answer.run)

    def _say(self, answer: Answer | None, prompt: Prompt, banned: Banned) -> None:
        if answer is None:
            return
        vocabulary = self.model.vocabulary
        spans = wb.harmony.parse([*answer.prompt_ids, *answer.tokens], vocabulary)
        spans = [span for span in spans if span.start >= len(answer.prompt_ids)]
        earlier, edited = answer.prompt != prompt, answer.banned != banned
        self.said.show(
            messages=present.messages(vocabulary, spans),
            running=answer.running, stale=earlier, note=answer.note(), empty="" if answer.tokens or answer.running
            else "Stopped before the first token.",
            hint="To an earlier prompt." if earlier else "Written under other edits; press Answer to see the change."
            if edited else "",
        )


def _facts(model: Model) -> str:
    config = model.config
    return (f"{config.num_hidden_layers} layers × {config.num_local_experts} experts, "
            f"top {config.num_experts_per_tok}, {model.dtype} on {model.device}")
