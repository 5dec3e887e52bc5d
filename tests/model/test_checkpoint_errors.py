"""Each kind of damage to a checkpoint gets one clear error that names the place; none loads silently."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptoss_workbench.errors import CheckpointError, ModelNotFound, WorkbenchError
from gptoss_workbench.model.checkpoint import read_checkpoint
from gptoss_workbench.model.files import read_header
from gptoss_workbench.model.weights import Weights
from tests.factories import LAYOUTS, TinyModel, tiny_model, write_compact, write_hf, write_hf_bf16

Edit = Callable[[dict[str, Tensor]], object]


@pytest.fixture(scope="module")
def tiny() -> TinyModel:
    return tiny_model(seed=7)


@pytest.fixture(scope="module")
def folders(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("layouts")
    return {name: LAYOUTS[name](base / name, tiny) for name in ("hf", "hf-sharded", "original-sharded")}


def refusal(folder: Path, kind: type[WorkbenchError] = CheckpointError) -> Any:
    """The error that reading a folder raises, checked for the manners that every error has."""
    with pytest.raises(kind) as caught:
        read_checkpoint(folder)
    error = caught.value
    assert len(str(error).splitlines()) <= 6, str(error)
    assert str(folder) in str(error)
    return error


def rewritten(folder: Path, edit: Edit, file: str = "model.safetensors") -> Path:
    """Change the tensors of one file in place."""
    tensors = load_file(folder / file)
    edit(tensors)
    save_file(tensors, folder / file)
    return folder


def reconfigured(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.fixture
def hf(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["hf"], tmp_path / "hf"))


@pytest.fixture
def sharded(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["hf-sharded"], tmp_path / "sharded"))


SINKS = "model.layers.1.self_attn.sinks"
BLOCKS = "model.layers.2.mlp.experts.down_proj_blocks"
QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("name", [SINKS, BLOCKS, "lm_head.weight", "model.layers.3.mlp.router.bias"])
def test_missing_tensor(hf: Path, name: str) -> None:
    error = refusal(rewritten(hf, lambda tensors: tensors.pop(name)))
    assert error.tensor == name and "missing" in error.problem and error.hint
    assert error.got == "no such tensor"


def test_missing_layer_is_a_matter_of_the_configuration(hf: Path) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.3.")]:
            del tensors[name]

    error = refusal(rewritten(hf, drop))
    assert error.expected == "num_hidden_layers = 3" and error.got == "num_hidden_layers = 4"


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_norm.weight", "model.layers.9.self_attn.sinks",
                                  "../../etc/passwd", "<script>alert(1)</script>", "x" * 5000, "a\nb\0c"])
def test_unexpected_tensor(hf: Path, name: str) -> None:
    error = refusal(rewritten(hf, lambda tensors: tensors.update({name: torch.zeros(2)})))
    assert error.file == str(hf / "model.safetensors") and error.got == "1 more"
    assert error.tensor[:70] == name.replace("\n", "\\n").replace("\0", "\\x00")[:70]
    assert len(error.tensor) <= 80


@pytest.mark.parametrize(("name", "wrong"), [
    (SINKS, torch.zeros(1, dtype=torch.bfloat16)),
    (SINKS, torch.zeros(5, dtype=torch.bfloat16)),
    (QUERY, torch.zeros(64, 128, dtype=torch.bfloat16)),
    (BLOCKS, torch.zeros(8, 64, 3, 15, dtype=torch.uint8)),
    ("lm_head.weight", torch.zeros(0, 64, dtype=torch.bfloat16)),
    ("model.layers.0.self_attn.sinks", torch.zeros((), dtype=torch.bfloat16)),
    ("model.norm.weight", torch.zeros(65, dtype=torch.bfloat16)),
    ("model.layers.0.self_attn.o_proj.weight", torch.zeros(64, 0, dtype=torch.bfloat16)),
])
def test_wrong_shape(hf: Path, tiny: TinyModel, name: str, wrong: Tensor) -> None:
    error = refusal(rewritten(hf, lambda tensors: tensors.update({name: wrong})))
    assert error.tensor == name and error.file == str(hf / "model.safetensors")
    assert error.expected == list(tiny.tensors[name].shape) and error.got == list(wrong.shape)


@pytest.mark.parametrize(("name", "dtype", "expected", "got"), [
    (SINKS, torch.int64, "BF16", "I64"), (SINKS, torch.float16, "BF16", "F16"),
    (QUERY, torch.float32, "BF16", "F32"), (BLOCKS, torch.int8, "U8", "I8"),
    (BLOCKS, torch.float16, "U8", "F16"),
])
def test_wrong_dtype(hf: Path, name: str, dtype: torch.dtype, expected: str, got: str) -> None:
    error = refusal(rewritten(hf, lambda tensors: tensors.update({name: tensors[name].to(dtype)})))
    assert (error.tensor, error.expected, error.got) == (name, expected, got)


def test_unpacked_experts_stored_the_packed_way_round(tiny: TinyModel, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    folder = write_hf_bf16(tmp_path, tiny)
    rewritten(folder, lambda t: t.update({name: t[name].transpose(1, 2).contiguous()}))
    error = refusal(folder)
    assert (error.tensor, error.expected, error.got) == (name, [8, 96, 64], [8, 64, 96])


@pytest.mark.parametrize(("changes", "expected", "got"), [
    ({"num_local_experts": 16}, "num_local_experts = 8", "num_local_experts = 16"),
    ({"head_dim": 32}, "head_dim = 16", "head_dim = 32"),
    ({"intermediate_size": 64}, "intermediate_size = 96", "intermediate_size = 64"),
    ({"num_key_value_heads": 4}, "num_key_value_heads = 2", "num_key_value_heads = 4"),
    ({"num_attention_heads": 16, "head_dim": 8}, "num_attention_heads = 8, head_dim = 16",
     "num_attention_heads = 16, head_dim = 8"),
    ({"num_hidden_layers": 9999, "layer_types": None}, "num_hidden_layers = 4", "num_hidden_layers = 9999"),
    ({"vocab_size": 513}, "vocab_size = 512", "vocab_size = 513"),
])
@pytest.mark.parametrize("layout", ["hf", "original", "compact"])
def test_configuration_of_another_model(tmp_path: Path, layout: str, changes: dict[str, Any], expected: str,
                                        got: str) -> None:
    folder = LAYOUTS[layout](tmp_path, tiny_model())
    if layout == "original":
        changes = {key.replace("num_local_experts", "num_experts"): changes[key] for key in changes}
    error = refusal(reconfigured(folder, **changes))
    assert error.file == str(folder / "config.json")
    assert "config.json does not describe" in error.problem
    assert (error.expected, error.got) == (expected, got)


def test_wrong_number_of_layers_with_damage_besides(hf: Path) -> None:
    reconfigured(hf, num_hidden_layers=10_000, layer_types=None)
    error = refusal(rewritten(hf, lambda tensors: tensors.pop(SINKS)))
    assert "missing" in error.problem


def test_a_file_of_the_wrong_kind_of_experts(hf: Path, tiny: TinyModel) -> None:
    dense = torch.zeros(8, 96, 64, dtype=torch.bfloat16)
    rewritten(hf, lambda tensors: tensors.update({"model.layers.0.mlp.experts.down_proj": dense}))
    error = refusal(hf)
    assert "mixes two" in error.problem and "down_proj" in error.got
    error = refusal(rewritten(hf, lambda tensors: tensors.update({"embedding.weight": dense})))
    assert "mixes two" in error.problem


@pytest.mark.parametrize(("name", "what"), [
    ("base_model.model.layers.0.lora_A.weight", "LoRA"),
    ("model.layers.0.mlp.experts.gate_up_projs.0.weight", "bitsandbytes"),
    ("model.layers.0.mlp.experts.gate_proj.weight", "MLX"),
    ("model.layers.0.self_attn.q_proj.weight_scale", "fp8"),
])
def test_relatives_are_named(tmp_path: Path, name: str, what: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({name: torch.zeros(2)}, tmp_path / "model.safetensors")
    assert what in refusal(tmp_path).got


@pytest.mark.parametrize("names", [[], ["bert.embeddings"], ["model.norm.weight"]])
def test_weights_of_something_else(tmp_path: Path, names: list[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "model.safetensors")
    assert "not the weights of a gpt-oss model" in refusal(tmp_path).problem


@pytest.mark.parametrize("rows", [torch.full((512,), 385), torch.full((512,), -1)])
def test_row_of_token_out_of_range(tiny: TinyModel, tmp_path: Path, rows: Tensor) -> None:
    folder = write_compact(tmp_path, tiny)
    error = refusal(rewritten(folder, lambda tensors: tensors.update({"row_of_token": rows})))
    assert error.tensor == "row_of_token" and "0 to 384" in error.expected


def test_compact_rows_that_differ_in_number(tiny: TinyModel, tmp_path: Path) -> None:
    folder = write_compact(tmp_path, tiny)
    rewritten(folder, lambda t: t.update({"lm_head.rows": t["lm_head.rows"][:-1].clone()}))
    assert refusal(folder).tensor == "lm_head.rows"
    rewritten(folder, lambda t: t.pop("model.embed_tokens.rows"))
    assert refusal(folder).tensor == "model.embed_tokens.rows"


# -- the index -----------------------------------------------------------------------------------------------

INDEX = "model.safetensors.index.json"
FIRST, LAST = "model-00000-of-00002.safetensors", "model-00002-of-00002.safetensors"


def reindexed(folder: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    path = folder / INDEX
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))
    return folder


def test_missing_shards_are_counted(sharded: Path) -> None:
    (sharded / FIRST).unlink()
    (sharded / LAST).unlink()
    error = refusal(sharded)
    assert error.problem.startswith("2 of 3 files") and FIRST in error.expected and LAST in error.expected
    assert error.file == str(sharded / INDEX)


def test_index_names_a_tensor_that_its_shard_lacks(sharded: Path) -> None:
    error = refusal(reindexed(sharded, lambda weight_map: weight_map.update({"ghost.weight": LAST})))
    assert error.tensor == "ghost.weight" and error.file == str(sharded / LAST)


def test_shard_holds_a_tensor_that_the_index_lacks(sharded: Path) -> None:
    error = refusal(reindexed(sharded, lambda weight_map: weight_map.pop("lm_head.weight")))
    assert error.tensor == "lm_head.weight" and error.file == str(sharded / LAST)
    assert error.got == "the index has no entry"


def test_index_names_the_wrong_shard(sharded: Path) -> None:
    error = refusal(reindexed(sharded, lambda weight_map: weight_map.update({"lm_head.weight": FIRST})))
    assert error.tensor == "lm_head.weight" and LAST in error.file and FIRST in error.got


def test_tensor_in_two_shards(sharded: Path) -> None:
    extra = load_file(sharded / LAST)["lm_head.weight"]
    error = refusal(rewritten(sharded, lambda tensors: tensors.update({"lm_head.weight": extra}), FIRST))
    assert error.tensor == "lm_head.weight" and error.file == str(sharded / FIRST)


def test_tensor_in_two_files_without_an_index(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["original-sharded"], tmp_path / "original"))
    one, other = sorted(folder.glob("*.safetensors"))
    extra = load_file(other)["norm.scale"]
    error = refusal(rewritten(folder, lambda tensors: tensors.update({"norm.scale": extra}), one.name))
    assert error.tensor == "norm.scale" and error.file == str(other) and one.name in error.got


@pytest.mark.parametrize("shard", ["/etc/passwd.safetensors", "../x.safetensors", "a/b.safetensors", "", ".",
                                   "..", "C:\\x.safetensors", "x\0.safetensors", "weights.bin", ["x"], 3,
                                   None])
def test_index_points_outside(sharded: Path, shard: object) -> None:
    error = refusal(reindexed(sharded, lambda weight_map: weight_map.update({"lm_head.weight": shard})))
    assert "outside the checkpoint folder" in error.problem and error.tensor == "lm_head.weight"


@pytest.mark.parametrize("text", ["", "not json", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}',
                                  '{"weight_map": {"a": "b", "a": "c"}}', '{"x": NaN}', "[" * 200_000,
                                  "\xff\xfe"])
def test_index_that_is_no_index(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_bytes(text.encode("latin-1"))
    assert refusal(sharded).file == str(sharded / INDEX)


def test_file_not_in_the_index(sharded: Path) -> None:
    save_file({"stray": torch.zeros(1)}, sharded / "adapter.safetensors")
    with pytest.warns(UserWarning, match=r"not read: adapter\.safetensors"):
        read_checkpoint(sharded)


def test_two_checkpoints_in_one_folder(sharded: Path, folders: dict[str, Path]) -> None:
    shutil.copy(folders["hf"] / "model.safetensors", sharded)
    assert "two checkpoints" in refusal(sharded).problem


# -- files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("content", "says"), [
    (b"", "0 bytes"),
    (b"\x08\0\0\0\0\0\0", "7 bytes"),
    (b"\xff\0\0\0\0\0\0\0{}", "header would be 255"),
    ((2**62).to_bytes(8, "little") + b"{}", "header would be"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
    (b"<!doctype html><html></html>", "HTML"),
    (b"GGUF\x03\0\0\0", "GGUF"),
    (b"PK\x03\x04rest of a zip", "zip"),
    (b"\x80\x04}q\0.", "pickle"),
    (b"\x02\0\0\0\0\0\0\0[]", "[]"),
    (b"\x03\0\0\0\0\0\0\0 {}", " {}"),
    (b"\x02\0\0\0\0\0\0\0{x", "Expecting"),
    (b"\x03\0\0\0\0\0\0\0{\xff}", "utf-8"),
])
def test_file_that_is_no_safetensors(hf: Path, content: bytes, says: str) -> None:
    (hf / "model.safetensors").write_bytes(content)
    error = refusal(hf)
    assert error.file == str(hf / "model.safetensors") and says in error.got


def headed(folder: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """Change the header of the file; an edit that returns bytes replaces it."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:8 + length])
    result = edit(header)
    new = result if isinstance(result, bytes) else json.dumps(header).encode()
    new += b" " * (-len(new) % 8)
    path.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + length:])
    return folder


