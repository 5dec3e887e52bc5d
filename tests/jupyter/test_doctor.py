"""What the doctor says of a machine: of this one, and of others that are made up."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gptoss_workbench as wb
from gptoss_jupyter import doctor
from gptoss_workbench import checkup
from gptoss_workbench.errors import VocabularyError
from gptoss_workbench.model import model as model_module
from gptoss_workbench.model.memory import memory_need
from gptoss_workbench.model.plan import plan_checkpoint
from gptoss_workbench.model.published import PUBLISHED
from tests.factories import tiny_model, write_hf

BYTES = {"gpt-oss-20b": 13_761_264_768, "gpt-oss-120b": 65_248_815_744}  # as the published indexes state them
USAGE = SimpleNamespace(free=5_600_000_000)
NORMS = {"gpt-oss-20b": 2 * 24 + 1, "gpt-oss-120b": 2 * 36 + 1}  # of 2880 values, bfloat16 in the files


# which model fits how -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", BYTES)
def test_sizes_are_those_that_were_published(model: str) -> None:
    assert checkup.published_plan(PUBLISHED[model]).nbytes == BYTES[model]


@pytest.mark.parametrize("model", BYTES)
def test_needs_are_counted_by_hand(model: str) -> None:
    norms = NORMS[model] * 2880
    cpu = checkup.fit(model, PUBLISHED[model], "cpu", 1, 1).need
    assert (cpu.allocated, cpu.mapped, cpu.device) == (4 * norms, BYTES[model] - 2 * norms, 0)
    gpu = checkup.fit(model, PUBLISHED[model], "cuda", 1, 1).need
    assert (gpu.allocated, gpu.mapped, gpu.device) == (0, 0, BYTES[model] + 2 * norms)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_needs_are_those_of_the_loader(device: str, tmp_path: Path) -> None:
    plan = plan_checkpoint(write_hf(tmp_path, tiny_model()))
    made = checkup.published_plan(plan.config)
    assert made.tensors.keys() == plan.tensors.keys() and made.nbytes == plan.nbytes
    for mapped in (True, False):
        assert memory_need(made, torch.bfloat16, device, mapped) == memory_need(plan, torch.bfloat16, device, mapped)


@pytest.mark.parametrize(("model", "device", "free", "memory", "said"), [
    ("gpt-oss-20b", "cpu", 20.0, 20.0, "CPU: fits (15.3 GB wanted, 20.0 GB free)"),
    ("gpt-oss-20b", "cpu", 15.2, 15.2, "CPU: from disk, slowly (15.3 GB wanted, 15.2 GB free)"),
    ("gpt-oss-20b", "cpu", 1.4, 1.4, "CPU: does not fit (15.3 GB wanted, 1.4 GB free)"),
    ("gpt-oss-20b", "cuda", 15.3, 1.0, "GPU: fits (15.3 GB wanted, 15.3 GB free)"),
    ("gpt-oss-20b", "cuda", 15.2, 64.0, "GPU: does not fit (15.3 GB wanted, 15.2 GB free)"),
    ("gpt-oss-120b", "cuda", 84.0, 8.0, "GPU: fits (66.7 GB wanted, 84.0 GB free)"),
    ("gpt-oss-120b", "cpu", 24.0, 24.0, "CPU: from disk, slowly (66.7 GB wanted, 24.0 GB free)"),
])
def test_where_a_model_fits(model: str, device: str, free: float, memory: float, said: str) -> None:
    found = checkup.fit(model, PUBLISHED[model], device, round(free * 1e9), round(memory * 1e9))
    assert str(found) == said and found.ok == ("does not fit" not in said)


def test_without_mapping_the_weights_must_fit_into_memory() -> None:
    found = checkup.fit("gpt-oss-20b", PUBLISHED["gpt-oss-20b"], "cpu", 15_200_000_000, 15_200_000_000, mapped=False)
    assert not found.ok


# the whole report -----------------------------------------------------------------------------------------------


def test_the_report_takes_a_screen_at_most_and_tells_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    token = "hf_" + "Zz9" * 11
    monkeypatch.setenv("HF_TOKEN", token)
    found = doctor.report()
    lines = str(found).splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 120
    names = [what for what, _ in found.rows]
    assert len(set(names)) == len(names)
    assert {"python", "torch", "triton", "GPU", "memory", "model downloads", "HF_HUB_OFFLINE", "vocabulary",
            "embedded model", "gpt-oss-20b", "gpt-oss-120b", "notebook"} <= set(names)
    assert token not in str(found)
    assert found["embedded model"].startswith("there, sha256 right, runs with ")


def test_the_library_has_a_doctor_without_the_notebook() -> None:
    found = wb.doctor()
    assert torch.__version__ in found["torch"]
    assert found["kernels on cpu"].startswith("cpu for bfloat16, reference for float32; no triton: ")
    assert found["cpu kernels"].startswith("path ")
    assert [fit.model for fit in found.fits if fit.device == "cpu"] == ["gpt-oss-20b", "gpt-oss-120b"]
    assert "jupyterlab" not in str(found) and repr(found) == str(found)


def test_a_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=0: (84_000_000_000, 85_000_000_000))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100")
    monkeypatch.setattr(checkup, "_embedded", lambda devices: f"runs on {' and '.join(devices)}")
    found = wb.doctor()
    assert found["GPU"] == "NVIDIA H100 (sm_90), 85.0 GB, 84.0 GB free"
    assert found["embedded model"] == "runs on cpu and cuda"
    assert [(fit.model, fit.how) for fit in found.fits if fit.device == "cuda"] == [
        ("gpt-oss-20b", "fits"), ("gpt-oss-120b", "fits")]
    assert max(map(len, str(found).splitlines())) <= 160


def test_the_cache_is_found_wherever_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    cache = tmp_path / "not" / "made" / "yet"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: {tmp_path: USAGE}[path])
    assert dict(checkup._downloads()) == {
        "model downloads": f"{cache}, 5.6 GB of disk free",
        "HF_HUB_OFFLINE": "1"}
    assert checkup._model("gpt-oss-20b", []) == "13.8 GB, not downloaded"
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = cache / "models--openai--gpt-oss-20b"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert checkup._model("gpt-oss-20b", []) == "13.8 GB, in the cache"


# what is not well -----------------------------------------------------------------------------------------------


def test_a_package_that_is_not_there_is_said_to_be_missing() -> None:
    assert checkup.version("no-such-package-anywhere") == "not installed"
    assert checkup.installed(("no-such-package-anywhere",)) == "no-such-package-anywhere not installed"


def test_damaged_assets_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "assets"
    shutil.copytree(model_module.EMBEDDED, copy)
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    monkeypatch.setattr(model_module, "EMBEDDED", copy)
    assert checkup._embedded(("cpu",)) == "not usable on cpu: the content of a file is not what SHA256 says"


def test_a_vocabulary_that_does_not_load_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from gptoss_workbench.harmony import vocabulary

    def refuse() -> None:
        raise VocabularyError("the vocabulary is damaged", hint="install it again")

    monkeypatch.setattr(vocabulary, "load_vocabulary", refuse)
    assert checkup._vocabulary() == "not usable: the vocabulary is damaged"


@pytest.mark.parametrize(("found", "old"), [
    ("4.5.9", True), ("4.6.1", True), ("4.6.2", False), ("4.6.2rc1", False), ("4.10.0", False), ("5", False),
    ("4.6", True), ("not installed", False),
])
def test_packages_with_a_known_hole_are_named(found: str, old: bool) -> None:
    expected = [f"jupyterlab {found} (a hole was closed in 4.6.2)"] if old else []
    assert doctor.too_old({"jupyterlab": found}) == expected
