"""The list of bad inputs, #1 to #52: each gets one message that names file, tensor, expected and got, and none loads.

Most are values in ``bad_checkpoints``; those that are no damage to a folder have a test of their own below, or in
``test_hub.py``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch

import gptoss_workbench as wb
from gptoss_workbench.errors import CorruptFile, MissingShard, ModelNotFound, NotEnoughMemory, VocabularyError
from gptoss_workbench.harmony.vocabulary import check_tokenizer, load_vocabulary
from gptoss_workbench.model import memory, storage
from gptoss_workbench.model import model as model_room
from gptoss_workbench.model.checkpoint import plan_checkpoint, read_checkpoint, read_weights
from gptoss_workbench.nano.export_hf import byte_characters
from tests.factories import LAYOUTS, tiny_model
from tests.model.bad_checkpoints import contents, files
from tests.model.bad_checkpoints.case import (
    CONFIG,
    FIRST,
    INDEX,
    SECOND,
    SINGLE,
    Case,
    content,
    is_root,
    published,
    published_original,
    unreadable,
    write_sparse,
)

CASES = [*files.CASES, *contents.CASES]
LOADS = [*files.LOADS, *contents.LOADS]
IN_TEST_HUB = {
    50: ["test_refs_missing"],
    51: ["test_answers_other_than_files", "test_nobody_answers", "test_endpoint_that_keeps_silent",
         "test_offline_mode_asks_nobody", "test_branch_that_moved"],
    52: ["test_full_disk", "test_read_only_cache"],
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Good checkpoints by name: the tiny layouts, the embedded model, published sizes in files that are all hole."""
    top, tiny = tmp_path_factory.mktemp("bases"), tiny_model(seed=7)
    made = {name: write(top / name, tiny) for name, write in LAYOUTS.items()}
    made["embedded"] = model_room.EMBEDDED
    made["20b"] = write_sparse(top / "20b", published(24, 32))
    made["120b"] = write_sparse(top / "120b", published(36, 128))
    made["20b-original"] = write_sparse(top / "20b-original", published_original(24, 32), original=True)
    return made


def copied(base: Path, folder: Path) -> Path:
    """A copy of a good checkpoint; of files that are mostly hole, a link."""
    folder.mkdir(parents=True)
    for file in base.iterdir():
        large = file.stat().st_size > 100_000_000
        (folder / file.name).symlink_to(file) if large else shutil.copy(file, folder)
    return folder


def check_message(error: wb.errors.WorkbenchError) -> None:
    """The manners of every message."""
    lines = str(error).splitlines()
    assert 2 <= len(lines) <= 6, str(error)
    assert max(map(len, lines)) < 1000, str(error)[:2000]
    assert lines[0] == error.problem


# -- the list ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bad_input(case: Case, bases: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(bases[case.base], tmp_path / "model")
    case.make(folder)
    with pytest.raises(case.error) as caught:
        read_checkpoint(folder)
    error = caught.value
    check_message(error)
    assert case.problem in error.problem
    assert error.file == str(folder / case.file)
    assert str(folder) in str(error.where) and case.file in str(error.where)
    assert error.tensor == case.tensor
    for part in ("expected", "got", "hint"):
        wanted = getattr(case, part)
        assert wanted is None or wanted in str(getattr(error, part)), f"{part}: {getattr(error, part)}"
    assert error.expected is not None or error.got is not None


