"""Labelled arrays to plotly figures. No widget and no model here: a DataArray in, a ``go.Figure`` out.

Every figure has a transparent background and takes ``theme="light"`` or ``"dark"`` for its ink, because
plotly does not follow the page by itself. Axes count positions, and labels are only painted on them, so
that two equal tokens stay two columns.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from gptoss_workbench.errors import WorkbenchError
from gptoss_workbench.plots.colour import Theme, ink, plotly_scale, table
from gptoss_workbench.plots.labels import escape, plain

_INK = {"light": ("#1f2328", "rgba(31,35,40,0.14)"), "dark": ("#e6e6e6", "rgba(230,230,230,0.16)")}
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
_MONO = "ui-monospace, 'SF Mono', Menlo, Consolas, 'DejaVu Sans Mono', monospace"


def _need(array: xr.DataArray | xr.Dataset, *dims: str) -> None:
    if any(dim not in array.dims for dim in dims):
        raise _other(dims, array.dims)


def _other(expected: Iterable[object], got: Iterable[object]) -> WorkbenchError:
    return WorkbenchError(
        "This array can't be drawn so.", expected=", ".join(map(str, expected)), got=", ".join(map(str, got)),
        hint="Select or average the other dimensions first, e.g. array.sel(head=0) or array.mean('head').")


def _labels(array: xr.DataArray | xr.Dataset, dim: str, coord: str = "text") -> list[str]:
    """Token texts along ``dim`` (or the coordinate itself where there are none), as they are."""
    if coord in array.coords:
        return [str(value) for value in array.coords[coord].values]
    values = array.coords[dim].values if dim in array.coords else range(array.sizes[dim])
    return [str(value) for value in values]


def _style(figure: go.Figure, title: str, theme: Theme, height: int) -> go.Figure:
    text, line = _INK[theme]
    axis: dict[str, Any] = dict(gridcolor=line, zerolinecolor=line, linecolor=line, ticks="", automargin=True)
    figure.update_layout(
        template="plotly_white" if theme == "light" else "plotly_dark",
        title=dict(text=escape(title), font=dict(size=14), x=0, xref="container", y=1, yref="container",
                   yanchor="top", pad=dict(t=8, l=8)) if title else None,
        font=dict(family=_FONT, size=12, color=text), height=height,
        margin=dict(l=48, r=16, t=40 if title else 12, b=24),
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
    )
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    return figure


def _token_axis(labels: list[str]) -> dict[str, Any]:
    """Tick texts, ready escaped, under token columns; from about 60 on only every n-th, so that they never overlap."""
    step = max(1, -(-len(labels) // 60))
    at = list(range(0, len(labels), step))
    return dict(tickvals=at, ticktext=[labels[i] for i in at], tickangle=-45 if len(labels) > 6 else 0,
                tickfont=dict(family=_MONO), range=[-0.5, len(labels) - 0.5], showgrid=False)


def _heat(values: np.ndarray, signed: bool, theme: Theme, unit: str, low: float | None, high: float | None) -> dict:
    finite = values[np.isfinite(values)]
    top = float(finite.max()) if finite.size else 1.0
    bottom = float(finite.min()) if finite.size else 0.0
    if signed:
        reach = max(abs(top), abs(bottom)) or 1.0
        low, high = (-reach if low is None else low), (reach if high is None else high)
    else:
        low, high = (min(bottom, 0.0) if low is None else low), ((top or 1.0) if high is None else high)
    return dict(z=values, zmin=low, zmax=high, colorscale=plotly_scale(theme, signed), xgap=1, ygap=1,
                hoverongaps=False,
                colorbar=dict(title=dict(text=escape(unit), side="top"), thickness=12, len=1.0, outlinewidth=0))


def _layer_axis(labels: list[str]) -> dict[str, Any]:
    """Layer numbers beside the rows, the first on top; every n-th where there are many."""
    step = 1 if len(labels) <= 12 else 4
    at = list(range(0, len(labels), step))
    return dict(title="layer", autorange="reversed", showgrid=False, tickvals=at,
                ticktext=[escape(labels[i]) for i in at])


def _rows(count: int, least: int = 170) -> int:
    return max(least, 110 + count * (26 if count <= 12 else 14))


def layer_token_heatmap(
    array: xr.DataArray, *, title: str = "", unit: str = "", theme: Theme = "light", signed: bool = False,
    low: float | None = None, high: float | None = None,
) -> go.Figure:
    """Layers down, tokens across, the value as colour, e.g. the result of ``wb.patching``.

    Args:
        array: (layer, token). A ``text`` coordinate labels the columns; ``corrupt_text``, if there, is shown
            under it where the two differ. NaN cells stay empty ("not measured").
        unit: what the colour bar counts.
        signed: take the two-sided scale with zero in the page's colour.
        low, high: ends of the colour scale; by default those of the data.

    Raises: WorkbenchError for other dimensions.
    """
    _need(array, "layer", "token")
    array = array.transpose("layer", "token")
    values = np.asarray(array.values, dtype=float)
    tokens, layers = _labels(array, "token"), _labels(array, "layer", coord="")
    labels, hover = [plain(text, 16) for text in tokens], [plain(text, 60) for text in tokens]
    if "corrupt_text" in array.coords:
        for i, other in enumerate(_labels(array, "token", "corrupt_text")):
            if other != tokens[i]:
                labels[i] += f" | {plain(other, 16)}"
                hover[i] += f" (other prompt: {plain(other, 60)})"
    shown = np.array([[f"layer {layer}, token {i}: {text}" for i, text in enumerate(hover)] for layer in layers],
                     dtype=object)
    figure = go.Figure(go.Heatmap(
        **_heat(values, signed, theme, unit, low, high), customdata=shown,
        hovertemplate="%{customdata}<br><b>%{z:.3f}</b><extra></extra>",
    ))
    _style(figure, title, theme, _rows(len(layers)))
    figure.update_xaxes(title="token", **_token_axis(labels))
    figure.update_yaxes(**_layer_axis(layers))
    return figure


def layer_expert_heatmap(
    array: xr.DataArray, *, title: str = "", unit: str = "mean router weight", theme: Theme = "light",
    high: float | None = None,
) -> go.Figure:
    """Layers down, experts across, e.g. the result of ``wb.expert_usage``; array (layer, expert).

    Raises: WorkbenchError for other dimensions.
    """
    _need(array, "layer", "expert")
    array = array.transpose("layer", "expert")
    values = np.asarray(array.values, dtype=float)
    layers, experts = _labels(array, "layer", coord=""), values.shape[1]
    shown = np.array([[f"layer {layer}"] * experts for layer in layers], dtype=object)
    figure = go.Figure(go.Heatmap(
        **_heat(values, False, theme, unit, 0.0, high), customdata=shown,
        hovertemplate="%{customdata}, expert %{x}<br><b>%{z:.3f}</b><extra></extra>",
    ))
    _style(figure, title, theme, _rows(len(layers)))
    figure.update_xaxes(title="expert", showgrid=False, dtick=1 if experts <= 32 else 8, range=[-0.5, experts - 0.5])
    figure.update_yaxes(**_layer_axis(layers))
    return figure


def token_lines(
    array: xr.DataArray, *, title: str = "", unit: str = "", theme: Theme = "light", markers: bool = True,
) -> go.Figure:
    """One or several lines over the tokens, e.g. the result of ``wb.token_quantity``.

    Args:
        array: (token) or (series, token) in any order; the other dimension's coordinate names the lines.
        unit: what the y axis counts.

    Raises: WorkbenchError without a ``token`` dimension or with more than two dimensions.
    """
    _need(array, "token")
    others = [str(dim) for dim in array.dims if dim != "token"]
    if len(others) > 1:
        raise _other(("token, or one more beside it",), array.dims)
    tokens = _labels(array, "token")
    series = [(str(array.name or ""), array)] if not others else [
        (f"{others[0]} {name}", array.isel({others[0]: i}))
        for i, name in enumerate(_labels(array, others[0], coord=""))
    ]
    dashes = ("solid", "dash", "dot", "dashdot", "longdash")
    figure = go.Figure()
    colours = table(theme)
    for i, (name, line) in enumerate(series):
        at = round(255 - 175 * i / max(1, len(series) - 1)) if len(series) > 1 else 200
        figure.add_trace(go.Scatter(
            x=list(range(len(tokens))), y=np.asarray(line.values, dtype=float), name=escape(name[:40]),
            mode="lines+markers" if markers and len(tokens) <= 80 else "lines", connectgaps=False,
            line=dict(color="rgb({},{},{})".format(*map(int, colours[at])), dash=dashes[i % len(dashes)], width=2),
            customdata=[plain(text, 60) for text in tokens],
            hovertemplate="token %{x}: %{customdata}<br><b>%{y:.3f}</b><extra>%{fullData.name}</extra>",
            showlegend=bool(others),
        ))
    _style(figure, title, theme, 280)
    figure.update_xaxes(title="token", **_token_axis([plain(text, 14) for text in tokens]))
    figure.update_yaxes(title=escape(unit))
    return figure


def lens_table(lens: xr.Dataset, *, title: str = "", theme: Theme = "light") -> go.Figure:
    """What each layer would say: layers down, ranks across, probability as colour, the token written in.

    Args:
        lens: the result of ``wb.logit_lens``: ``text`` and ``prob`` over (layer, rank).

    Raises: WorkbenchError when it is something else.
    """
    _need(lens, "layer", "rank")
    if not {"text", "prob"} <= set(lens.variables):
        raise WorkbenchError("This is no logit lens.", expected="variables text and prob over (layer, rank)",
                             got=", ".join(sorted(map(str, lens.variables))), hint="Use the result of wb.logit_lens.")
    lens = lens.transpose("layer", "rank")
    probs = np.asarray(lens["prob"].values, dtype=float)
    texts = np.vectorize(str, otypes=[object])(lens["text"].values)
    described = lens["id"].values < 0 if "id" in lens else np.zeros(texts.shape, dtype=bool)  # no token: words about it
    layers, ranks = probs.shape
    labels = _labels(lens, "layer", coord="")
    heat = _heat(probs, False, theme, "probability", 0.0, 1.0)

    def shown(limit: int) -> np.ndarray:
        made = [escape(text[:limit]) if words else plain(text, limit)
                for text, words in zip(texts.flat, described.flat, strict=True)]
        return np.array(made, dtype=object).reshape(texts.shape)

    figure = go.Figure(go.Heatmap(
        **heat, customdata=shown(60),
        hovertemplate="%{customdata}<br><b>%{z:.4f}</b><extra></extra>",
    ))
    colours, short = table(theme), shown(12)
    for row in range(layers):
        for column in range(ranks):
            under = colours[int(np.clip(np.nan_to_num(probs[row, column]), 0, 1) * 255)]
            figure.add_annotation(x=column, y=row, text=short[row, column], showarrow=False,
                                  font=dict(color=ink(under), family=_MONO, size=12 if layers <= 12 else 10))
    _style(figure, title, theme, _rows(layers))
    figure.update_xaxes(title="rank", tickvals=list(range(ranks)), ticktext=[str(i + 1) for i in range(ranks)],
                        showgrid=False)
    figure.update_yaxes(**_layer_axis(labels))
    return figure


def agreement_scatter(
    checked: xr.Dataset, *, title: str = "", unit: str = "", theme: Theme = "light",
) -> go.Figure:
    """Estimates across, exact effects up, a point a place; on the line the two are equal.

    Args:
        checked: the result of ``wb.checked``. Places outside the top are drawn as crosses: one far from zero is one
            that the estimates missed.
        unit: what both axes count; by default the metric's name.

    Raises: WorkbenchError when it is something else.
    """
    if "place" not in checked.dims or not {"estimate", "exact", "top"} <= set(checked.variables):
        raise WorkbenchError("These are no checked places.", expected="estimate, exact and top over (place)",
                             got=", ".join(sorted(map(str, checked.variables)))[:200], hint="Use wb.checked(result).")
    named = [name for name in ("layer", "token", "query", "text", "head", "kv_head", "slot", "expert", "key")
             if name in checked.coords]
    shown = np.array([", ".join(f"{name} {plain(str(checked.coords[name].values[i]), 40)}" for name in named)
                      for i in range(checked.sizes["place"])], dtype=object)
    one, two = (np.asarray(checked[name].values, dtype=float) for name in ("estimate", "exact"))
    ends = [min(one.min(initial=0), two.min(initial=0)), max(one.max(initial=0), two.max(initial=0))]
    figure = go.Figure(go.Scatter(x=ends, y=ends, mode="lines", hoverinfo="skip", showlegend=False,
                                  line=dict(color=_INK[theme][1], width=2)))
    colours, top = table(theme), np.asarray(checked["top"].values, dtype=bool)
    for name, mask, mark, at in (("largest estimates", top, "circle", 200), ("drawn from the rest", ~top, "x", 110)):
        figure.add_trace(go.Scatter(
            x=one[mask], y=two[mask], mode="markers", name=name, customdata=shown[mask],
            marker=dict(symbol=mark, size=9, color="rgb({},{},{})".format(*map(int, colours[at]))),
            hovertemplate="%{customdata}<br>estimate %{x:.3f}, exact <b>%{y:.3f}</b><extra></extra>"))
    _style(figure, title, theme, 360)
    unit = escape(unit or str(checked.attrs.get("metric", "")))
    figure.update_xaxes(title=f"estimate: {unit}")
    figure.update_yaxes(title=f"exact: {unit}")
    return figure
