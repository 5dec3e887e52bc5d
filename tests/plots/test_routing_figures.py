"""Figures of the lens grid and of routing: each cell is the array's number, labels escaped, wrong input told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr

from gptoss_workbench import plots
from gptoss_workbench.errors import WorkbenchError


def texts(*values) -> np.ndarray:
    made = np.empty(len(values), dtype=object)
    made[:] = values
    return made


def trace(figure: Any, index: int = 0) -> Any:
    return figure.data[index]


def test_step_token_heatmap() -> None:
    values = np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3)
    grid = xr.Dataset(
        {"answer_prob": (("step", "token"), values), "kl": (("step", "token"), 9 * values),
         "said": (("step", "token"), np.array([["<b>", "x", "y"], ["a", " b", "\n"]], dtype=object))},
        coords={"step": texts("layer 0 resid_mid", "layer 0 resid_post"), "text": ("token", texts("<i>", "a", "a"))})
    heat = trace(plots.step_token_heatmap(grid.transpose("token", "step")))
    np.testing.assert_array_equal(np.asarray(heat.z, dtype=np.float32), values)
    assert heat.zmax == 1 and heat.customdata[0][0] == "layer 0 resid_mid, token 0: &lt;i&gt;<br>says &lt;b&gt;"
    heat = trace(plots.step_token_heatmap(grid, "kl", theme="dark"))
    np.testing.assert_array_equal(np.asarray(heat.z, dtype=np.float32), 9 * values)


@pytest.mark.parametrize("down", ["label", "other"])
def test_expert_label_heatmap(down) -> None:
    values = np.array([[1.0, 2.0, np.nan], [0.5, 0.0, 3.0]], dtype=np.float32)
    array = xr.DataArray(values, dims=(down, "expert"), coords={down: texts("<sum>", "copy"), "expert": [0, 1, 2]})
    figure: Any = plots.expert_label_heatmap(array.transpose(), signed=True)
    np.testing.assert_array_equal(np.asarray(trace(figure).z, dtype=np.float32), values)
    assert figure.layout.yaxis.ticktext == ("&lt;sum&gt;", "copy")


def test_use_harm_scatter() -> None:
    use, harm = np.arange(6.0).reshape(2, 3), np.arange(6.0).reshape(2, 3)[::-1]
    found = xr.Dataset({"use": (("layer", "expert"), use), "harm": (("layer", "expert"), harm)},
                       coords={"layer": [1, 4], "expert": [0, 1, 2]})
    figure: Any = plots.use_harm_scatter(found)
    for i, layer in enumerate((1, 4)):
        points = trace(figure, i)
        assert points.name == f"layer {layer}" and list(points.x) == list(use[i]) and list(points.y) == list(harm[i])
    assert trace(figure).marker.symbol != trace(figure, 1).marker.symbol  # colour is not the only carrier


def test_wrong_arrays_are_told() -> None:
    array = xr.DataArray(np.zeros((2, 2)), dims=("layer", "head"))
    for draw in (plots.expert_label_heatmap, plots.step_token_heatmap, plots.use_harm_scatter):
        with pytest.raises(WorkbenchError, match="can't be drawn"):
            draw(array)  # type: ignore[arg-type]
