"""What ``wb.verify`` says of sound, damaged and half-known checkpoints, held to sums and counts by other means."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import gptoss_workbench as wb
from gptoss_workbench.errors import ModelNotFound
from gptoss_workbench.model import scan as scan_module
from gptoss_workbench.model import values as values_module
from gptoss_workbench.model import verify as verify_module
from gptoss_workbench.model.fingerprints import known_sum, revision_of
from gptoss_workbench.model.plan import plan_checkpoint
from gptoss_workbench.model.values import non_finite, scale_findings
from tests.factories import LAYOUTS, TinyModel, tiny_model, write_hf

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SMALL = {"num_hidden_layers": 2, "vocab_size": 64, "num_local_experts": 4}


@pytest.fixture(scope="module")
def tiny() -> TinyModel:
    return tiny_model(seed=5, **SMALL)


@pytest.fixture
def folder(tmp_path: Path, tiny: TinyModel) -> Path:
    return write_hf(tmp_path / "model", tiny)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def state_sums(folder: Path) -> None:
    """A manifest as a person makes it."""
    names = sorted(path.name for path in folder.iterdir())
    (folder / "SHA256").write_text("".join(f"{sha256(folder / name)}  {name}\n" for name in names))


def change(folder: Path, name: str, do: Callable[[torch.Tensor], object]) -> None:
    """Write a folder's one weights file anew with a changed tensor."""
    tensors = load_file(folder / "model.safetensors")
    do(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


# sound ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sound_checkpoint_is_counted_as_numpy_counts_it(layout: str, tiny: TinyModel, tmp_path: Path) -> None:
    folder = LAYOUTS[layout](tmp_path, tiny)
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    found = wb.verify(folder)
    assert found.ok and found.complete and found.findings == ()
    assert found.finite == sum(tensor.numel() for tensor in tensors.values() if tensor.is_floating_point())
    assert found.non_finite == 0
    scales = [tensor.numpy() for name, tensor in tensors.items() if name.endswith("scales")]
    if scales:
        assert found.scales is not None
        assert (found.scales.low, found.scales.high) == (min(s.min() for s in scales), max(s.max() for s in scales))
    else:
        assert found.scales is None
    assert {file.name: (file.size, file.sha256) for file in found.files} == {
        path.name: (path.stat().st_size, sha256(path)) for path in folder.iterdir()}
    assert found.weights_verified == "none"  # nobody states a sum
    assert all(file.right is None for file in found.files)


def test_the_embedded_model_is_as_it_was_shipped() -> None:
    found = wb.verify()
    assert found.ok and found.weights_verified == "sha256"


def test_the_report_reads_well(folder: Path) -> None:
    state_sums(folder)
    (folder / "notes.txt").write_text("mine")
    lines = str(wb.verify(folder)).splitlines()
    assert lines[0] == f"{folder}: sound"
    assert "MXFP4 experts" in lines[1]
    assert [line.split()[0] for line in lines[2:5]] == ["config.json", "model.safetensors", "notes.txt"]
    assert lines[3].endswith("right (SHA256)") and lines[4].endswith("unknown")
    assert lines[-1] == "  weights verified: sha256"
    assert max(map(len, lines)) <= 200


# sums -----------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_found_only_where_a_sum_is_known(folder: Path) -> None:
    size = (folder / "model.safetensors").stat().st_size
    state_sums(folder)
    assert wb.verify(folder).weights_verified == "sha256"
    flip(folder / "model.safetensors", size - 100)  # a bfloat16 of the last tensor, still a number
    found = wb.verify(folder)
    assert not found.ok and found.weights_verified == "none"
    [finding] = found.findings
    assert finding.file == str(folder / "model.safetensors") and finding.got == sha256(folder / "model.safetensors")
    assert "WRONG" in str(found)
    (folder / "SHA256").unlink()
    unknown = wb.verify(folder)
    assert unknown.ok and unknown.weights_verified == "none"


def test_a_manifest_that_names_what_is_not_there(folder: Path) -> None:
    state_sums(folder)
    with (folder / "SHA256").open("a") as manifest:
        manifest.write(f"{'0' * 64}  tokenizer.json\n")
    [finding] = wb.verify(folder).findings
    assert finding.file == str(folder / "tokenizer.json") and "not there" in finding.problem


def test_a_broken_manifest_is_a_finding(folder: Path) -> None:
    (folder / "SHA256").write_text("these are no sums\n")
    found = wb.verify(folder)
    assert not found.ok and found.findings[0].file == str(folder / "SHA256")


def in_hub_cache(base: Path, folder: Path, shared: bool = False) -> Path:
    """A folder as the Hub's client caches it: blobs named by their sums, and a snapshot of links to them.

    With ``shared`` the blobs are links themselves, to files whose names are sums of another kind.
    """
    repository = base / "models--org--name"
    snapshot, blobs = repository / "snapshots" / COMMIT, repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        name = sha256(path)
        if path.suffix == ".json":  # small files go by git's sum, taken here by git itself
            name = subprocess.run(["git", "hash-object", path], capture_output=True, text=True, check=True
                                  ).stdout.strip()
        if shared:
            store = base / "blobs" / "ab"
            store.mkdir(parents=True, exist_ok=True)
            other = hashlib.sha256(path.name.encode()).hexdigest()  # sixty-four digits, and not of the content
            (store / other).write_bytes(path.read_bytes())
            (blobs / name).symlink_to(Path("../../blobs/ab") / other)
        else:
            (blobs / name).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("../../blobs") / name)
    return snapshot


