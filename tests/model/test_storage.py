"""Which files are mapped, and that copying them gives the same tensors."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import pytest
import torch

from gptoss_workbench.errors import CheckpointError
from gptoss_workbench.model import mounts, storage
from gptoss_workbench.model.checkpoint import plan_checkpoint
from gptoss_workbench.model.mounts import file_system, may_map
from gptoss_workbench.model.storage import Storage
from tests.factories import tiny_model, write_compact, write_hf

MOUNTS = r"""22 1 0:21 / / rw,relatime - overlay overlay rw
23 22 0:22 / /data rw - ext4 /dev/sda1 rw
24 23 0:23 / /data/shared rw master:3 - nfs4 server:/export rw
25 22 0:24 / /my\040disk rw - fuse.sshfs host: rw
26 22 0:25 / /twice rw - lustre a rw
27 22 0:26 / /twice rw - xfs b rw
28 22 0:27 / /twi rw - 9p c rw
a line of another form
"""


@pytest.mark.parametrize(("path", "kind", "mapped"), [
    ("/home/x", "overlay", True), ("/data/m", "ext4", True), ("/data/shared/m/a", "nfs4", False),
    ("/data/sharedx", "ext4", True), ("/my disk/m", "fuse.sshfs", False), ("/twice/m", "xfs", True),
    ("/twi", "9p", False), ("/data/shared/../m", "ext4", True),
])
def test_file_system(path: str, kind: str, mapped: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GPTOSS_NO_MMAP", raising=False)
    (tmp_path / "mountinfo").write_text(MOUNTS)
    monkeypatch.setattr(mounts, "_MOUNTS", tmp_path / "mountinfo")
    assert file_system(Path(path)) == kind
    assert may_map(Path(path)) is mapped
    monkeypatch.setenv("GPTOSS_NO_MMAP", "1")
    assert not may_map(Path(path))


def test_file_system_of_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to("/data/shared/model.safetensors")
    assert file_system(tmp_path / "link", MOUNTS) == "nfs4"
    assert file_system(tmp_path, "") == ""
    monkeypatch.setattr(mounts, "_MOUNTS", tmp_path / "nowhere")
    assert file_system(tmp_path) == "" and may_map(tmp_path) == (os.environ.get("GPTOSS_NO_MMAP") != "1")


@pytest.mark.parametrize("write", [write_hf, write_compact])
def test_copied_equals_mapped(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_checkpoint(write(tmp_path, tiny_model(seed=3)))
    monkeypatch.setattr(storage, "_STEP", 1000)  # several reads for a tensor
    found = {}
    for mapped in (True, False):
        monkeypatch.setattr(storage, "may_map", lambda path, mapped=mapped: mapped)
        with Storage(plan.tensors, plan.stamps) as files:
            found[mapped] = {name: files.tensor(name) for name in plan.tensors}
            files.check()
    for name in plan.tensors:
        assert found[True][name].dtype == found[False][name].dtype
        assert torch.equal(found[True][name], found[False][name]), name


def test_a_mapped_tensor_may_be_written_to(tmp_path: Path) -> None:
    """It changes memory, not the file, and other tensors stay as they are; nothing warns."""
    plan = plan_checkpoint(write_hf(tmp_path, tiny_model(seed=3)))
    (file,) = plan.files
    before = file.read_bytes()
    with warnings.catch_warnings(), Storage(plan.tensors, plan.stamps) as files:
        warnings.simplefilter("error")
        norm = files.tensor("model.norm.weight")
    norm.zero_()
    assert file.read_bytes() == before
    assert not norm.any()


@pytest.mark.skipif(sys.platform != "linux", reason="a file of holes, and how Linux accounts for memory")
def test_a_file_larger_than_memory_is_mapped(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(4 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with (tmp_path / "large").open("rb", buffering=0) as file:
        mapped = storage._private_map(file)
    assert mapped[-1] == 0 and len(mapped) == (tmp_path / "large").stat().st_size


def test_no_room_for_a_mapping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_checkpoint(write_hf(tmp_path, tiny_model(seed=3)))

    def refuse(file: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(storage, "_private_map", refuse)
    with Storage(plan.tensors, plan.stamps) as files, pytest.raises(CheckpointError) as caught:
        files.tensor("model.norm.weight")
    assert caught.value.problem == "a file cannot be mapped"
    assert caught.value.file == str(plan.files[0]) and "ulimit -v" in str(caught.value.hint)

    def not_here(file: object) -> None:
        raise OSError(19, "No such device")

    monkeypatch.setattr(storage, "_private_map", not_here)  # then it is copied
    with Storage(plan.tensors, plan.stamps) as files:
        assert files.tensor("model.norm.weight").shape == (64,)
