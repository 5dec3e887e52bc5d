"""Figures: every cell is the array's number, labels are escaped, themes have their own ink, wrong input is told."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import xarray as xr

from gptoss_workbench import plots
from gptoss_workbench.errors import WorkbenchError
from gptoss_workbench.plots import colour

TOKENS = ["<b>", " <b>", "\n", "a", "a"]


def texts(values) -> np.ndarray:
    made = np.empty(len(values), dtype=object)
    made[:] = values
    return made


def trace(figure: Any, index: int = 0) -> Any:
    return figure.data[index]


@pytest.fixture
def layer_token() -> xr.DataArray:
    values = np.linspace(-0.2, 1.0, 15, dtype=np.float32).reshape(3, 5)
    values[2, 4] = np.nan
    return xr.DataArray(values, dims=("layer", "token"), coords={
        "layer": [0, 2, 5], "text": ("token", texts(TOKENS)), "corrupt_text": ("token", texts([*TOKENS[:4], "c"]))})


@pytest.fixture
def lens() -> xr.Dataset:
    text = np.array([["<b>", " x"], ["⟨any of 9 unused tokens⟩", "y"]], dtype=object)
    prob = np.array([[0.9, 0.05], [0.5, 0.25]], dtype=np.float32)
    ids = np.array([[5, 6], [-1, 7]])
    return xr.Dataset({"id": (("layer", "rank"), ids), "text": (("layer", "rank"), text),
                       "prob": (("layer", "rank"), prob)}, coords={"layer": [0, 1]})


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_layer_token_heatmap_shows_every_number(layer_token, theme):
    figure = plots.layer_token_heatmap(layer_token, title="a <i>title</i>", unit="share", signed=True, theme=theme)
    heat = trace(figure)
    np.testing.assert_array_equal(np.asarray(heat.z, dtype=np.float32), layer_token.values)
    assert heat.zmin == -heat.zmax == -float(layer_token.max())
    assert list(figure.layout.xaxis.ticktext) == ["&lt;b&gt;", "·&lt;b&gt;", "↵", "a", "a | c"]
    assert heat.customdata[1][4] == "layer 2, token 4: a (other prompt: c)"
    assert list(figure.layout.yaxis.ticktext) == ["0", "2", "5"]
    assert figure.layout.title.text == "a &lt;i&gt;title&lt;/i&gt;"
    assert figure.layout.paper_bgcolor == "rgba(0,0,0,0)"
    assert heat.colorscale[0][1] == colour.plotly_scale(theme, signed=True)[0][1]
    assert "NaN" not in str(figure.to_json())  # strict JSON: missing cells travel as null


def test_dimension_order_does_not_matter(layer_token):
    turned = plots.layer_token_heatmap(layer_token.transpose("token", "layer"))
    assert turned.to_json() == plots.layer_token_heatmap(layer_token).to_json()


def test_themes_differ_in_their_ink(layer_token):
    light, dark = (plots.layer_token_heatmap(layer_token, theme=theme).layout.font.color for theme in ("light", "dark"))
    assert light != dark


def test_many_tokens_get_few_labels():
    array = xr.DataArray(np.zeros((1, 500)), dims=("layer", "token"), coords={"text": ("token", texts(["ab"] * 500))})
    assert len(plots.layer_token_heatmap(array).layout.xaxis.ticktext) <= 60


def test_layer_expert_heatmap_counts_from_zero():
    array = xr.DataArray(np.array([[0.1, 0.9], [0.5, 0.5]]), dims=("layer", "expert"))
    heat = trace(plots.layer_expert_heatmap(array))
    assert (heat.zmin, heat.zmax) == (0.0, 0.9)
    np.testing.assert_array_equal(np.asarray(heat.z), array.values)


def test_token_lines_take_one_or_several_series():
    one = xr.DataArray([1.0, np.nan, 3.0], dims="token", name="surprisal",
                       coords={"text": ("token", texts(["<", "b", "c"]))})
    figure: Any = plots.token_lines(one, unit="nats & bits")
    assert len(figure.data) == 1 and not trace(figure).showlegend and not trace(figure).connectgaps
    assert figure.layout.xaxis.ticktext[0] == "&lt;" and figure.layout.yaxis.title.text == "nats &amp; bits"
    many = xr.concat([one, one + 1], dim="layer")
    figure = plots.token_lines(many)
    assert [trace.name for trace in figure.data] == ["layer 0", "layer 1"]
    assert trace(figure).line.dash != trace(figure, 1).line.dash  # colour is not the only carrier


def test_lens_table_writes_every_token_into_its_cell(lens):
    figure = plots.lens_table(lens)
    np.testing.assert_array_equal(np.asarray(trace(figure).z, dtype=np.float32), lens["prob"].values)
    written = {(note.y, note.x): note.text for note in figure.layout.annotations}
    assert written[0, 0] == "&lt;b&gt;" and written[0, 1] == "·x" and written[1, 1] == "y"
    assert written[1, 0] == "⟨any of 9 un"  # words about a row, not a token: spaces stay
    assert {note.font.color for note in figure.layout.annotations} == {"#000000", "#ffffff"}


def test_figures_are_plain_json(layer_token, lens):
    for figure in (plots.layer_token_heatmap(layer_token), plots.lens_table(lens)):
        json.loads(str(figure.to_json()))


@pytest.mark.parametrize("make", [
    plots.layer_token_heatmap, plots.layer_expert_heatmap, plots.token_lines, plots.lens_table])
def test_other_dimensions_are_refused(make):
    with pytest.raises(WorkbenchError, match="expected"):
        make(xr.DataArray(np.zeros((2, 2, 2)), dims=("head", "query", "key")))


def test_a_dataset_that_is_no_lens_is_refused(lens):
    with pytest.raises(WorkbenchError, match="logit_lens"):
        plots.lens_table(lens.drop_vars("prob"))


def test_what_the_model_gives_can_be_drawn(model):
    import gptoss_workbench as wb

    run = model.run("The capital of France is", capture=["router", "resid_post"])
    layers = model.config.num_hidden_layers
    assert trace(plots.layer_expert_heatmap(wb.expert_usage(run))).z.shape == (layers, model.config.num_local_experts)
    assert len(trace(plots.token_lines(wb.token_quantity(model, run, "surprisal"))).y) == len(run.ids)
    assert trace(plots.lens_table(wb.logit_lens(model, run))).z.shape == (layers, 5)


def test_agreement_has_each_place_once_and_a_line_of_equals() -> None:
    places = xr.Dataset({"estimate": ("place", [3.0, -1.0, 0.5]), "exact": ("place", [4.0, 1.0, 0.0]),
                         "top": ("place", [True, True, False])},
                        {"layer": ("place", [2, 0, 1]), "text": ("place", texts(["<b>", " a", "b"]))},
                        {"metric": "logit('<x>')"})
    figure = plots.agreement_scatter(places)
    assert list(trace(figure).x) == list(trace(figure).y) == [-1.0, 4.0]
    assert (list(trace(figure, 1).x), list(trace(figure, 1).y)) == ([3.0, -1.0], [4.0, 1.0])
    assert (list(trace(figure, 2).x), list(trace(figure, 2).y)) == ([0.5], [0.0])
    assert trace(figure, 1).customdata[0].startswith("layer 2, text ") and "<b>" not in trace(figure, 1).customdata[0]
    assert "<x>" not in figure.layout.xaxis.title.text
    with pytest.raises(WorkbenchError, match=r"wb\.checked"):
        plots.agreement_scatter(places[["estimate"]])