@pytest.mark.parametrize("shared", [False, True])
def test_sums_that_the_hub_stated_are_known(folder: Path, tmp_path: Path, shared: bool) -> None:
    snapshot = in_hub_cache(tmp_path / "hub", folder, shared)
    found = wb.verify(snapshot)
    assert found.ok and found.weights_verified == "sha256"
    kinds = {file.name: file.known.kind for file in found.files if file.known}
    assert kinds == {"config.json": "git", "model.safetensors": "sha256"}
    assert revision_of(snapshot) == COMMIT
    assert wb.load(snapshot, dtype="float32").provenance.revision == COMMIT


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_blob_is_found(folder: Path, tmp_path: Path, name: str) -> None:
    snapshot = in_hub_cache(tmp_path / "hub", folder)
    blob = (snapshot / name).resolve()
    if name == "config.json":
        blob.write_text(blob.read_text().replace("\n", " "))  # the same configuration in other bytes
    else:
        flip(blob, blob.stat().st_size - 100)
    found = wb.verify(snapshot)
    assert [finding.file for finding in found.findings] == [str(snapshot / name)]
    assert found.weights_verified == "none"


def test_sums_beside_a_download_into_a_folder_are_known(folder: Path) -> None:
    notes = folder / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (notes / f"{name}.metadata").write_text(f"{COMMIT}\n{sha256(folder / name)}\n1750000000.0\n")
    assert revision_of(folder) == COMMIT
    found = wb.verify(folder)
    assert found.ok and found.weights_verified == "sha256"
    flip(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 100)
    assert not wb.verify(folder).ok


def test_a_link_that_is_no_snapshot_states_nothing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    target = tmp_path / "blobs" / ("0" * 64)
    target.write_bytes(b"anything")
    (folder / "extra.bin").symlink_to(target)
    assert known_sum(folder / "extra.bin", {}) is None


def test_the_number_of_bytes_of_a_published_model_is_known(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "PUBLISHED_BYTES", {plan_checkpoint(folder).nbytes: "some model"})
    assert wb.verify(folder).weights_verified == "size"
    change(folder, "model.norm.weight", lambda norm: norm.fill_(torch.nan))
    assert wb.verify(folder).weights_verified == "none"


# values ---------------------------------------------------------------------------------------------------------


