"""Curves: every point is the array's number, intervals enclose it, other input is told."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from gptoss_workbench import plots
from gptoss_workbench.errors import WorkbenchError


@pytest.fixture
def doses() -> xr.Dataset:
    mean = np.arange(12.0).reshape(2, 2, 3)
    mean[0, 1, 2] = np.nan
    parts = {name: (("edit", "task", "scale"), mean + off) for name, off in (("mean", 0), ("low", -1), ("high", 1))}
    return xr.Dataset(parts, coords={"edit": ["steered", "random 0"], "task": ["target", "<b>"], "scale": [-1.0, 0, 2]})


def test_dose_curves_show_every_number(doses):
    figure = plots.dose_curves(doses)
    lines = {trace.name: trace for trace in figure.data if trace.name}
    assert list(lines) == ["target", "target, random 0", "&lt;b&gt;"]
    np.testing.assert_array_equal(lines["target"].y, [0, 1, 2])
    np.testing.assert_array_equal(lines["target, random 0"].y, [6, 7, 8])
    bands = [trace for trace in figure.data if not trace.name]
    np.testing.assert_array_equal(bands[0].y, [1, 2, 3, 1, 0, -1])
    np.testing.assert_array_equal(bands[1].x, [-1, 0, 0, -1])  # where nothing was measured there is no band
    assert "NaN" not in str(figure.to_json())
    with pytest.raises(WorkbenchError, match="can't be drawn"):
        plots.dose_curves(doses, change=True)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_probe_curves_show_the_controls(theme):
    layers = ("layer", np.array([0.5, 0.9]))
    found = xr.Dataset(dict.fromkeys(("accuracy", "accuracy_low", "accuracy_high", "shuffled", "control_task"), layers)
                       | dict.fromkeys(("random", "token_identity", "majority"), ((), 0.5)),
                       coords={"layer": [3, 7]})
    figure = plots.probe_curves(found, theme=theme)
    names = [trace.name for trace in figure.data if trace.name]
    assert names == ["accuracy", "shuffled", "control task", "random", "token identity", "majority"]
    np.testing.assert_array_equal(figure.data[-1].y, [0.5, 0.5])
    with pytest.raises(WorkbenchError, match="can't be drawn"):
        plots.probe_curves(found.drop_vars("shuffled"))
