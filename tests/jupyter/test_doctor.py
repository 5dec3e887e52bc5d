"""What the doctor says of a machine."""

from __future__ import annotations

import pytest

from gptoss_jupyter import doctor


@pytest.mark.parametrize(("memory", "gpu", "expected"), [
    (20e9, None, "fits in memory, computed on the CPU (15.3 GB needed)"),
    (20e9, 80e9, "fits on the GPU (15.3 GB needed)"),
    (20e9, 8e9, "fits in memory, computed on the CPU (15.3 GB needed)"),
    (4e9, 8e9, "does not fit: 15.3 GB needed, 8.0 GB free"),
    (15.2e9, None, "does not fit: 15.3 GB needed, 15.2 GB free"),
])
def test_where_a_model_fits(memory, gpu, expected):
    assert doctor.fit(doctor.PUBLISHED["gpt-oss-20b"], memory, gpu) == expected


def test_a_package_that_is_not_there_is_said_to_be_missing():
    assert doctor.version("no-such-package-anywhere") == "not installed"


def test_damaged_assets_are_found(tmp_path, monkeypatch):
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "SHA256").write_text(f"{'0' * 64}  model.safetensors\n")
    (tmp_path / "assets" / "model.safetensors").write_bytes(b"not it")
    monkeypatch.setattr(doctor.resources, "files", lambda package: tmp_path)
    assert doctor._embedded() == "damaged: model.safetensors; install the package again"
