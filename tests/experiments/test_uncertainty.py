"""Intervals and permutation tests against plain enumeration and drawing, and against what must hold under chance."""

from __future__ import annotations

from itertools import product
from random import Random

import numpy as np
import pytest
import xarray as xr

import gptoss_workbench as wb
from gptoss_workbench.errors import ExperimentError
from tests.tolerances import BOOTSTRAP


def effects(rows: np.ndarray) -> xr.DataArray:
    return xr.DataArray(rows, dims=("pair", "layer"), coords={"layer": range(rows.shape[1])}, name="recovered")


def test_exact_sign_flips_by_enumeration() -> None:
    rows = np.random.default_rng(0).normal([0.0, 0.4, 2.0], 1.0, size=(8, 3))
    found = wb.summarize(effects(rows))
    means = [[abs(sum(sign * row[entry] for sign, row in zip(signs, rows, strict=True))) for entry in range(3)]
             for signs in product((1, -1), repeat=8)]
    seen = np.abs(rows.sum(0)) - 1e-9
    for entry in range(3):
        assert float(found["p"][entry]) == pytest.approx(np.mean([mean[entry] >= seen[entry] for mean in means]))
        assert float(found["p_family"][entry]) == pytest.approx(np.mean([max(mean) >= seen[entry] for mean in means]))
    np.testing.assert_allclose(found["mean"], rows.mean(0))


def test_bootstrap_by_drawing_rows() -> None:
    rows = np.random.default_rng(1).normal(1.0, 1.0, size=(30, 1))
    found = wb.summarize(effects(rows), draws=5000, level=0.9)
    draw = Random(2)
    means = sorted(np.mean([draw.choice(rows[:, 0]) for _ in range(30)]) for _ in range(5000))
    assert float(found["low"][0]) == pytest.approx(means[250], abs=BOOTSTRAP)
    assert float(found["high"][0]) == pytest.approx(means[4750], abs=BOOTSTRAP)


def test_chance_alone_is_seldom_called_an_effect() -> None:
    draw = np.random.default_rng(3)
    found = [wb.summarize(effects(draw.normal(size=(12, 40))), draws=500, seed=number) for number in range(40)]
    single, family = (np.array([float((one[name] < 0.05).any()) for one in found]).mean() for name in ("p", "p_family"))
    each = np.mean([float((one["p"] < 0.05).mean()) for one in found])
    assert 0.03 < each < 0.07 and single > 0.6 and family < 0.15


def test_baseline_missing_values_and_mistakes() -> None:
    rows = np.random.default_rng(4).normal(1.0, 0.1, size=(10, 2))
    rows[3, 1] = np.nan
    found = wb.summarize(effects(rows), baseline=1.0)
    assert float(found["p"][0]) > 0.05 > float(wb.summarize(effects(rows))["p"][0])
    assert all(np.isnan(float(found[name][1])) for name in ("mean", "low", "high", "p", "p_family"))
    with pytest.raises(ExperimentError, match="several values"):
        wb.summarize(effects(rows).isel(pair=0))
