"""Every layout gives the same model, transformers agrees, and what need not be copied is not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from gptoss_kernels.mxfp4 import Mxfp4Tensor, dequantize
from gptoss_workbench.errors import WorkbenchError
from gptoss_workbench.model.checkpoint import plan_checkpoint, read_checkpoint
from gptoss_workbench.model.config import ModelConfig
from gptoss_workbench.model.weights import Weights
from tests.factories import LAYOUTS, TinyModel, tiny_model, write_hf, write_hf_bf16, write_original

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def plain(weights: Weights) -> dict[str, Tensor]:
    """Every tensor decoded, and the vocabulary matrices with one row a token, for comparison."""
    tensors = {name: dequantize(tensor, weights.embed.dtype) if isinstance(tensor, Mxfp4Tensor) else tensor
               for name, tensor in weights.tensors()}
    rows = tensors.pop("row_of_token", None)
    if rows is not None:
        for name in ("embed", "unembed"):
            tensors[name] = tensors[name][rows]
    return tensors


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name


@pytest.fixture(scope="module")
def tiny() -> TinyModel:
    return tiny_model(seed=7)


@pytest.fixture(scope="module")
def folders(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("layouts")
    return {name: write(base / name, tiny) for name, write in LAYOUTS.items()}


# -- what is read --------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_hold_the_same_model(layout: str, dtype: torch.dtype, folders: dict[str, Path]) -> None:
    config, weights = read_checkpoint(folders[layout], dtype)
    first_config, first = read_checkpoint(folders["hf"], dtype)
    assert_same(plain(weights), plain(first))
    # OpenAI's form names no special ids, and 512 tokens hold none of the published ones.
    assert config == first_config or layout.startswith("original")
    packed = not layout.startswith("hf-bf16")
    for layer in weights.layers:
        assert isinstance(layer.gate_up, Mxfp4Tensor) == isinstance(layer.down, Mxfp4Tensor) == packed
    assert (weights.row_of_token is not None) == (layout == "compact")


@DTYPES
def test_values_shapes_and_dtypes(tiny: TinyModel, folders: dict[str, Path], dtype: torch.dtype) -> None:
    config, weights = read_checkpoint(folders["hf"], dtype)
    assert config == ModelConfig.from_hf(tiny.config)
    d, inner, experts, heads, wide, narrow = 64, 96, 8, 8, 128, 32
    shapes = {
        "attn_norm": (d,), "q_weight": (wide, d), "q_bias": (wide,), "k_weight": (narrow, d),
        "k_bias": (narrow,), "v_weight": (narrow, d), "v_bias": (narrow,), "o_weight": (d, wide),
        "o_bias": (d,), "sinks": (heads,), "mlp_norm": (d,), "router_weight": (experts, d),
        "router_bias": (experts,),
        "gate_up": (experts, 2 * inner, d), "gate_up_bias": (experts, 2 * inner),
        "down": (experts, d, inner), "down_bias": (experts, d),
    }
    assert len(weights.layers) == 4
    for index, layer in enumerate(weights.layers):
        for name, shape in shapes.items():
            assert tuple(getattr(layer, name).shape) == shape, name
        assert layer.attn_norm.dtype == layer.mlp_norm.dtype == torch.float32
        assert layer.q_weight.dtype == layer.sinks.dtype == layer.gate_up_bias.dtype == dtype
        prefix = f"model.layers.{index}."
        assert torch.equal(layer.k_weight, tiny.tensors[prefix + "self_attn.k_proj.weight"].to(dtype))
        assert torch.equal(layer.mlp_norm, tiny.tensors[prefix + "post_attention_layernorm.weight"].float())
        assert isinstance(layer.down, Mxfp4Tensor)
        assert torch.equal(layer.down.blocks, tiny.tensors[prefix + "mlp.experts.down_proj_blocks"])
    assert torch.equal(weights.embed, tiny.tensors["model.embed_tokens.weight"].to(dtype))
    assert torch.equal(weights.unembed, tiny.tensors["lm_head.weight"].to(dtype))
    assert weights.final_norm.dtype == torch.float32


@pytest.mark.parametrize("layout", ["hf", "hf-sharded", "hf-bf16"])
def test_transformers_reads_the_same(layout: str, folders: dict[str, Path]) -> None:
    transformers = pytest.importorskip("transformers")
    unpack = {"quantization_config": transformers.Mxfp4Config(dequantize=True)}
    options = {} if layout == "hf-bf16" else unpack
    theirs, info = transformers.GptOssForCausalLM.from_pretrained(
        folders[layout], dtype=torch.bfloat16, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    _, weights = read_checkpoint(folders[layout], torch.bfloat16)
    ours = plain(weights)
    state = theirs.state_dict()
    for index in range(4):
        prefix = f"model.layers.{index}."
        for field, name in (
            ("attn_norm", "input_layernorm.weight"), ("mlp_norm", "post_attention_layernorm.weight"),
            ("q_weight", "self_attn.q_proj.weight"), ("k_bias", "self_attn.k_proj.bias"),
            ("v_weight", "self_attn.v_proj.weight"), ("o_weight", "self_attn.o_proj.weight"),
            ("o_bias", "self_attn.o_proj.bias"), ("sinks", "self_attn.sinks"),
            ("router_weight", "mlp.router.weight"), ("router_bias", "mlp.router.bias"),
            ("gate_up_bias", "mlp.experts.gate_up_proj_bias"), ("down_bias", "mlp.experts.down_proj_bias"),
        ):
            assert torch.equal(ours[f"layers.{index}.{field}"], state[prefix + name].to(
                ours[f"layers.{index}.{field}"].dtype)), name
        for field, name in (("gate_up", "gate_up_proj"), ("down", "down_proj")):  # theirs are (E, in, out)
            assert torch.equal(ours[f"layers.{index}.{field}"],
                               state[f"{prefix}mlp.experts.{name}"].transpose(1, 2)), name
    assert torch.equal(ours["embed"], state["model.embed_tokens.weight"])
    assert torch.equal(ours["unembed"], state["lm_head.weight"])


def test_what_transformers_saves(tiny: TinyModel, folders: dict[str, Path], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GptOssForCausalLM.from_pretrained(folders["hf-bf16"], dtype=torch.float32)
    theirs.save_pretrained(tmp_path)
    config, weights = read_checkpoint(tmp_path, torch.float32)
    assert config == ModelConfig.from_hf(tiny.config)
    assert_same(plain(weights), plain(read_checkpoint(folders["hf"], torch.float32)[1]))


def test_square_experts_are_told_by_name(tmp_path: Path) -> None:
    square = tiny_model(hidden_size=64, intermediate_size=64, num_hidden_layers=2)
    _, packed = read_checkpoint(write_hf(tmp_path / "packed", square))
    _, dense = read_checkpoint(write_hf_bf16(tmp_path / "dense", square))
    assert_same(plain(packed), plain(dense))
    down = plain(dense)["layers.0.down"]
    assert not torch.equal(down, down.transpose(1, 2))


def test_nothing_is_copied_that_need_not_be(folders: dict[str, Path]) -> None:
    """The packed experts, and in bfloat16 every dense tensor but the norms, stay mapped from the file."""
    file = str(folders["hf"] / "model.safetensors")
    _, weights = read_checkpoint(folders["hf"], torch.bfloat16)
    mapped = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()
              if line.endswith(file)] if os.path.exists("/proc/self/maps") else pytest.skip("needs Linux")
    ranges = [(int(low, 16), int(high, 16)) for low, high in mapped]

    def is_mapped(tensor: Tensor) -> bool:
        return any(low <= tensor.data_ptr() < high for low, high in ranges)

    for layer in weights.layers:
        assert isinstance(layer.gate_up, Mxfp4Tensor)
        assert is_mapped(layer.gate_up.blocks) and is_mapped(layer.q_weight)
        assert not is_mapped(layer.attn_norm)


def test_without_memory_mapping(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    mapped = plain(read_checkpoint(folders["hf-sharded"])[1])
    monkeypatch.setenv("GPTOSS_NO_MMAP", "1")
    assert_same(plain(read_checkpoint(folders["hf-sharded"])[1]), mapped)


def test_hf_is_preferred_and_original_found(tiny: TinyModel, tmp_path: Path) -> None:
    write_original(tmp_path / "original", tiny_model(seed=8))
    assert plan_checkpoint(tmp_path).layout.original  # only this is there
    write_hf(tmp_path, tiny)
    plan = plan_checkpoint(tmp_path)
    assert not plan.layout.original and plan.folder == tmp_path
    assert plan_checkpoint(tmp_path / "original").layout.original


def test_generation_config_says_where_to_stop(tiny: TinyModel, tmp_path: Path) -> None:
    write_hf(tmp_path, tiny)
    assert read_checkpoint(tmp_path)[0].eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert read_checkpoint(tmp_path)[0].eos_token_ids == (2, 5)


def test_links_into_a_cache(folders: dict[str, Path], tmp_path: Path) -> None:
    for file in folders["hf-sharded"].iterdir():
        (tmp_path / file.name).symlink_to(file)
    assert_same(plain(read_checkpoint(tmp_path)[1]), plain(read_checkpoint(folders["hf"])[1]))


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_small_configs_in_every_layout(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    kv_heads, experts = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    small = tiny_model(
        seed=data.draw(st.integers(0, 2**31)),
        num_hidden_layers=data.draw(st.integers(1, 3)),
        hidden_size=32 * data.draw(st.integers(1, 3)), intermediate_size=32 * data.draw(st.integers(1, 3)),
        num_key_value_heads=kv_heads, num_attention_heads=kv_heads * data.draw(st.integers(1, 3)),
        head_dim=2 * data.draw(st.integers(1, 8)),
        num_local_experts=experts, num_experts_per_tok=data.draw(st.integers(1, experts)),
        vocab_size=data.draw(st.integers(4, 70)), sliding_window=data.draw(st.integers(1, 9)),
    )
    base = tmp_path_factory.mktemp("small")
    first = None
    for name, write in LAYOUTS.items():
        config, weights = read_checkpoint(write(base / name, small))
        assert config.num_experts_per_tok == small.config["num_experts_per_tok"]
        first = first or plain(weights)
        assert_same(plain(weights), first)
    shutil.rmtree(base)


def test_headers_agree_with_the_library(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        plan = plan_checkpoint(folder)
        for file in plan.files:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    part = opened.get_slice(name)
                    assert plan.tensors[name][:3] == (file, part.get_dtype(), tuple(part.get_shape()))


def test_other_compute_dtypes(folders: dict[str, Path]) -> None:
    with pytest.raises(WorkbenchError, match="float32 or bfloat16"):
        read_checkpoint(folders["hf"], torch.float16)