def test_scales_out_of_range_are_found_by_tensor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_module, "_PART", 1)  # one expert at a time
    name = "model.layers.1.mlp.experts.down_proj"
    tensors = load_file(folder / "model.safetensors")
    scales, blocks = tensors[f"{name}_scales"], tensors[f"{name}_blocks"]
    scales[3, 5, 1], scales[2, 0, 0], scales[0, 0, 0] = 255, 253, 254
    blocks[3, 5, 1], blocks[2, 0, 0], blocks[0, 0, 0] = 0x11, 0x88, 0x10  # 0x88 is minus zero, twice
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found = wb.verify(folder)
    [finding] = found.findings
    assert finding.tensor == f"{name}_scales"
    assert found.scales is not None
    assert (found.scales.high, found.scales.nans, found.scales.overflows) == (255, 1, 2)


@pytest.mark.parametrize("part", [1, 1 << 26])
def test_numbers_that_are_none_are_found_by_place(folder: Path, monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    monkeypatch.setattr(scan_module, "_PART", part)

    def spoil(weight: torch.Tensor) -> None:
        weight[3, 7], weight[3, 9], weight[5, 0] = torch.inf, torch.nan, -torch.inf

    change(folder, "model.layers.0.self_attn.q_proj.weight", spoil)
    found = wb.verify(folder)
    [finding] = found.findings
    assert finding.tensor == "model.layers.0.self_attn.q_proj.weight"
    assert finding.got == "3, first at [3, 7]" and found.non_finite == 3
    assert not found.ok


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.sampled_from([1, 7, 1 << 22]), st.booleans())
def test_scale_findings_are_those_of_a_loop(seed: int, rows: int, part: int, wild: bool) -> None:
    generator = np.random.default_rng(seed)
    scales = generator.integers(250 if wild else 0, 256, (rows, 3), dtype=np.uint8)
    blocks = generator.choice(np.array([0, 0x80, 0x08, 0x88, 0x01], dtype=np.uint8), (rows, 3, 16))
    blocks[generator.random((rows, 3)) < 0.5] = 0
    bad, over = [], 0
    for index, (scale, block) in enumerate(zip(scales.reshape(-1), blocks.reshape(-1, 16), strict=True)):
        filled = any(byte & 15 not in (0, 8) or byte >> 4 not in (0, 8) for byte in block)
        over += bool(scale >= 253 and filled)
        if scale == 255 or (scale >= 253 and filled):
            bad.append(index)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(values_module, "_PART", part)
        found = scale_findings(torch.from_numpy(scales), torch.from_numpy(blocks))
    assert (found.low, found.high) == (scales.min(), scales.max())
    assert (found.nans, found.overflows) == ((scales == 255).sum(), over)
    assert found.first == (bad[0] if bad else None) and found.ok == (not bad)


@settings(max_examples=60)
@given(st.lists(st.floats(width=32), min_size=1, max_size=60), st.sampled_from([torch.float32, torch.bfloat16]),
       st.sampled_from([1, 5, 1 << 22]))
