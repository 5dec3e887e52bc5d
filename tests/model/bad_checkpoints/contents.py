"""Inputs 33 to 48: indexes and configurations that do not fit the weights, and weights that are not gpt-oss's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gptoss_workbench.errors import CorruptFile, MissingShard, ModifiedConfig
from tests.model.bad_checkpoints.case import (
    BLOCKS,
    CONFIG,
    FIRST,
    HEAD,
    INDEX,
    LAST,
    QUERY,
    SCALES,
    SECOND,
    SINKS,
    Case,
    broken,
    config,
    content,
    indexed,
    rope,
    tensor,
    tensors,
)


def _remove(*files: str):
    return lambda folder: [(folder / file).unlink() for file in files]


def _move_without_the_index(folder: Path) -> None:
    tensors(lambda found: found.update({HEAD: load_file(folder / LAST)[HEAD]}), FIRST)(folder)
    tensors(lambda found: found.pop(HEAD), LAST)(folder)


def _also_in_the_first(folder: Path) -> None:
    tensors(lambda found: found.update({HEAD: load_file(folder / LAST)[HEAD]}), FIRST)(folder)


def _norm_in_both(folder: Path) -> None:
    one, other = sorted(folder.glob("*.safetensors"))
    tensors(lambda found: found.update({"norm.scale": load_file(other)["norm.scale"]}), one.name)(folder)


def _shards(number: int, what: str, make, problem: str, **others: Any) -> Case:
    return Case(number, what, make, problem, **{"base": "hf-sharded", "file": INDEX, **others})


def _points(shard: object) -> Case:
    return _shards(35, f"index value {shard!r}"[:40], indexed(lambda names: names.update({HEAD: shard})),
                   "points outside the checkpoint folder", tensor=HEAD, expected="bare name", got=repr(shard)[:60])


INDEXES = [
    _shards(33, "two shards of three missing", _remove(FIRST, LAST), "2 of 3 weights files are missing",
            expected=f"{FIRST}, {LAST}", got="1 of 3", hint="download", error=MissingShard),
    _shards(33, "the index itself and a shard missing", _remove(INDEX, SECOND), "1 of 3 weights files are missing",
            file="", expected=SECOND, got="2 of 3", error=MissingShard),
    *map(_points, ("/etc/passwd", "../x.safetensors", "a/b.safetensors", "C:\\x.safetensors", "", ".", "..",
                   "x\0.safetensors", "weights.bin", ["x"], 3, None)),
    *(_shards(36, f"index is {text[:12]!r}", content(text.encode("latin-1"), INDEX), problem, error=CorruptFile)
      for text, problem in (("", "empty file"), ("not json", "not JSON at byte 0"), ("[]", "must be a JSON object"),
                            ("\xff\xfe", "not UTF-8 at byte 0"), ("[" * 200_000, "nested too deep"),
                            ('{"x": NaN}', "no readable JSON"), ("<html>", "this is not JSON"),
                            ('{"weight_map": {"a": "b", "a": "c"}}', "defines 'a' twice"))),
    *(_shards(36, f"index is {text}", content(text, INDEX), "the index has no weight_map", got=got)
      for text, got in (("{}", "None"), ('{"weight_map": []}', "[]"), ('{"weight_map": {}}', "{}"))),
    _shards(37, "the index names the wrong shard", indexed(lambda names: names.update({HEAD: FIRST})),
            "does not describe this file", file=LAST, tensor=HEAD, expected=LAST, got=FIRST),
    _shards(37, "the tensor is in another shard", _move_without_the_index, "does not describe this file", file=FIRST,
            tensor=HEAD, expected=FIRST, got=LAST),
    _shards(38, "the index lacks a tensor of a shard", indexed(lambda names: names.pop(HEAD)),
            "does not describe this file", file=LAST, tensor=HEAD, got="no entry"),
    _shards(39, "the shard lacks a tensor of the index", tensors(lambda found: found.pop(HEAD), LAST),
            "not in the file that the index names", file=LAST, tensor=HEAD, got="no such tensor"),
    _shards(41, "a tensor in two shards", _also_in_the_first, "does not describe this file", file=FIRST, tensor=HEAD,
            got=LAST),
    Case(41, "a tensor in two files without an index", _norm_in_both, "two files hold the same tensor",
         base="original-sharded", file="model-00001-of-00001.safetensors", tensor="norm.scale",
         got="also in model-00000-of-00001.safetensors"),
]


# -- tensors -------------------------------------------------------------------------------------------------


def _missing(name: str, expected: str, got: str = "1 missing") -> Case:
    return Case(39, f"{name} missing", tensors(lambda found: found.pop(name)), "a tensor is missing", file="",
                tensor=name, expected=expected, got=got)


def _shape(name: str, wrong: Tensor, expected: str, number: int = 42) -> Case:
    return Case(number, f"{name} {list(wrong.shape)}", tensor(name, lambda _: wrong), "wrong shape", tensor=name,
                expected=expected, got=str(list(wrong.shape)))


def _dtype(name: str, dtype: torch.dtype, expected: str, got: str) -> Case:
    return Case(43, f"{name} {got}", tensor(name, lambda found: found.to(dtype)), "wrong dtype", tensor=name,
                expected=expected, got=got, hint="nothing is converted silently")


def _set(at: tuple[int, ...], value: float):
    def change(found: Tensor) -> Tensor:
        found[at] = value
        return found

    return change


def _blocks_of_another_width(found: dict[str, Tensor]) -> None:
    found[BLOCKS] = found[BLOCKS][:, :, :2].contiguous()
    found[SCALES] = found[SCALES][:, :, :2].contiguous()


def _half_dense(found: dict[str, Tensor]) -> None:
    found["model.layers.0.mlp.experts.down_proj"] = torch.zeros(8, 96, 64, dtype=torch.bfloat16)


TENSORS = [
    _missing(SINKS, "BF16 [8] (Hugging Face names, MXFP4 experts)"),
    _missing(HEAD, "BF16 [512, 64]"),
    Case(40, "an extra tensor", tensors(lambda found: found.update(stray=torch.zeros(1))), "no gpt-oss model has",
         tensor="stray", expected="79 tensors", got="1 more: stray"),
    Case(40, "a layer too many", tensors(lambda found: found.update({SINKS.replace(".1.", ".9."): found[SINKS] + 1})),
         "no gpt-oss model has", tensor=SINKS.replace(".1.", ".9."), got="1 more"),
    _shape(SINKS, torch.zeros(1).bfloat16(), "[8]"),
    _shape(SINKS, torch.zeros(5).bfloat16(), "[8]"),
    _shape(SINKS, torch.zeros(()).bfloat16(), "[8]"),
    _shape(QUERY, torch.zeros(64, 128).bfloat16(), "[128, 64]"),
    _shape("model.norm.weight", torch.zeros(65).bfloat16(), "[64]"),
    Case(42, "unpacked experts stored the packed way round", base="hf-bf16",
         make=tensor("model.layers.0.mlp.experts.down_proj", lambda found: found.transpose(1, 2).contiguous()),
         problem="wrong shape", tensor="model.layers.0.mlp.experts.down_proj", expected="[8, 96, 64]",
         got="[8, 64, 96]"),
    _dtype(SINKS, torch.int64, "BF16", "I64"),
    _dtype(SINKS, torch.float16, "BF16", "F16"),
    _dtype(QUERY, torch.float32, "BF16", "F32"),
    _dtype(BLOCKS, torch.float16, "U8", "F16"),
    _dtype(BLOCKS, torch.int8, "U8", "I8"),
    Case(44, "blocks without scales", tensors(lambda found: found.pop(SCALES)), "a tensor is missing", file="",
         tensor=SCALES, expected="U8 [8, 64, 3]", got=f"{BLOCKS} [8, 64, 3, 16] is there"),
    Case(44, "scales without blocks", tensors(lambda found: found.pop(BLOCKS)), "a tensor is missing", file="",
         tensor=BLOCKS, expected="U8 [8, 64, 3, 16]", got=f"{SCALES} [8, 64, 3] is there"),
    Case(44, "blocks and scales of other widths", tensor(BLOCKS, lambda found: found[:, :, :2].contiguous()),
         "wrong shape", tensor=BLOCKS, expected="[8, 64, 3, 16]",
         got=f"[8, 64, 2, 16] beside {SCALES} [8, 64, 3]"),
    Case(44, "a pair of another width", tensors(_blocks_of_another_width), "wrong shape", tensor=BLOCKS,
         got=f"[8, 64, 2, 16] beside {SCALES} [8, 64, 2]"),
    Case(44, "blocks of 15 bytes", tensor(BLOCKS, lambda found: found[..., :15].contiguous()), "wrong shape",
         tensor=BLOCKS, expected="[8, 64, 3, 16]", got="[8, 64, 3, 15]"),
    Case(44, "packed and unpacked experts", tensors(_half_dense), "mixes two checkpoint layouts", file="",
         got="model.layers.0.mlp.experts.down_proj"),
    Case(45, "scale byte 255", tensor(SCALES, _set((3, 5, 1), 255)), "scales are out of range", tensor=SCALES,
         expected="0 to 252", got="1 of 255, 1 of 253 or more on values, the first at [3, 5, 1]"),
    Case(45, "scale byte 253 on values", tensor(SCALES, _set((0, 0, 2), 253)), "scales are out of range",
         tensor=SCALES, got="0 of 255, 1 of 253 or more on values, the first at [0, 0, 2]"),
    Case(45, "scale byte 255 in OpenAI's names", tensor("block.2.mlp.mlp1_weight.scales", _set((1, 2, 1), 255)),
         "scales are out of range", base="original", tensor="block.2.mlp.mlp1_weight.scales", got="1 of 255"),
    Case(46, "NaN in a norm", tensor("model.norm.weight", _set((7,), float("nan"))), "1 values are NaN or infinite",
         tensor="model.norm.weight", got="1 of 64, the first at [7]"),
    Case(46, "infinity in a matrix", tensor(QUERY, _set((slice(9, 11), 3), float("-inf"))),
         "2 values are NaN or infinite", tensor=QUERY, got="2 of 8192, the first at [9, 3]"),
    Case(46, "NaN in an unpacked expert", base="hf-bf16", problem="1 values are NaN or infinite",
         make=tensor("model.layers.3.mlp.experts.gate_up_proj", _set((7, 63, 191), float("nan"))),
         tensor="model.layers.3.mlp.experts.gate_up_proj", got="the first at [7, 63, 191]"),
    Case(46, "NaN in a compact row", tensor("lm_head.rows", _set((384, 0), float("nan"))),
         "1 values are NaN or infinite", base="compact", tensor="lm_head.rows", got="the first at [384, 0]"),
]


# -- configuration -------------------------------------------------------------------------------------------


def _sizes(base: str, expected: str, got: str, **changes: Any) -> Case:
    return Case(47, f"{base}: {got}", config(**changes), "config.json does not describe these weights", file=CONFIG,
                base=base, expected=expected, got=got, hint="same place")


def _constant(field: str, expected: str, got: str, make=None, base: str = "20b", **changes: Any) -> Case:
    return Case(47, f"{base}: {field} = {got}", make or config(**changes),
                f"differs from that of gpt-oss-{base.partition('-')[0]}", file=CONFIG, base=base,
                expected=f"{field} = {expected}", got=f"{field} = {got}", hint="allow_modified_config=True",
                error=ModifiedConfig)


def _value(field: str, make, expected: str, got: str, number: int = 47, **others: Any) -> Case:
    return Case(number, f"{field} = {got[:20]}", make, f"bad {field}", file=CONFIG, expected=expected, got=got,
                **others)


_ALL_FULL = "sf" * 11 + "ff"
CONFIGS = [
    _sizes("120b", "num_hidden_layers = 36, num_local_experts = 128", "num_hidden_layers = 24, num_local_experts = 32",
           num_hidden_layers=24, num_local_experts=32, layer_types=["sliding_attention", "full_attention"] * 12),
    _sizes("20b", "num_hidden_layers = 24, num_local_experts = 32", "num_hidden_layers = 36, num_local_experts = 128",
           num_hidden_layers=36, num_local_experts=128, layer_types=...),
    _sizes("20b", "num_local_experts = 32", "num_local_experts = 128", num_local_experts=128),
    *(_sizes("20b", "num_hidden_layers = 24", f"num_hidden_layers = {layers}", num_hidden_layers=layers,
             layer_types=...) for layers in (23, 25, 9999)),
    _sizes("20b-original", "num_hidden_layers = 24", "num_hidden_layers = 25", num_hidden_layers=25),
    _sizes("hf", "head_dim = 16", "head_dim = 32", head_dim=32),
    _sizes("hf", "intermediate_size = 96", "intermediate_size = 64", intermediate_size=64),
    _sizes("hf", "num_key_value_heads = 2", "num_key_value_heads = 4", num_key_value_heads=4),
    _sizes("hf", "num_attention_heads = 8, head_dim = 16", "num_attention_heads = 16, head_dim = 8",
           num_attention_heads=16, head_dim=8),
    _sizes("hf", "vocab_size = 512", "vocab_size = 513", vocab_size=513),
    _sizes("original", "num_local_experts = 8", "num_local_experts = 16", num_experts=16),
    _sizes("compact", "vocab_size = 512", "vocab_size = 513", vocab_size=513),
    _value("num_experts_per_tok", config(num_experts_per_tok=0), "from 1", "0"),
    Case(47, "top-k above experts", config(num_experts_per_tok=33), "more experts are chosen than there are",
         base="20b", file=CONFIG, expected="at most 32", got="num_experts_per_tok = 33"),
    Case(47, "heads not divisible", config(num_key_value_heads=7), "query heads cannot be shared out evenly",
         base="20b", file=CONFIG, expected="multiple", got="64 and 7"),
    Case(47, "rope block missing", config(rope_scaling=...), "lacks rope_scaling", base="20b", file=CONFIG,
         expected="rope_scaling", got="no such key"),
    _value("layer_types", config(layer_types=["full_attention"] * 23), '24 times "sliding_attention"',
           "['full_attention'", base="20b"),
    _constant("num_experts_per_tok", "4", "2", num_experts_per_tok=2),
    _constant("num_experts_per_tok", "4", "2", base="20b-original", experts_per_token=2),
    _constant("num_experts_per_tok", "4", "8", base="120b", num_experts_per_tok=8),
    _constant("sliding_window", "128", "127", sliding_window=127),
    _constant("sliding_window", "128", "4096", base="20b-original", sliding_window=4096),
    _constant("rms_norm_eps", "1e-05", "1.0", rms_norm_eps=1.0),
    _constant("swiglu_limit", "7.0", "8.0", swiglu_limit=8),
    _constant("swiglu_limit", "7.0", "70.0", base="20b-original", swiglu_limit=70),
    _constant("swiglu_alpha", "1.702", "1.0", swiglu_alpha=1.0),
    _constant("rope_theta", "150000.0", "10000.0", rope_theta=10000),
    _constant("rope_factor", "32.0", "16.0", rope(factor=16)),
    _constant("rope_factor", "32.0", "1.0", base="20b-original", rope_scaling_factor=1),
    _constant("rope_beta_fast", "32.0", "16.0", rope(beta_fast=16)),
    _constant("rope_beta_slow", "1.0", "2.0", base="20b-original", rope_ntk_alpha=2),
    _constant("rope_original_context", "4096", "8192", rope(original_max_position_embeddings=8192)),
    _constant("rope_truncate", "False", "True", rope(truncate=...)),
    _constant("layer_types", "sf" * 12, _ALL_FULL,
              layer_types=["sliding_attention", "full_attention"] * 11 + ["full_attention"] * 2),
    _constant("eos_token_ids", "(199999, 200002, 200012)", "(200006,)", eos_token_id=200006),
    Case(47, "another value of the embedded model", config(sliding_window=32), "that of the embedded model",
         base="embedded", file=CONFIG, expected="sliding_window = 16", got="sliding_window = 32",
         error=ModifiedConfig),
    Case(47, "several constants", config(sliding_window=64, rms_norm_eps=1e-6), "gpt-oss-20b", base="20b",
         file=CONFIG, expected="sliding_window = 128, rms_norm_eps = 1e-05",
         got="sliding_window = 64, rms_norm_eps = 1e-06", error=ModifiedConfig),
    *(broken(48, f"config.json is {text[:9]!r}", content(text, CONFIG), problem, file=CONFIG)
      for text, problem in (("", "empty file (0 bytes)"), ("{", "not JSON at byte 1"), ("[]", "must be a JSON object"),
                            ('{"hidden_size": NaN}', "holds no readable JSON"), ('{"a": 1, "a": 2}', "'a' twice"),
                            ('{"vocab_size": 1' + "0" * 5000 + "}", "holds no readable JSON"))),
    _value("vocab_size", config(vocab_size=10**400), "from 1 to 2147483647", "1000000", number=48),
    _value("hidden_size", config(hidden_size=64.0), "a whole number", "64.0", number=48),
    _value("model_type", config(model_type="llama"), "'gpt_oss'", "'llama'", number=48, hint="gpt-oss architecture"),
    Case(48, "config.json of the other layout", config(model_type="gpt_oss"), "in another form than the weights",
         base="original", file=CONFIG, expected="OpenAI's own form", got="Hugging Face form", hint="same place"),
    Case(48, "config.json missing", lambda folder: (folder / CONFIG).unlink(), "config.json is missing", file=CONFIG,
         hint="same place"),
    Case(48, "quantization_config missing", config(quantization_config=...), "quantization_config does not fit",
         file=CONFIG, expected="mxfp4", got="None", error=ModifiedConfig),
    Case(48, "quantization_config of another kind", config(quantization_config={"quant_method": "bitsandbytes"}),
         "quantization_config does not fit", file=CONFIG, expected="mxfp4", got="'bitsandbytes'",
         error=ModifiedConfig),
    Case(48, "bf16 export that says mxfp4", config(quantization_config={"quant_method": "mxfp4"}),
         "quantization_config does not fit", base="hf-bf16", file=CONFIG,
         expected="unpacked bfloat16 experts, which are read as well", got="'mxfp4'", error=ModifiedConfig),
    Case(48, "generation_config.json with a text as id", content('{"eos_token_id": "end"}', "generation_config.json"),
         "bad eos_token_id", file="generation_config.json", expected="a token id", got="'end'"),
]

CASES = [*INDEXES, *TENSORS, *CONFIGS]

LOADS = [
    (45, "scale byte 254 on zeros", tensors(lambda found: (
        _set((0, 0, 2), 254)(found[SCALES]), _set((0, 0, 2), 0x80)(found[BLOCKS])))),
    (47, "swiglu_limit missing", config(swiglu_limit=...)),
]
"""What looks odd and is sound: number, what, make."""

