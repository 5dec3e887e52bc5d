"""Figures of the lens grid and of the routing experiments: labelled arrays to plotly, as in ``figures``."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from gptoss_workbench.plots.colour import Theme, table
from gptoss_workbench.plots.figures import _heat, _labels, _need, _rows, _style, _token_axis
from gptoss_workbench.plots.labels import escape, plain


def step_token_heatmap(
    grid: xr.Dataset, what: str = "answer_prob", *, title: str = "", theme: Theme = "light",
) -> go.Figure:
    """The lens at every step (down) and token (across): one of its numbers as colour, what it would say in the hover.

    Args:
        grid: the result of ``wb.lens_grid``.
        what: ``answer_prob``, ``prob``, ``entropy``, ``kl`` or ``answer_rank``.

    Raises: WorkbenchError for other dimensions.
    """
    _need(grid, "step", "token")
    grid = grid.transpose("step", "token")
    values = np.asarray(grid[what].values, dtype=float)
    tokens, steps = _labels(grid, "token"), _labels(grid, "step", coord="")
    hover = np.array([[f"{escape(step)}, token {i}: {plain(token, 60)}<br>says {plain(str(said), 60)}"
                       for i, (token, said) in enumerate(zip(tokens, row, strict=True))]
                      for step, row in zip(steps, grid["said"].values, strict=True)], dtype=object)
    high = 1.0 if what.endswith("prob") else None
    unit = {"answer_prob": "probability", "prob": "probability", "answer_rank": "rank"}.get(what, "nats")
    figure = go.Figure(go.Heatmap(**_heat(values, False, theme, unit, 0.0, high), customdata=hover,
                                  hovertemplate="%{customdata}<br><b>%{z:.3f}</b><extra></extra>"))
    _style(figure, title, theme, _rows(len(steps)))
    figure.update_xaxes(title="token", **_token_axis([plain(token, 16) for token in tokens]))
    figure.update_yaxes(autorange="reversed", showgrid=False, tickvals=list(range(len(steps))),
                        ticktext=[escape(step) for step in steps])
    return figure


def expert_label_heatmap(
    array: xr.DataArray, *, title: str = "", unit: str = "", theme: Theme = "light", signed: bool = False,
    low: float | None = None, high: float | None = None,
) -> go.Figure:
    """Experts across, something else down: ``label`` of ``wb.expert_profile``, or ``other`` of a co-activation.

    Args:
        array: (expert, label) or (expert, other), one layer, in any order. NaN cells stay empty.

    Raises: WorkbenchError for other dimensions.
    """
    down = "other" if "other" in array.dims else "label"
    _need(array, "expert", down)
    array = array.transpose(down, "expert")
    values, rows = np.asarray(array.values, dtype=float), _labels(array, down, coord="")
    names = [plain(row, 24) for row in rows]
    hover = np.array([[f"{down} {plain(row, 60)}"] * values.shape[1] for row in rows], dtype=object)
    figure = go.Figure(go.Heatmap(**_heat(values, signed, theme, unit, low, high), customdata=hover,
                                  hovertemplate="%{customdata}, expert %{x}<br><b>%{z:.3f}</b><extra></extra>"))
    _style(figure, title, theme, _rows(len(rows)))
    figure.update_xaxes(title="expert", showgrid=False, dtick=1 if values.shape[1] <= 32 else 8)
    figure.update_yaxes(title=down, autorange="reversed", showgrid=False, tickvals=list(range(len(rows))),
                        ticktext=names)
    return figure


def use_harm_scatter(found: xr.Dataset, *, title: str = "", theme: Theme = "light") -> go.Figure:
    """Each expert as a point: how much it is used (across) and how much it is missed (up), a sign for each layer.

    Args:
        found: ``use`` and ``harm`` over (layer, expert), e.g. ``wb.expert_importance(...).mean("prompt")``.

    Raises: WorkbenchError for other dimensions.
    """
    _need(found, "layer", "expert")
    found = found.transpose("layer", "expert")
    signs = ("circle", "square", "diamond", "cross", "x", "triangle-up")
    colours, layers, figure = table(theme), _labels(found, "layer", coord=""), go.Figure()
    for i, layer in enumerate(layers):
        at = round(255 - 175 * i / max(1, len(layers) - 1))
        figure.add_trace(go.Scatter(
            x=np.asarray(found["use"].values[i], dtype=float), y=np.asarray(found["harm"].values[i], dtype=float),
            mode="markers", name=f"layer {escape(layer)}", customdata=_labels(found, "expert", coord=""),
            marker=dict(color="rgb({},{},{})".format(*map(int, colours[at])), symbol=signs[i % len(signs)], size=8),
            hovertemplate="%{fullData.name}, expert %{customdata}<br>use %{x:.3f}, harm <b>%{y:.3f}</b><extra></extra>",
        ))
    _style(figure, title, theme, 320)
    figure.update_xaxes(title="mean router weight")
    figure.update_yaxes(title="harm without it")
    return figure