def test_non_finite_is_what_numpy_finds(numbers: list[float], dtype: torch.dtype, part: int) -> None:
    tensor = torch.tensor(numbers, dtype=torch.float32).to(dtype).reshape(len(numbers), 1)
    wrong = np.argwhere(~np.isfinite(tensor.float().numpy()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(values_module, "_PART", part)
        assert non_finite(tensor) == (len(wrong), tuple(wrong[0]) if len(wrong) else None)


# damage of every kind is listed, never raised -------------------------------------------------------------------


def test_no_such_folder_is_an_error_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        wb.verify(tmp_path / "nowhere")


def test_a_folder_without_weights(tmp_path: Path) -> None:
    found = wb.verify(tmp_path)
    assert not found.ok and found.layout is None and "no checkpoint" in found.findings[0].problem


def test_what_the_loader_refuses_is_a_finding_and_the_rest_is_still_looked_at(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_local_experts": 5}))
    change(folder, "model.norm.weight", lambda norm: norm[:1].fill_(torch.nan))
    found = wb.verify(folder)
    assert found.layout is None and found.weights_verified == "none"
    assert {finding.tensor for finding in found.findings} == {None, "model.norm.weight"}
    assert any("num_local_experts" in str(finding.expected) for finding in found.findings)


def test_a_web_page_and_a_named_pipe_in_place_of_files(tmp_path: Path, tiny: TinyModel) -> None:
    folder = write_hf(tmp_path / "model", tiny, shards=3)
    first, second, _ = sorted(folder.glob("*.safetensors"))
    first.write_text("<html>404</html>")
    second.unlink()
    os.mkfifo(second)
    found = wb.verify(folder)
    said = {Path(finding.file).name: finding.problem for finding in found.findings if finding.file}
    assert said[second.name] == "not a regular file"
    assert "not a safetensors file" in said[first.name]
    assert len(found.findings) == 2  # each is named once, though plan and check both meet it
    assert second.name not in [file.name for file in found.files]


@settings(max_examples=40)
@given(data=st.data())
def test_any_damage_gives_a_report(tmp_path_factory: pytest.TempPathFactory, tiny: TinyModel, data: st.DataObject
                                   ) -> None:
    folder = write_hf(tmp_path_factory.mktemp("damaged"), tiny, shards=2)
    state_sums(folder)
    name = data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir() if path.name != "SHA256")))
    content = bytearray((folder / name).read_bytes())
    most = min(len(content), 4000) if data.draw(st.booleans()) else len(content)  # headers as often as data
    at = data.draw(st.integers(0, most - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
    if kind == "flip":
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del content[at:]
    else:
        content[at:at] = b"\x00{"
    (folder / name).write_bytes(content)
    found = wb.verify(folder)
    assert not found.ok and found.weights_verified == "none"
    assert any(finding.file == str(folder / name) for finding in found.findings)


# progress, stopping, and where the verdict goes -----------------------------------------------------------------


def test_progress_counts_every_byte_that_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "_REPORT", 1)
    told: list[tuple[int, int]] = []
    wb.verify(folder, on_progress=lambda done, total: told.append((done, total)))
    tensors = load_file(folder / "model.safetensors")
    twice = sum(tensor.nbytes for name, tensor in tensors.items() if not name.endswith("blocks"))
    total = sum(path.stat().st_size for path in folder.iterdir()) + twice
    assert {total for _, total in told} == {total}
    assert [done for done, _ in told] == sorted({done for done, _ in told}) and told[-1][0] == total


def test_it_can_be_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "_REPORT", 1)
    state_sums(folder)
    asked: list[bool] = []

    def stop() -> bool:
        asked.append(True)
        return len(asked) > 1  # after config.json

    found = wb.verify(folder, should_stop=stop)
    assert not found.complete and not found.ok and found.weights_verified == "none"
    assert [(file.name, file.sha256 is None) for file in found.files] == [
        ("config.json", False), ("model.safetensors", True)]
    assert "stopped before the end" in str(found)


def test_the_verdict_goes_into_provenance_while_the_files_stay_the_same(folder: Path, tmp_path: Path) -> None:
    snapshot = in_hub_cache(tmp_path / "hub", folder)  # known sums, yet no manifest that loading would check
    model = wb.load(snapshot, dtype="float32")
    run = model.run([1, 2])
    assert run.provenance.weights_verified == "none"
    wb.verify(snapshot)
    assert model.run([1, 2]).provenance.weights_verified == "sha256"
    blob = (snapshot / "model.safetensors").resolve()
    os.utime(blob, ns=(1, 1))  # touched: what was verified is not what will be read now
    assert wb.load(snapshot, dtype="float32").provenance.weights_verified == "none"


def test_a_manifest_is_checked_by_loading_already(folder: Path) -> None:
    state_sums(folder)
    assert wb.load(folder, dtype="float32").provenance.weights_verified == "sha256"
