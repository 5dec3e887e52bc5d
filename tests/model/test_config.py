"""Both forms of config.json, against transformers and each other; and what is refused."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given as anything
from hypothesis import strategies as st

from gptoss_workbench.errors import CheckpointError
from gptoss_workbench.model.config import ModelConfig

# OpenAI's published original/config.json of the 20b, and the Hugging Face form of the same.
ORIGINAL_20B: dict[str, Any] = {
    "num_hidden_layers": 24, "num_experts": 32, "experts_per_token": 4, "vocab_size": 201088,
    "hidden_size": 2880, "intermediate_size": 2880, "swiglu_limit": 7.0, "head_dim": 64,
    "num_attention_heads": 64, "num_key_value_heads": 8, "sliding_window": 128,
    "initial_context_length": 4096, "rope_theta": 150000, "rope_scaling_factor": 32.0,
    "rope_ntk_alpha": 1, "rope_ntk_beta": 32,
}
HF_20B: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
    "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu",
    "hidden_size": 2880, "initial_context_length": 4096, "initializer_range": 0.02,
    "intermediate_size": 2880, "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 64,
    "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32,
    "output_router_logits": False, "pad_token_id": 199999, "rms_norm_eps": 1e-5, "rope_theta": 150000,
    "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn",
                     "original_max_position_embeddings": 4096, "truncate": False},
    "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False,
    "use_cache": True, "vocab_size": 201088,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
}


def changed(base: dict[str, Any], **values: Any) -> dict[str, Any]:
    """A copy with some keys set; a value of ... takes the key out."""
    return {key: value for key, value in {**base, **values}.items() if value is not ...}


def test_published_forms_agree() -> None:
    config = ModelConfig.from_hf(HF_20B)
    assert config == ModelConfig.from_original(ORIGINAL_20B)
    assert config.bands == ("sliding", "full") * 12
    assert config.max_position_embeddings == 131072
    assert config.rope_truncate is False
    assert (config.eos_token_ids, config.pad_token_id) == ((200002,), 199999)
    assert (config.rms_norm_eps, config.swiglu_limit, config.swiglu_alpha) == (1e-5, 7.0, 1.702)


def test_truncate_left_out_means_true() -> None:
    rope = {key: value for key, value in HF_20B["rope_scaling"].items() if key != "truncate"}
    assert ModelConfig.from_hf(changed(HF_20B, rope_scaling=rope)).rope_truncate is True


def test_rope_parameters_of_transformers_5() -> None:
    rope = {**HF_20B["rope_scaling"], "rope_theta": 150000}
    config = ModelConfig.from_hf(changed(HF_20B, rope_scaling=..., rope_theta=..., rope_parameters=rope))
    assert config == ModelConfig.from_hf(HF_20B)


def test_what_transformers_writes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    given = deepcopy(changed(HF_20B, quantization_config=..., layer_types=...))  # it writes into it
    theirs = transformers.GptOssConfig(**given)
    theirs.save_pretrained(tmp_path)
    config = ModelConfig.from_hf(json.loads((tmp_path / "config.json").read_text()))
    assert config == ModelConfig.from_hf(HF_20B)
    assert config.layer_types == tuple(theirs.layer_types)


def test_defaults_and_other_spellings() -> None:
    few = changed(HF_20B, layer_types=..., num_local_experts=..., num_experts=32, num_experts_per_tok=...,
                  max_position_embeddings=..., swiglu_limit=..., rms_norm_eps=..., never_heard_of=[1])
    assert ModelConfig.from_hf(few) == ModelConfig.from_hf(HF_20B)
    several = ModelConfig.from_hf(changed(HF_20B, eos_token_id=[200002, 200012], pad_token_id=None))
    assert (several.eos_token_ids, several.pad_token_id) == ((200002, 200012), None)


def test_special_ids_outside_a_small_vocabulary() -> None:
    config = ModelConfig.from_original(changed(ORIGINAL_20B, vocab_size=512))
    assert (config.eos_token_ids, config.pad_token_id) == ((), None)


REQUIRED = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads",
            "head_dim", "num_local_experts", "intermediate_size", "vocab_size", "sliding_window",
            "rope_theta", "rope_scaling")


@pytest.mark.parametrize("key", REQUIRED)
def test_missing_key_is_named(key: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_hf(changed(HF_20B, **{key: ...}), "folder/config.json")
    assert key in caught.value.problem
    assert caught.value.file == "folder/config.json"
    assert caught.value.hint
    assert len(str(caught.value).splitlines()) <= 6


@pytest.mark.parametrize("key", [key for key in ORIGINAL_20B if key not in
                                 ("swiglu_limit", "rope_ntk_alpha", "rope_ntk_beta")])
def test_missing_original_key_is_named(key: str) -> None:
    with pytest.raises(CheckpointError, match=f"lacks {key}"):
        ModelConfig.from_original(changed(ORIGINAL_20B, **{key: ...}))


def rope(**values: Any) -> dict[str, Any]:
    return {"rope_scaling": changed(HF_20B["rope_scaling"], **values)}


@pytest.mark.parametrize(("change", "named"), [
    ({"model_type": "llama"}, "model_type"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ({"attention_bias": False}, "attention_bias"),
    ({"hidden_size": "2880"}, "hidden_size"),
    ({"hidden_size": 2880.0}, "hidden_size"),
    ({"hidden_size": True}, "hidden_size"),
    ({"hidden_size": 0}, "hidden_size"),
    ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
    ({"vocab_size": 10**400}, "vocab_size"),
    ({"sliding_window": None}, "sliding_window"),
    ({"rms_norm_eps": 0}, "rms_norm_eps"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"swiglu_limit": float("inf")}, "swiglu_limit"),
    ({"layer_types": ["sliding_attention"] * 23}, "layer_types"),
    ({"layer_types": ["linear_attention"] * 24}, "layer_types"),
    ({"layer_types": "sliding_attention"}, "layer_types"),
    ({"layer_types": [["full_attention"]] * 24}, "layer_types"),
    ({"eos_token_id": "200002"}, "eos_token_id"),
    ({"eos_token_id": [-1]}, "eos_token_id"),
    ({"rope_scaling": []}, "rope_scaling"),
    (rope(rope_type="linear"), "rope_scaling.rope_type"),
    (rope(rope_type=...), "rope_scaling.rope_type"),
    (rope(factor=...), "rope_scaling.factor"),
    (rope(factor=-1), "rope_scaling.factor"),
    (rope(truncate="no"), "rope_scaling.truncate"),
    (rope(attention_factor=2.0), "rope_scaling.attention_factor"),
    (rope(mscale=1.0), "rope_scaling.mscale"),
    ({"num_key_value_heads": 7}, "query heads"),
    ({"head_dim": 63}, "rotary"),
    ({"num_experts_per_tok": 33}, "more experts"),
    (rope(factor=0.5), "rotary settings"),
])
def test_bad_value_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_hf({**HF_20B, **change})
    assert named in caught.value.problem
    assert caught.value.file == "config.json"
    assert caught.value.expected is not None
    assert len(str(caught.value).splitlines()) <= 6


@pytest.mark.parametrize("data", [[], "text", None, 3])
def test_not_an_object(data: Any) -> None:
    for read in (ModelConfig.from_hf, ModelConfig.from_original):
        with pytest.raises(CheckpointError, match="JSON object"):
            read(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)


@anything(st.sampled_from(sorted(HF_20B)), st.sampled_from(sorted(HF_20B["rope_scaling"])), JSON)
def test_any_value_reads_or_is_refused_clearly(key: str, rope_key: str, value: Any) -> None:
    for data in ({**HF_20B, key: value}, {**HF_20B, **rope(**{rope_key: value})}):
        try:
            config = ModelConfig.from_hf(data)
        except CheckpointError as error:
            assert len(str(error).splitlines()) <= 6
        else:
            assert hash(config) is not None
