"""Effects of patched places, whatever tells the places apart: heads, experts, neurons, edges."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from gptoss_workbench.plots.colour import Theme
from gptoss_workbench.plots.figures import _heat, _labels, _layer_axis, _other, _rows, _style, _token_axis
from gptoss_workbench.plots.labels import escape, plain


def place_heatmap(
    effects: xr.DataArray | xr.Dataset, *, title: str = "", unit: str = "", theme: Theme = "light", level: float = 0.05,
    p: str = "p_family",
) -> go.Figure:
    """Two dimensions of places, the effect as colour with zero in the page's colour, e.g. layers against heads.

    Args:
        effects: two dimensions, the first downwards (a layer always is): a result of ``wb.patching`` or
            ``wb.path_patching``; or the Dataset of ``wb.summarize``, whose ``mean`` is drawn, its interval shown on
            hovering, and a dot set where chance seldom gives as much.
        unit: what the colour bar counts.
        level: the dot's threshold.
        p: which test it goes by, ``p_family`` (all places together) or ``p``.

    Raises: WorkbenchError for another number of dimensions.
    """
    table = effects if isinstance(effects, xr.Dataset) else xr.Dataset({"mean": effects})
    dims = [str(dim) for dim in table["mean"].dims]
    if len(dims) != 2:
        raise _other(("two dimensions",), dims)
    if dims[1] == "layer":
        dims.reverse()
    table = table.transpose(*dims, ...)
    values = np.asarray(table["mean"].values, dtype=float)
    down, across = (_labels(table, dim, coord="text" if dim == "token" else "") for dim in dims)
    texts = [[plain(text, 60) if dim == "token" else escape(text) for text in labels]
             for dim, labels in zip(dims, (down, across), strict=True)]
    shown = np.array([[f"{dims[0]} {a}, {dims[1]} {b}" for b in texts[1]] for a in texts[0]], dtype=object)
    if {"low", "high"} <= {*table.variables}:
        for at in np.ndindex(*shown.shape):
            shown[at] += f"<br>{float(table['low'][at]):.3f} to {float(table['high'][at]):.3f}"
            shown[at] += f", p {float(table[p][at]):.3f}" if p in table else ""
    figure = go.Figure(go.Heatmap(**_heat(values, True, theme, unit, None, None), customdata=shown,
                                  hovertemplate="%{customdata}<br><b>%{z:.3f}</b><extra></extra>"))
    if p in table:
        rows, columns = np.nonzero(np.asarray(table[p].values) < level)
        figure.add_trace(go.Scatter(x=columns, y=rows, mode="markers", hoverinfo="skip", showlegend=False, marker=dict(
            size=6, color="#000000" if theme == "light" else "#ffffff", line=dict(width=1, color="#888888"))))
    _style(figure, title, theme, _rows(len(down)))
    figure.update_xaxes(title=dims[1], **(_token_axis([plain(text, 16) for text in across]) if dims[1] == "token"
                                          else _axis(across)))
    figure.update_yaxes(**(_layer_axis(down) if dims[0] == "layer" else
                           {"title": dims[0], "autorange": "reversed", **_axis(down)}))
    return figure


def _axis(labels: list[str]) -> dict[str, Any]:
    """Tick texts; every n-th where there are many."""
    step = max(1, -(-len(labels) // 40))
    at = list(range(0, len(labels), step))
    return {"tickvals": at, "ticktext": [escape(labels[i]) for i in at], "showgrid": False}
