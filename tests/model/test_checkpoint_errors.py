"""Damage beyond the list of ``test_bad_checkpoints``: several at once, relatives of gpt-oss, any byte of a header."""

from __future__ import annotations

import json
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

from gptoss_kernels.mxfp4 import Mxfp4Tensor, dequantize
from gptoss_workbench.errors import CheckpointError, ModelNotFound, WorkbenchError
from gptoss_workbench.model.checkpoint import read_checkpoint
from gptoss_workbench.model.headers import read_header
from gptoss_workbench.model.weights import Weights
from tests.factories import LAYOUTS, TinyModel, tiny_model, write_compact, write_hf

Edit = Callable[[dict[str, Tensor]], object]
SINKS = "model.layers.1.self_attn.sinks"


@pytest.fixture(scope="module")
def tiny() -> TinyModel:
    return tiny_model(seed=7)


@pytest.fixture(scope="module")
def folders(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("layouts")
    return {name: LAYOUTS[name](base / name, tiny) for name in ("hf", "hf-sharded")}


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


def test_missing_layer_is_a_matter_of_the_configuration(hf: Path) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.3.")]:
            del tensors[name]

    error = refusal(rewritten(hf, drop))
    assert error.expected == "num_hidden_layers = 3" and error.got == "num_hidden_layers = 4"


def test_wrong_number_of_layers_with_damage_besides(hf: Path) -> None:
    reconfigured(hf, num_hidden_layers=10_000, layer_types=None)
    error = refusal(rewritten(hf, lambda tensors: tensors.pop(SINKS)))
    assert "missing" in error.problem


def test_tensors_of_two_layouts(hf: Path) -> None:
    error = refusal(rewritten(hf, lambda tensors: tensors.update({"embedding.weight": torch.zeros(1)})))
    assert "mixes two" in error.problem and "embedding.weight" in error.got


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


def test_what_transformers_saves_after_unpacking(hf: Path, tmp_path: Path) -> None:
    """In some versions dense matrices keep the names of the packed ones, and load nowhere."""
    transformers = pytest.importorskip("transformers")
    unpack = transformers.Mxfp4Config(dequantize=True)
    theirs = transformers.GptOssForCausalLM.from_pretrained(hf, quantization_config=unpack, dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "saved")
    if "model.layers.0.mlp.experts.down_proj" in load_file(tmp_path / "saved" / "model.safetensors"):
        pytest.skip("this version saves what it should")
    error = refusal(tmp_path / "saved")
    assert error.problem == "packed experts without any scales" and error.tensor.endswith("_blocks")
    assert "dequantize=True" in error.got

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_blocks")]:
            tensors[name.removesuffix("_blocks")] = tensors.pop(name)

    _, mended = read_checkpoint(rewritten(tmp_path / "saved", rename))
    _, good = read_checkpoint(hf)
    down = good.layers[0].down
    assert isinstance(down, Mxfp4Tensor) and torch.equal(mended.layers[0].down, dequantize(down, torch.float32))


@pytest.mark.parametrize("names", [[], ["bert.embeddings"], ["model.norm.weight"]])
def test_weights_of_something_else(tmp_path: Path, names: list[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "model.safetensors")
    assert "not the weights of a gpt-oss model" in refusal(tmp_path).problem


@pytest.mark.parametrize("rows", [torch.full((512,), 385), torch.full((512,), -1)])
@pytest.mark.parametrize("check_values", [True, False])
def test_row_of_token_out_of_range(tiny: TinyModel, tmp_path: Path, rows: Tensor, check_values: bool) -> None:
    folder = write_compact(tmp_path, tiny)
    rewritten(folder, lambda tensors: tensors.update({"row_of_token": rows}))
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(folder, check_values=check_values)
    assert caught.value.tensor == "row_of_token" and "0 to 384" in str(caught.value.expected)


def test_compact_rows_that_differ_in_number(tiny: TinyModel, tmp_path: Path) -> None:
    folder = write_compact(tmp_path, tiny)
    rewritten(folder, lambda t: t.update({"lm_head.rows": t["lm_head.rows"][:-1].clone()}))
    assert refusal(folder).tensor == "lm_head.rows"
    rewritten(folder, lambda t: t.pop("model.embed_tokens.rows"))
    assert refusal(folder).tensor == "model.embed_tokens.rows"


def test_two_checkpoints_in_one_folder(sharded: Path, folders: dict[str, Path]) -> None:
    shutil.copy(folders["hf"] / "model.safetensors", sharded)
    assert "two checkpoints" in refusal(sharded).problem


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


def test_no_checkpoint(tmp_path: Path) -> None:
    error = refusal(tmp_path, ModelNotFound)
    assert "model.safetensors" in error.expected and error.got == "an empty folder"
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    (tmp_path / "config.json").write_text("{}")
    assert refusal(tmp_path, ModelNotFound).got == "config.json, pytorch_model.bin"
    assert "no such folder" in refusal(tmp_path / "nowhere", ModelNotFound).problem
    assert "no such folder" in refusal(tmp_path / "config.json", ModelNotFound).problem


def test_folder_with_a_name_of_two_lines(tiny: TinyModel, tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "a\nb", tiny)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(folder)
    assert len(str(caught.value).splitlines()) <= 6 and r"a\nb" in str(caught.value)
    assert caught.value.file == str(folder / "config.json")


def test_widths_that_mxfp4_cannot_hold(tiny: TinyModel, tmp_path: Path) -> None:
    odd = tiny_model(intermediate_size=96)
    odd.tensors.update({name: tensor[:, :190].contiguous() for name, tensor in odd.tensors.items()
                        if "gate_up_proj" in name})
    odd.config["intermediate_size"] = 95
    error = refusal(write_hf(tmp_path, odd))
    assert error.expected == "hidden_size and intermediate_size to be multiples of 32"


def test_values_are_looked_through_unless_told_otherwise(hf: Path) -> None:
    rewritten(hf, lambda tensors: tensors["model.norm.weight"].fill_(float("inf")))
    assert "64 values are NaN or infinite" in refusal(hf).problem
    assert read_checkpoint(hf, check_values=False)[1].final_norm.isinf().all()


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


@settings(max_examples=200, deadline=None)
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
