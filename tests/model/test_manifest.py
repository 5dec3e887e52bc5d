"""The manifest of digests, against sha256sum, and what it finds that nothing else can."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

import gptoss_workbench as wb
from gptoss_workbench.errors import CheckpointError, CorruptFile, MissingShard
from gptoss_workbench.model import model as model_room
from gptoss_workbench.model.checkpoint import read_checkpoint
from gptoss_workbench.model.manifest import MANIFEST, check_manifest, file_digest, read_manifest, write_manifest
from tests.factories import tiny_model, write_hf

SUM = "0" * 64
FIRST, LAST = "model-00000-of-00001.safetensors", "model-00001-of-00001.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_hf(tmp_path, tiny_model(seed=3), shards=2)


def test_digest_against_hashlib(tmp_path: Path) -> None:
    content, steps = bytes(range(256)) * 9000, []
    (tmp_path / "x").write_bytes(content)
    assert file_digest(tmp_path / "x", steps.append) == hashlib.sha256(content).hexdigest()
    assert sum(steps) == len(content) and len(steps) > 1


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_the_form_is_that_of_sha256sum(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    theirs = subprocess.run(["sha256sum", *names], cwd=folder, capture_output=True, text=True, check=True).stdout
    assert write_manifest(folder, names).read_text() == theirs
    checked = subprocess.run(["sha256sum", "--check", "--strict", MANIFEST], cwd=folder, capture_output=True)
    assert checked.returncode == 0
    assert list(read_manifest(folder)) == names
    binary = subprocess.run(["sha256sum", "--binary", *names], cwd=folder, capture_output=True, text=True).stdout
    (folder / MANIFEST).write_text("".join(line[:64].upper() + line[64:] for line in binary.splitlines(keepends=True)))
    assert check_manifest(folder, [folder / FIRST])


def test_a_flipped_bit_of_a_weight(folder: Path) -> None:
    write_manifest(folder, sorted(path.name for path in folder.iterdir()))
    read_checkpoint(folder)
    raw = bytearray((folder / LAST).read_bytes())
    raw[-1] ^= 1
    (folder / LAST).unlink()
    (folder / LAST).write_bytes(raw)
    with pytest.raises(CorruptFile) as caught:
        read_checkpoint(folder)
    error = caught.value
    assert error.file == str(folder / LAST) and error.problem == "the content of a file is not what SHA256 says"
    assert error.got == f"sha256 {hashlib.sha256(raw).hexdigest()}" and "sha256 " in str(error.expected)
    assert len(str(error).splitlines()) <= 6
    (folder / MANIFEST).unlink()
    read_checkpoint(folder)  # nothing else can tell


def test_a_constant_of_a_model_that_nobody_published(folder: Path) -> None:
    write_manifest(folder, sorted(path.name for path in folder.iterdir()))
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"sliding_window": 8', '"sliding_window": 9'))
    with pytest.raises(CorruptFile) as caught:
        read_checkpoint(folder)
    assert caught.value.file == str(path)


def test_files_and_manifest_that_do_not_fit(folder: Path) -> None:
    write_manifest(folder, [FIRST])
    with pytest.raises(CheckpointError, match="does not name this file") as caught:
        read_checkpoint(folder)
    assert caught.value.file == str(folder / LAST)
    write_manifest(folder, [FIRST, LAST])
    read_checkpoint(folder)
    with (folder / MANIFEST).open("a") as file:
        file.write("0" * 64 + "  tokenizer.json\n")
    with pytest.raises(MissingShard) as missing:
        read_checkpoint(folder)
    assert missing.value.file == str(folder / "tokenizer.json") and missing.value.got == "no such file"


@pytest.mark.parametrize("text", [
    "", "nothing", SUM[1:] + "  a", SUM + " a", SUM + "  ../a", SUM + "  ", SUM + "  a\n" + SUM + "  a",
    SUM + "  a\n\n",
    "\xff" * 70, "0" * 2_000_000,
], ids=lambda text: repr(text[-12:]))
def test_a_manifest_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError) as caught:
        read_manifest(tmp_path)
    assert caught.value.file == str(tmp_path / MANIFEST) and len(str(caught.value)) < 1000
    assert caught.value.expected is not None


def test_no_manifest(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) == {}
    assert check_manifest(tmp_path, [tmp_path / "anything"]) is False


def test_the_embedded_model_is_what_its_manifest_says(tmp_path: Path) -> None:
    assert check_manifest(model_room.EMBEDDED, [model_room.EMBEDDED / "model.safetensors"])
    shutil.copytree(model_room.EMBEDDED, tmp_path / "copy")
    raw = bytearray((tmp_path / "copy" / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "copy" / "model.safetensors").write_bytes(raw)
    with pytest.raises(CorruptFile):
        wb.load(tmp_path / "copy")