def edited(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda header: header[SINKS].update(changes)


@pytest.mark.parametrize("edit", [
    edited(shape=[-8]), edited(shape=[8.0]), edited(shape=None), edited(data_offsets=[8]),
    edited(data_offsets=[8, 0]), edited(data_offsets=None), edited(dtype=3), edited(shape=[4]),
    edited(shape=[2**62, 2**62]), lambda header: header.update({SINKS: []}),
])
def test_header_with_a_bad_entry(hf: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    error = refusal(headed(hf, edit))
    assert error.tensor == SINKS and error.file == str(hf / "model.safetensors")


@pytest.mark.parametrize("edit", [
    edited(dtype="BF17"),
    edited(data_offsets=[0, 16]),  # on top of another tensor
    lambda header: header.pop(SINKS) and None,  # a hole in its place
    lambda header: header.update({"__metadata__": {"format": 1}}),
    lambda header: header.update({"__metadata__": []}),
    lambda header: b"[" * 100_000,
    lambda header: json.dumps(header).encode()[:-1] + b', "lm_head.weight": 0}',
])
def test_header_that_is_not_sound(hf: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    assert refusal(headed(hf, edit)).file == str(hf / "model.safetensors")


def test_header_length_that_looks_like_another_format(tmp_path: Path) -> None:
    """640 in little-endian bytes is how a pickle begins."""
    path = tmp_path / "model.safetensors"
    for length in range(700):
        save_file({"x": torch.zeros(1)}, path, {"pad": "x" * length})
        if path.read_bytes()[:2] == b"\x80\x02":
            break
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert list(read_header(path)) == ["x"]


def test_hidden_files_are_passed_over(hf: Path) -> None:
    (hf / "model.safetensors").rename(hf / "weights.safetensors")
    (hf / "._weights.safetensors").write_bytes(b"what macOS leaves behind")
    read_checkpoint(hf)


def test_empty_metadata_is_fine(hf: Path) -> None:
    read_checkpoint(headed(hf, lambda header: header.update({"__metadata__": {}})))


@pytest.mark.parametrize("by", [1, 100, 10_000])
def test_file_cut_short(hf: Path, by: int) -> None:
    path = hf / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - by)
    error = refusal(hf)
    assert error.expected == f"{size} bytes" and error.got == f"{size - by} bytes"
    assert "download" in error.hint


def test_file_with_more_at_its_end(hf: Path) -> None:
    with (hf / "model.safetensors").open("ab") as file:
        file.write(b"more")
    assert "follow the last tensor" in refusal(hf).problem


def test_named_pipe_does_not_hang(hf: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (hf / name).unlink()
        os.mkfifo(hf / name)
        error = refusal(hf)
        assert error.problem == "not a regular file" and error.got.startswith("p")


def test_other_things_that_are_no_files(hf: Path, tmp_path: Path) -> None:
    path = hf / "model.safetensors"
    path.unlink()
    path.mkdir()
    assert refusal(hf).problem == "not a regular file"
    path.rmdir()
    path.symlink_to("/dev/zero")
    assert refusal(hf).problem == "not a regular file"
    path.unlink()
    path.symlink_to(tmp_path / "gone")
    error = refusal(hf)
    assert "leads nowhere" in error.problem and str(tmp_path / "gone") in error.got


# -- folder and configuration --------------------------------------------------------------------------------


def test_no_checkpoint(tmp_path: Path) -> None:
    error = refusal(tmp_path, ModelNotFound)
    assert "model.safetensors" in error.expected and error.got == "an empty folder"
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    (tmp_path / "config.json").write_text("{}")
    assert refusal(tmp_path, ModelNotFound).got == "config.json, pytorch_model.bin"
    assert "no such folder" in refusal(tmp_path / "nowhere", ModelNotFound).problem
    assert "no such folder" in refusal(tmp_path / "config.json", ModelNotFound).problem


def test_configuration_missing_or_broken(hf: Path) -> None:
    path = hf / "config.json"
    for text in ("", "[]", "{", '{"hidden_size": NaN}', '{"a": 1, "a": 2}'):
        path.write_text(text)
        assert refusal(hf).file == str(path)
    path.unlink()
    error = refusal(hf)
    assert error.file == str(path) and "missing" in error.problem


def test_configuration_of_another_architecture(hf: Path) -> None:
    error = refusal(reconfigured(hf, model_type="llama"))
    assert "model_type" in error.problem and error.got == "'llama'"


def test_broken_generation_config(hf: Path) -> None:
    (hf / "generation_config.json").write_text('{"eos_token_id": "end"}')
    error = refusal(hf)
    assert error.file == str(hf / "generation_config.json") and "eos_token_id" in error.problem


def test_widths_that_mxfp4_cannot_hold(tiny: TinyModel, tmp_path: Path) -> None:
    odd = tiny_model(intermediate_size=96)
    odd.tensors.update({name: tensor[:, :190].contiguous() for name, tensor in odd.tensors.items()
                        if "gate_up_proj" in name})
    odd.config["intermediate_size"] = 95
    error = refusal(write_hf(tmp_path, odd))
    assert error.expected == "hidden_size and intermediate_size to be multiples of 32"


# -- random damage -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smallest(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    small = tiny_model(num_hidden_layers=1, hidden_size=32, intermediate_size=32, num_attention_heads=2,
                       num_key_value_heads=1, head_dim=2, num_local_experts=1, num_experts_per_tok=1,
                       vocab_size=4)
    folder = write_hf(tmp_path_factory.mktemp("fuzz"), small)
    return folder, (folder / "model.safetensors").read_bytes()


def parts(weights: Weights) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for name, tensor in weights.tensors():
        both = (tensor,) if isinstance(tensor, Tensor) else (tensor.blocks, tensor.scales)
        tensors[name] = [part.tolist() for part in both]
    return tensors


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_no_damage_to_the_header_loads_silently(data: st.DataObject, smallest: tuple[Path, bytes]) -> None:
    """Any change of header bytes is refused with a clear error, or changes nothing that is read."""
    folder, good = smallest
    length = int.from_bytes(good[:8], "little")
    at = data.draw(st.integers(0, 7 + length))
    new = data.draw(st.sampled_from([b"", b"0", b"9", b'"', b"}", b"\xff", b"\0"]) | st.binary(max_size=3))
    path = folder / "model.safetensors"
    path.write_bytes(good)
    before = parts(read_checkpoint(folder)[1])
    path.unlink()  # a fresh file: the old one is still mapped
    path.write_bytes(good[:at] + new + good[at + 1:])
    try:
        after = parts(read_checkpoint(folder)[1])
    except CheckpointError as error:
        assert error.file is not None and error.file.startswith(str(folder))
        assert len(str(error).splitlines()) <= 6
    else:
        assert after == before
    finally:
        path.unlink()