@pytest.mark.parametrize(("number", "what", "make"), LOADS, ids=[f"#{number} {what}" for number, what, _ in LOADS])
def test_odd_and_sound(number: int, what: str, make, bases: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(bases["hf"], tmp_path / "model")
    make(folder)
    good, found = read_checkpoint(bases["hf"]), read_checkpoint(folder)
    assert found[0] == good[0]
    assert torch.equal(found[1].unembed, good[1].unembed)


def test_every_good_base_is_accepted(bases: dict[str, Path]) -> None:
    assert {plan_checkpoint(folder).config.num_experts_per_tok for folder in bases.values()} == {4}
    assert plan_checkpoint(bases["20b"]).nbytes == 13_761_264_768  # the published total_size
    assert plan_checkpoint(bases["120b"]).nbytes == 65_248_815_744
    assert len(plan_checkpoint(bases["20b-original"]).tensors) == 363


def test_all_52_are_here() -> None:
    seen = {case.number for case in CASES} | {number for number, _, _ in LOADS} | set(IN_TEST_HUB)
    seen |= {int(number) for number in re.findall(r"^def test_(\d\d)_", Path(__file__).read_text(), re.MULTILINE)}
    assert seen == set(range(1, 53))
    hub = (Path(__file__).parent / "test_hub.py").read_text()
    assert all(f"def {name}(" in hub for names in IN_TEST_HUB.values() for name in names)


@pytest.mark.parametrize("case", [case for case in CASES if "allow_modified" in str(case.hint)], ids=str)
def test_modified_on_purpose(case: Case, bases: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(bases[case.base], tmp_path / "model")
    good = plan_checkpoint(folder).config
    case.make(folder)
    assert plan_checkpoint(folder, allow_modified_config=True).config != good


# -- those that are no damage to a folder --------------------------------------------------------------------


@pytest.mark.parametrize(("base", "name"), [
    ("hf", CONFIG), ("hf", SINGLE), ("hf-sharded", INDEX), ("hf-sharded", FIRST),
])
def test_31_no_permission(base: str, name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(bases[base], tmp_path / "model")
    (folder / name).chmod(0)
    with pytest.raises(wb.errors.CheckpointError) as caught:
        if is_root():
            with unreadable(name):
                read_checkpoint(folder)
        else:
            read_checkpoint(folder)
    error = caught.value
    check_message(error)
    assert error.problem == "permission denied" and error.file == str(folder / name)
    assert "mode ----------, owner" in str(error.got) and str(os.geteuid()) in str(error.got)
    assert "chmod" in str(error.hint)


@pytest.mark.parametrize("no_mmap", ["0", "1"])
@pytest.mark.parametrize("change", ["truncated", "rewritten"])
def test_32_file_changed_while_it_is_read(change: str, no_mmap: str, bases: dict[str, Path], tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the plan and the read, and between two tensors."""
    monkeypatch.setenv("GPTOSS_NO_MMAP", no_mmap)
    folder = copied(bases["hf"], tmp_path / "model")
    file, good = folder / SINGLE, (folder / SINGLE).read_bytes()

    def damage() -> None:
        if change == "truncated":
            os.truncate(file, len(good) - 4096)
        else:
            file.write_bytes(good[:-1] + b"\0")
            os.utime(file, ns=(0, 0))  # clocks of file systems may be coarse

    def check(error: CorruptFile) -> None:
        check_message(error)
        assert error.file == str(file) and "changed while the model was loading" in error.problem
        assert f"{len(good)} bytes" in str(error.expected)
        assert ("written to" if change == "rewritten" else f"{len(good) - 4096} bytes") in str(error.got)

    with pytest.raises(CorruptFile) as caught:
        read_checkpoint(folder, on_plan=lambda plan, need: damage())
    check(caught.value)

    file.unlink()
    file.write_bytes(good)
    plan, real, reads = plan_checkpoint(folder), storage.Storage.tensor, []

    def in_the_middle(self: storage.Storage, name: str) -> torch.Tensor:
        reads.append(name)
        if len(reads) == 40:
            damage()
        return real(self, name)

    monkeypatch.setattr(storage.Storage, "tensor", in_the_middle)
    with pytest.raises(CorruptFile) as caught:
        read_weights(plan, torch.bfloat16)
    check(caught.value)
    assert len(reads) == 40


def test_32_file_replaced_after_loading(bases: dict[str, Path], tmp_path: Path) -> None:
    """As a download does it: a new file under the old name. The mapped one lives on."""
    folder = copied(bases["hf"], tmp_path / "model")
    _, weights = read_checkpoint(folder, torch.bfloat16)
    before = weights.unembed.clone()
    (folder / "new").write_bytes(b"")
    (folder / "new").replace(folder / SINGLE)
    assert torch.equal(weights.unembed, before)


def test_34_extra_shard(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(bases["hf-sharded"], tmp_path / "model")
    shutil.copy(folder / FIRST, folder / "adapter.safetensors")
    with pytest.warns(UserWarning, match=r"not read: adapter\.safetensors"):
        read_checkpoint(folder)
    single = copied(bases["hf"], tmp_path / "single")
    shutil.copy(folder / FIRST, single)
    with pytest.warns(UserWarning, match=re.escape(FIRST)):
        read_checkpoint(single)


# tokenizers ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> dict:
    """As much of the published tokenizer.json as counts: the text tokens, and the special ones by name."""
    vocabulary, alphabet = load_vocabulary(), byte_characters()
    vocab = {"".join(alphabet[byte] for byte in vocabulary.token_bytes(rank)): rank for rank in range(199_998)}
    names = {199998: "<|startoftext|>", 199999: "<|endoftext|>", 200002: "<|return|>", 200003: "<|constrain|>",
             200005: "<|channel|>", 200006: "<|start|>", 200007: "<|end|>", 200008: "<|message|>", 200012: "<|call|>",
             200018: "<|endofprompt|>"}
    return {"added_tokens": [{"id": token, "content": name} for token, name in names.items()],
            "model": {"type": "BPE", "vocab": vocab}}


def test_49_tokenizer_missing_or_right(bases: dict[str, Path], tokenizer: dict, tmp_path: Path) -> None:
    """Neither it nor a chat template is needed: vocabulary and format come with the package."""
    folder = copied(bases["embedded"], tmp_path / "model")
    assert wb.load(folder).encode("Hi") == [12194]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert wb.load(folder).encode("<|start|>") == [200006]


@pytest.mark.parametrize(("move", "expected", "got"), [
    ({"<|start|>": 200007, "<|end|>": 200006}, "<|start|> to be 200006", "200007"),
    ({"<|call|>": None}, "<|call|> to be 200012", "no such token"),
    ({"<|mine|>": 201088}, "special tokens from 199998 to 201087", "'<|mine|>' is 201088"),
    ({"<|mine|>": 17}, "special tokens from 199998 to 201087", "'<|mine|>' is 17"),
])
def test_49_special_tokens_moved(move: dict, expected: str, got: str, bases: dict[str, Path], tokenizer: dict,
                                 tmp_path: Path) -> None:
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]} | move
    added = [{"id": token, "content": name} for name, token in ids.items() if token is not None]
    (tmp_path / "tokenizer.json").write_text(json.dumps({**tokenizer, "added_tokens": added}))
    with pytest.raises(VocabularyError) as caught:
        check_tokenizer(tmp_path, 201_088)
    error = caught.value
    check_message(error)
    assert error.problem == "The tokenizer does not belong to this model."
    assert error.where == str(tmp_path / "tokenizer.json") and (error.expected, error.got) == (expected, got)


def test_49_vocabulary_of_another_size(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(bases["hf"], tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(VocabularyError) as caught:
        wb.load(folder)
    error = caught.value
    check_message(error)
    assert "does not belong" in error.problem and error.where == str(folder / "tokenizer.json")
    assert "201088" in str(error.expected) and "512" in str(error.got)


# caches -------------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"
COMMAND = f"hf download someone/tiny --revision {COMMIT}"


@pytest.fixture
def snapshot(bases: dict[str, Path], tmp_path: Path) -> Path:
    """A complete snapshot in a Hugging Face cache: links to blobs."""
    repository = tmp_path / "hub" / "models--someone--tiny"
    folder = repository / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(bases["hf-sharded"].iterdir())):
        shutil.copy(file, repository / "blobs" / f"{number:064x}")
        (folder / file.name).symlink_to(f"../../blobs/{number:064x}")
    return folder


def test_50_interrupted_download(snapshot: Path) -> None:
    read_checkpoint(snapshot)
    for name in (FIRST, SECOND):
        (snapshot / name).unlink()
    (snapshot.parents[1] / "blobs" / "abc.incomplete").write_bytes(b"half of it")
    with pytest.raises(MissingShard) as caught:
        read_checkpoint(snapshot)
    error = caught.value
    check_message(error)
    assert error.file == str(snapshot / INDEX) and error.problem == "2 of 3 weights files are missing"
    assert (error.expected, error.got) == (f"{FIRST}, {SECOND}", "1 of 3, and 1 unfinished download(s)")
    assert error.hint == f"run: {COMMAND}"


def test_50_only_the_configuration_came(snapshot: Path) -> None:
    for file in snapshot.glob("model*"):
        file.unlink()
    with pytest.raises(ModelNotFound) as caught:
        read_checkpoint(snapshot)
    check_message(caught.value)
    assert caught.value.where == str(snapshot) and caught.value.got == "config.json"
    assert caught.value.hint == f"run: {COMMAND}"


def test_50_truncated_blob(snapshot: Path) -> None:
    blob = (snapshot / SECOND).resolve()
    os.truncate(blob, 2)
    with pytest.raises(CorruptFile) as caught:
        read_checkpoint(snapshot)
    check_message(caught.value)
    assert caught.value.file == str(snapshot / SECOND) and "(2 bytes)" in caught.value.problem
    assert caught.value.hint == f"delete {blob}, then run: {COMMAND}"


def test_50_blob_gone(snapshot: Path) -> None:
    (snapshot / SECOND).resolve().unlink()
    with pytest.raises(wb.errors.CheckpointError) as caught:
        read_checkpoint(snapshot)
    check_message(caught.value)
    assert "broken link" in caught.value.problem and "blobs" in str(caught.value.got)
    assert caught.value.hint == f"run: {COMMAND}"


# memory -------------------------------------------------------------------------------------------------------


def has(monkeypatch: pytest.MonkeyPatch, memory_gb: float, device_gb: float = 0) -> None:
    def available(device: torch.device | str = "cpu") -> int:
        return int(1e9 * (memory_gb if torch.device(device).type == "cpu" else device_gb))

    monkeypatch.setattr(memory, "available", available)


@pytest.mark.parametrize(("memory_gb", "device_gb", "dtype", "device", "no_mmap", "needed", "free", "hint"), [
    # float32 copies the dense tensors, bfloat16 maps them
    (6, 0, "float32", "cpu", "0", "7.2 GB", "6.0 GB", 'dtype="bfloat16" fits: 0.6 MB of memory and 13.8 GB mapped'),
    (64, 12, "bfloat16", "cuda", "0", "13.8 GB", "12.0 GB", 'on device="cpu" fits'),
    (64, 16, "float32", "cuda", "0", "17.4 GB", "16.0 GB", 'dtype="bfloat16" fits: 13.8 GB on the device'),
    (8, 0, "bfloat16", "cpu", "1", "14.2 GB", "8.0 GB", "GPTOSS_NO_MMAP unset fits"),
])
def test_52_memory_too_small(memory_gb: float, device_gb: float, dtype: str, device: str, no_mmap: str, needed: str,
                             free: str, hint: str, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, memory_gb, device_gb)
    monkeypatch.setenv("GPTOSS_NO_MMAP", no_mmap)
    with pytest.raises(NotEnoughMemory) as caught:
        wb.load(bases["20b"], dtype=dtype, device=device)
    error = caught.value
    check_message(error)
    assert error.file == str(bases["20b"]) and device.replace("cpu", "this machine") in error.problem
    assert error.expected == f"{needed} free" and error.got == f"{free} free"
    assert hint in str(error.hint)


def test_52_nothing_fits(bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, 0.0001)
    with pytest.raises(NotEnoughMemory) as caught:
        read_checkpoint(bases["hf-bf16"], torch.float32)
    assert "nothing fits here" in str(caught.value.hint) and "with MXFP4 experts" in str(caught.value.hint)


def test_52_mapped_but_slow(bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, 8)
    with pytest.warns(UserWarning, match=r"13\.8 GB mapped from the files, with 8\.0 GB free"):
        memory.check_memory(plan_checkpoint(bases["20b"]), torch.bfloat16)
    has(monkeypatch, 24)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory.check_memory(plan_checkpoint(bases["20b"]), torch.bfloat16)


def test_what_is_needed_is_said_first(bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch,
                                      capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(model_room, "LARGE", 100_000)
    folder = copied(bases["hf"], tmp_path / "model")
    content("0" * 64 + f"  {SINGLE}\n", "SHA256")(folder)
    with pytest.raises(CorruptFile):  # after the line, before anything is read
        wb.load(folder)
    said = capsys.readouterr().out
    assert "79 tensors in 1 file(s), 0.00 GB; takes" in said and "mapped from the files" in said and "free" in said
