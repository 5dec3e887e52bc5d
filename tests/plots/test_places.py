"""The figure of patched places: every number, the interval on hovering, a dot where the test says so."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import xarray as xr

import gptoss_workbench as wb
from gptoss_workbench import plots
from gptoss_workbench.errors import WorkbenchError


@pytest.fixture
def heads() -> xr.DataArray:
    values = np.random.default_rng(0).normal(size=(10, 3, 4))
    values[:, 1, 2] += 5
    return xr.DataArray(values, dims=("pair", "layer", "head"), coords={"layer": [0, 2, 5], "head": range(4)})


def test_numbers_intervals_and_dots(heads) -> None:
    table = wb.summarize(heads)
    figure: Any = plots.place_heatmap(table, unit="recovered <b>")
    heat, dots = figure.data
    np.testing.assert_allclose(heat.z, heads.mean("pair"))
    assert heat.zmin == -heat.zmax and figure.layout.xaxis.title.text == "head"
    assert [(x, y) for x, y in zip(dots.x, dots.y, strict=True)] == [(2, 1)]
    assert heat.customdata[1][2].startswith("layer 2, head 2<br>") and "p 0.0" in heat.customdata[1][2]
    json.loads(str(figure.to_json()))


def test_one_array_has_no_dots_and_layers_go_down(heads) -> None:
    one, turned = heads.isel(pair=0), heads.isel(pair=0).transpose("head", "layer")
    figure: Any = plots.place_heatmap(one)
    assert len(figure.data) == 1 and plots.place_heatmap(turned).to_json() == figure.to_json()


def test_edges_have_names_and_names_are_escaped() -> None:
    edges = xr.DataArray([[0.5, np.nan]], dims=("sender", "receiver"),
                         coords={"sender": ["head 0 <1>"], "receiver": ["q 1 2", "logits"]})
    figure: Any = plots.place_heatmap(edges)
    assert list(figure.layout.yaxis.ticktext) == ["head 0 &lt;1&gt;"]
    assert list(figure.layout.xaxis.ticktext) == ["q 1 2", "logits"] and "NaN" not in str(figure.to_json())


def test_other_numbers_of_dimensions_are_refused(heads) -> None:
    with pytest.raises(WorkbenchError, match="can't be drawn"):
        plots.place_heatmap(heads)
