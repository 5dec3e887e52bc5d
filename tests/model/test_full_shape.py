"""The maker of full-shape checkpoints: the published sizes on paper, and small folders of the same making in full."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open

import gptoss_workbench as wb
from gptoss_workbench.model.config import ModelConfig
from gptoss_workbench.model.layouts import Layout, Sizes
from tests.benchmarks import full_shape
from tests.oracle import transformers_model
from tests.tolerances import TINY_LOGITS_F32

SMALL = dict(num_hidden_layers=3, hidden_size=64, intermediate_size=96, num_attention_heads=8, num_key_value_heads=2,
             head_dim=16, num_local_experts=8, vocab_size=512, sliding_window=8, eos_token_id=2, pad_token_id=0)
PUBLISHED = {  # bytes, tensors, files: from the published indices
    "20b": (13_761_264_768, 459, 3, "model-00002-of-00002.safetensors"),
    "120b": (65_248_815_744, 687, 15, "model-00014-of-00014.safetensors"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "small"
    full_shape.make(folder, full_shape.config(**SMALL), seed=1, most=100_000)
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_sizes(model: str) -> None:
    config = full_shape.config(model)
    specs = full_shape.tensors(config)
    files = full_shape.shards(specs)
    nbytes, tensors, count, last = PUBLISHED[model]
    assert (sum(spec.nbytes for spec in specs.values()), len(specs), len(files)) == (nbytes, tensors, count)
    assert list(files)[-1] == last and [name for names in files.values() for name in names] == list(specs)
    assert all(sum(specs[name].nbytes for name in names) <= full_shape.SHARD_BYTES for names in files.values())


@pytest.mark.parametrize("model", PUBLISHED)
def test_names_and_shapes_are_those_the_loader_expects(model: str) -> None:
    config = full_shape.config(model)
    slots = Layout(original=False, packed=True, compact=False).all(Sizes.of(ModelConfig.from_hf(config)))
    specs = full_shape.tensors(config)
    assert {slot.name: (slot.dtypes, slot.shape) for slot in slots} == {
        name: ((spec.dtype,), spec.shape) for name, spec in specs.items()}


def test_the_library_of_the_format_reads_the_files(folder: Path) -> None:
    specs = full_shape.tensors(full_shape.config(**SMALL))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    seen = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                assert index["weight_map"][name] == path.name
                seen[name] = opened.get_tensor(name)
    assert len(index["weight_map"]) == len(specs) and len(set(index["weight_map"].values())) > 3
    assert {name: tuple(tensor.shape) for name, tensor in seen.items()} == {
        name: spec.shape for name, spec in specs.items()}
    assert sum(tensor.nbytes for tensor in seen.values()) == index["metadata"]["total_size"]


def test_values_are_sane(folder: Path) -> None:
    weights = wb.load(folder, dtype="float32").weights
    first = weights.layers[0]
    for name in ("q_weight", "o_weight", "router_weight"):
        matrix = getattr(first, name)
        assert 0.6 < float(matrix.square().mean().sqrt()) * matrix.shape[1] ** 0.5 < 1.6, name
    assert float(first.attn_norm.min()) >= 1 and float(first.attn_norm.max()) < 1.25
    assert len(first.gate_up.scales.unique()) == 4 and len(first.gate_up.blocks.unique()) == 256


def test_it_computes_as_transformers_does_and_stays_finite(folder: Path) -> None:
    ids = torch.randint(512, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    run = wb.load(folder, dtype="float32").run(ids, capture=["resid_post", "mlp.out"])
    with torch.no_grad():
        theirs = transformers_model(folder)(torch.tensor([ids])).logits[0]
    assert (run.logits - theirs).abs().max() < TINY_LOGITS_F32
    assert float(run.tensor("resid_post").abs().max()) < 100
    assert 0.1 < float(run.tensor("mlp.out").std()) < 10  # the layers do something


def test_the_seed_says_everything(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_shape, "BLOCK_BYTES", 4096)  # the size of a block is nobody's business
    full_shape.make(tmp_path / "again", full_shape.config(**SMALL), seed=1, most=100_000)
    full_shape.make(tmp_path / "other", full_shape.config(**SMALL), seed=2, most=100_000)
    again, other = digests(tmp_path / "again"), digests(tmp_path / "other")
    assert again == digests(folder)
    assert {name for name in again if again[name] == other[name]} == {
        "config.json", "generation_config.json", "model.safetensors.index.json"}


def test_fewer_layers_have_the_same_values() -> None:
    """A tensor's values follow from its name: a model of one layer is the beginning of a model of all."""
    name = "model.layers.0.mlp.router.weight"
    one, all_ = (full_shape.tensors(full_shape.config(num_hidden_layers=layers))[name] for layers in (1, 24))
    first, second = (b"".join(full_shape.data(name, spec, seed=0)) for spec in (one, all_))
    assert first == second and len(np.unique(np.frombuffer(first, np.uint16))) > 100


def test_no_room_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=13_000_000_000))
    assert full_shape.main([str(tmp_path / "new")]) == 1
    assert "13,761,317," in (said := capsys.readouterr().err) and "13,000,000,000 are free" in said
    assert list((tmp_path / "new").iterdir()) == []


def test_a_folder_that_holds_something_is_left_alone(folder: Path) -> None:
    before = digests(folder)
    with pytest.raises(OSError, match="not empty") as error:
        full_shape.make(folder, full_shape.config(**SMALL))
    assert error.value.errno == errno.EEXIST and digests(folder) == before


def test_an_interrupted_making_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = full_shape.data

    def breaks(name: str, spec: full_shape.Spec, seed: int):
        if name.startswith("model.layers.1."):
            raise KeyboardInterrupt
        return data(name, spec, seed)

    monkeypatch.setattr(full_shape, "data", breaks)
    with pytest.raises(KeyboardInterrupt):
        full_shape.make(tmp_path / "new", full_shape.config(**SMALL), most=100_000)
    left = [path.name for path in (tmp_path / "new").iterdir()]
    assert left and all(name.endswith(".safetensors") for name in left) and "config.json" not in left
