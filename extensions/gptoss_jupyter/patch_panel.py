"""The patch experiment: two prompts, two answers, and where in the model the difference sits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

import gptoss_workbench as wb
from gptoss_jupyter import controls, present, views
from gptoss_jupyter.words import plain_words
from gptoss_workbench.plots.labels import visible

if TYPE_CHECKING:
    import xarray as xr

    from gptoss_workbench.model.model import Model

SITES = (("residual stream", "resid_pre"), ("attention output", "attn.out"), ("experts' output", "mlp.out"))
HINT = ("Runs the corrupt prompt once for every layer and token, each time with that one place taken from the clean "
        "run. 1: the clean answer is back; 0: nothing changed. An answer is one token; most begin with a space.")


class PatchPanel:
    """The form and its heatmap.

    Attributes:
        widget: what to display.
        clean, corrupt, answer, other, site: the boxes.
        heat: the picture.
        result: DataArray (layer, token) of the last experiment, NaN where it was stopped before; None before one.
    """

    def __init__(self, model: Model, on_start: Callable[[], None], on_stop: Callable[[], None]) -> None:
        self._model, self._stop = model, threading.Event()
        self.clean = controls.line_box("Clean prompt (raw text)", "The capital of France is", "clean")
        self.corrupt = controls.line_box("Corrupt prompt (as many tokens)", "The capital of Italy is", "corrupt")
        self.answer = controls.line_box("Clean answer", " Paris", "answer")
        self.other = controls.line_box("Corrupt answer", " Rome", "other")
        self.site = controls.menu("Patch the", SITES, "resid_pre", "site")
        self.start_button = controls.button("Run the patch", "patch", "Every layer and token in turn", primary=True)
        self.stop_button = controls.button("Stop", "patch-stop", "Stop and keep what is done", disabled=True)
        self.start_button.on_click(lambda _: on_start())
        self.stop_button.on_click(lambda _: on_stop())
        self.status = views.StatusView()
        self.result: xr.DataArray | None = None
        self.heat = views.HeatView(title="Where does the answer sit?", unit="of the clean answer recovered", empty=HINT)
        form = controls.box([
            self.clean, self.corrupt, controls.box([self.answer, self.other], "gptoss-pair"),
            controls.box([self.site, self.start_button, self.stop_button], "gptoss-row"), self.status,
        ], "gptoss-patch-form")
        self.widget = widgets.Accordion(
            children=[controls.box([form, self.heat], "gptoss-patch-body")],
            titles=["Patch experiment: which layer and token carry the answer?"], selected_index=None)
        self.widget.add_class("gptoss-patch-panel")

    def prepare(self) -> None:
        """Before a run, from the thread that starts it: a stop that comes from now on counts."""
        self._stop.clear()
        self.busy(True)
        self.status.show(level="busy", message="Running both prompts …", progress=0.0)

    def stop(self) -> None:
        """End after the passes in progress; the cells not reached stay empty."""
        self._stop.set()

    def busy(self, working: bool) -> None:
        """Only what can be pressed is enabled."""
        self.start_button.disabled, self.stop_button.disabled = working, not working

    def run(self) -> None:
        """The experiment, in the calling thread; what goes wrong is said in the panel."""
        told = 0.0

        def progress(done: int, total: int) -> None:
            nonlocal told
            if time.monotonic() - told > 0.1:
                told = time.monotonic()
                self.status.show(message=f"Patched {done} of {total} places", progress=done / max(1, total))

        try:
            self.result = wb.patching(
                self._model, self.clean.value, self.corrupt.value, site=str(self.site.value),
                metric=wb.logit_diff(self.answer.value, self.other.value),
                on_progress=progress, should_stop=self._stop.is_set,
            )
            self.heat.show(**present.heat(self.result), empty="", stale=False)
            self.status.show(level="quiet", message=self._summary(self.result), progress=-1.0)
        except Exception as error:
            self.heat.show(stale=True)  # if there is a picture, it is of an earlier experiment
            self.status.show(level="error", message=plain_words(error), progress=-1.0)
        finally:
            self.busy(False)

    def _summary(self, result: xr.DataArray) -> str:
        parts = []
        best = result.where(result.notnull(), drop=False)
        if bool(best.notnull().any()):
            place = best.argmax(...)
            layer, token = int(place["layer"]), int(place["token"])
            text = visible(str(result["text"].values[token]), 24)
            parts.append(f"Strongest: layer {layer}, token {token} “{text}”, {float(result[layer, token]):z.2f}.")
        if bool(result.isnull().any()):
            parts.append("Stopped by you: the empty cells were not measured.")
        answer, other = visible(self.answer.value, 16), visible(self.other.value, 16)
        parts.append(f"Logit of {answer} minus {other}: {result.attrs['clean']:+.2f} in the clean run, "
                     f"{result.attrs['corrupt']:+.2f} in the corrupt run.")
        return "\n".join(parts)

    def state(self) -> dict[str, Any]:
        """The experiment last shown as plain data; empty before one."""
        if self.result is None:
            return {}
        return {"text": [str(text) for text in self.result["text"].values], "values": self.result.values.tolist(),
                "layers": [int(layer) for layer in self.result["layer"].values],
                "clean": float(self.result.attrs["clean"]), "corrupt": float(self.result.attrs["corrupt"])}
