"""Curves with their intervals: doses against effects, probes against layers. Labelled arrays in, figures out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from gptoss_workbench.errors import WorkbenchError
from gptoss_workbench.plots.colour import Theme, table
from gptoss_workbench.plots.figures import _style
from gptoss_workbench.plots.labels import escape

_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_CONTROLS = ("shuffled", "control_task")
_FLAT = ("random", "token_identity", "majority")


def dose_curves(
    doses: xr.Dataset, *, change: bool = False, title: str = "", theme: Theme = "light",
) -> go.Figure:
    """Scale across, effect up, a line for each task with its interval; random directions thin and without.

    Args:
        doses: the result of ``wb.dose_response``.
        change: draw the difference from scale 0.

    Raises: WorkbenchError when it is something else.
    """
    names = ("change", "change_low", "change_high") if change else ("mean", "low", "high")
    _need(doses, ("edit", "task", "scale"), names, "wb.dose_response")
    scales = np.asarray(doses["scale"].values, dtype=float)
    edits, tasks = doses["edit"].values.tolist(), doses["task"].values.tolist()
    figure, colours = go.Figure(), _spread(theme, len(tasks))
    for number, task in enumerate(tasks):
        for edit in edits:
            line, low, high = (np.asarray(doses[name].sel(edit=edit, task=task).transpose("scale").values, dtype=float)
                               for name in names)
            first = edit == edits[0]
            if first:
                figure.add_trace(_band(scales, low, high, colours[number]))
            elif task != tasks[0]:
                continue
            figure.add_trace(go.Scatter(
                x=scales, y=line, name=escape(task if first else f"{task}, {edit}"), mode="lines+markers",
                line=dict(color=colours[number], width=2 if first else 1,
                          dash=_DASHES[number % len(_DASHES)] if first else "dot"),
                hovertemplate="scale %{x}<br><b>%{y:.3f}</b><extra>%{fullData.name}</extra>",
            ))
    _style(figure, title, theme, 320)
    figure.update_xaxes(title="scale")
    metrics = list(dict.fromkeys(doses["metric"].values.tolist())) if "metric" in doses.coords else []
    unit = metrics[0] if len(metrics) == 1 else "metric of each task"
    figure.update_yaxes(title=escape(f"change of {unit}" if change else str(unit)))
    return figure


def probe_curves(found: xr.Dataset, *, title: str = "", theme: Theme = "light") -> go.Figure:
    """Layers across, held-out accuracy up with its interval, and every control beside it.

    Args:
        found: the result of ``wb.probe``.

    Raises: WorkbenchError when it is something else.
    """
    _need(found, ("layer",), ("accuracy", "accuracy_low", "accuracy_high", *_CONTROLS, *_FLAT), "wb.probe")
    layers = np.asarray(found["layer"].values)
    lines = ["accuracy", *_CONTROLS, *_FLAT]
    figure, colours = go.Figure(), _spread(theme, len(lines))
    figure.add_trace(_band(layers, found["accuracy_low"].values, found["accuracy_high"].values, colours[0]))
    for number, name in enumerate(lines):
        values = np.broadcast_to(np.asarray(found[name].values, dtype=float), layers.shape)
        figure.add_trace(go.Scatter(
            x=layers, y=values, name=name.replace("_", " "), mode="lines+markers" if name not in _FLAT else "lines",
            line=dict(color=colours[number], width=2 if number == 0 else 1, dash=_DASHES[number % len(_DASHES)]),
            hovertemplate="layer %{x}<br><b>%{y:.3f}</b><extra>%{fullData.name}</extra>",
        ))
    _style(figure, title, theme, 320)
    figure.update_xaxes(title="layer", dtick=1 if len(layers) <= 12 else 4)
    figure.update_yaxes(title="held-out accuracy", range=[-0.02, 1.02])
    return figure


def _need(data: xr.Dataset, dims: Sequence[str], names: Sequence[str], maker: str) -> None:
    missing = [name for name in names if name not in data] + [dim for dim in dims if dim not in data.dims]
    if missing:
        raise WorkbenchError("This array can't be drawn so.", expected=f"the result of {maker}",
                             got=f"no {', '.join(missing)} in {sorted(map(str, data.variables))}"[:160])


def _band(x: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str) -> go.Scatter:
    """The interval as one closed shape, left out where it was not measured."""
    known = np.isfinite(low) & np.isfinite(high)
    x, low, high = x[known], low[known], high[known]
    return go.Scatter(x=np.concatenate((x, x[::-1])), y=np.concatenate((high, low[::-1])), fill="toself", mode="lines",
                      line=dict(width=0, color=colour), hoverinfo="skip", showlegend=False,
                      fillcolor=colour.replace("rgb(", "rgba(").replace(")", ",0.18)"))


def _spread(theme: Theme, count: int) -> list[str]:
    """Colours of ``count`` lines, far apart on the page's scale."""
    colours = table(theme)
    at = [round(230 - 160 * i / max(1, count - 1)) for i in range(count)]
    return ["rgb({},{},{})".format(*map(int, colours[i])) for i in at]
