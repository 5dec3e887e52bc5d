"""The table of published configurations, against what the two published forms say and what the embedded model has."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest

from gptoss_workbench.errors import ModifiedConfig
from gptoss_workbench.model import model as model_room
from gptoss_workbench.model.config import ModelConfig
from gptoss_workbench.model.published import CONSTANTS, PUBLISHED, SIZES, check_published, differences, published_name
from tests.model.bad_checkpoints.case import published, published_original


@pytest.mark.parametrize(("name", "layers", "experts"), [("gpt-oss-20b", 24, 32), ("gpt-oss-120b", 36, 128)])
def test_both_published_forms(name: str, layers: int, experts: int) -> None:
    assert ModelConfig.from_hf(published(layers, experts)) == PUBLISHED[name]
    assert ModelConfig.from_original(published_original(layers, experts)) == PUBLISHED[name]


def test_transformers_has_the_same_defaults() -> None:
    """GptOssConfig without arguments is the 120b."""
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.GptOssConfig(), PUBLISHED["gpt-oss-120b"]
    for field in ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
                  "num_local_experts", "num_experts_per_tok", "intermediate_size", "vocab_size", "sliding_window",
                  "rms_norm_eps", "max_position_embeddings", "swiglu_limit"):
        assert getattr(theirs, field, getattr(ours, field)) == getattr(ours, field), field
    assert tuple(theirs.layer_types) == ours.layer_types


def test_the_embedded_model() -> None:
    config = ModelConfig.from_hf(json.loads((model_room.EMBEDDED / "config.json").read_text()))
    assert published_name(config) == "the embedded model"
    assert differences(config) == {}


def test_every_field_is_a_size_a_constant_or_without_effect() -> None:
    rest = {field.name for field in fields(ModelConfig)} - set(SIZES) - set(CONSTANTS)
    assert rest == {"max_position_embeddings", "eos_token_ids", "pad_token_id"}


@pytest.mark.parametrize("field", [*CONSTANTS, "eos_token_ids"])
def test_each_constant_is_compared(field: str) -> None:
    good = PUBLISHED["gpt-oss-20b"]
    value = getattr(good, field)
    other = {bool: lambda: not value, int: lambda: value + 1, float: lambda: value * 1.001,
             tuple: lambda: (*value[:-1], value[0] if field == "layer_types" else 5)}[type(value)]()
    changed = replace(good, **{field: other})
    assert list(differences(changed)) == [field]
    with pytest.raises(ModifiedConfig) as caught:
        check_published(changed, "folder/config.json")
    assert field in str(caught.value.expected) and field in str(caught.value.got)
    assert caught.value.file == "folder/config.json" and len(str(caught.value).splitlines()) <= 6


def test_other_sizes_are_nobodys() -> None:
    changed = replace(PUBLISHED["gpt-oss-20b"], num_local_experts=33, sliding_window=7)
    assert published_name(changed) is None and differences(changed) == {}
    check_published(changed, "config.json")


def test_what_has_no_effect_may_differ() -> None:
    good = PUBLISHED["gpt-oss-20b"]
    check_published(replace(good, pad_token_id=200017, eos_token_ids=(200002, 199999, 200012),
                            max_position_embeddings=4096), "config.json")
