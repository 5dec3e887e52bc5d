"""Captures come back from the disk as they went."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import gptoss_workbench as wb
from gptoss_workbench.errors import WorkbenchError
from gptoss_workbench.hooks.sites import POOLED, SITES
from gptoss_workbench.store.saved import save

QUESTION = wb.chat("What is 2 + 3?")


@pytest.fixture(scope="module")
def run(model) -> wb.Run:
    return model.run(QUESTION, capture=[*SITES, *POOLED])


def test_every_site_comes_back(run, tmp_path: Path) -> None:
    run.to_zarr(tmp_path / "run.zarr")
    back = wb.open_data(tmp_path / "run.zarr")
    xr.testing.assert_identical(back.load(), run.data)
    assert back.key.values.tolist() == [*range(len(run)), "sink"]
    assert back.sel(key="sink").sizes == run.data.sel(key="sink").sizes
    assert back.attrs["provenance"] == run.provenance.to_json()


def test_a_batch_and_a_result(model, run, tmp_path: Path) -> None:
    batch = model.run([QUESTION, "The capital"], capture=["attn.pattern", "router"])
    batch.to_zarr(tmp_path / "batch.zarr")
    xr.testing.assert_identical(wb.open_data(tmp_path / "batch.zarr").load(), batch.data)
    used = wb.expert_usage(run).to_dataset(name="usage")
    save(used, tmp_path / "usage.zarr")
    xr.testing.assert_identical(wb.open_data(tmp_path / "usage.zarr").load(), used)


def test_odd_texts(tmp_path: Path) -> None:
    texts, roles = np.empty(9, dtype=object), np.empty(9, dtype=object)
    texts[:] = [None, "\x00", "a\x00", "\\xe2", "\U0001f4a1", "\u202e", "None", "5", "x" * 300]
    roles[:] = [None, "user", *[None] * 7]
    data = xr.Dataset({"x": ("token", np.arange(9))}, coords={"text": ("token", texts), "role": ("token", roles)})
    save(data, tmp_path / "odd.zarr")
    back = wb.open_data(tmp_path / "odd.zarr")
    xr.testing.assert_identical(back.load(), data)
    assert back.text.values[1:].tolist() == texts[1:].tolist()


def test_nothing_is_written_over(run, tmp_path: Path) -> None:
    kept = tmp_path / "mine.txt"
    kept.write_text("mine")
    with pytest.raises(WorkbenchError, match="something at this path"):
        run.to_zarr(kept)
    assert kept.read_text() == "mine"
    with pytest.raises(WorkbenchError, match="could not be written"):
        run.to_zarr(kept / "below_a_file.zarr")
    with pytest.raises(WorkbenchError, match="no saved data"):
        wb.open_data(tmp_path / "nowhere.zarr")


def test_without_zarr(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(WorkbenchError, match=r"pip install 'gptoss-workbench\[zarr\]'"):
        run.to_zarr(tmp_path / "run.zarr")
