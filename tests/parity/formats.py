"""What must be equal bit for bit: MXFP4 decoding, and weights however they are stored."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import gptoss_workbench as wb
from gptoss_kernels.mxfp4 import BLOCK, Mxfp4Tensor, dequantize
from tests.factories import LAYOUTS, tiny_model, unpack
from tests.parity.cases import Pair
from tests.parity.rows import Row, bits_differ

GROUP = "MXFP4 and weights"
METRIC = "values that differ in a bit"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def mxfp4() -> list[Row]:
    """All 256 bytes under all 256 scales, against transformers' decoder and against one that reads the bit fields.

    The second is of the tests' own and computes in doubles. Scale bytes 253 to 255 overflow in both dtypes, and the
    infinities must be the same ones.
    """
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 1, 16).repeat(256, 1, 1, 1)
    scales = torch.arange(256, dtype=torch.uint8).view(256, 1, 1).repeat(1, 16, 1)
    rows = []
    for name, dtype in DTYPES.items():
        ours = dequantize(Mxfp4Tensor(blocks, scales), dtype)
        theirs = convert_moe_packed_tensors(blocks, scales, dtype=dtype).transpose(1, 2)
        by_bits = unpack(blocks, scales).to(dtype)  # two significant bits: exact in both
        finite = int(ours.isfinite().sum())
        case = f"256 bytes x 256 scales, {finite} of {ours.numel()} finite"
        for against, other in (("transformers", theirs), ("bit fields in float64", by_bits)):
            rows.append(Row(GROUP, case, "MXFP4 decoding", against, name, METRIC, bits_differ(ours, other), "NONE",
                            count=ours.numel(), line="MXFP4 decoding"))
        assert ours.shape == (256, 16, BLOCK)
    return rows


def loaded(pair: Pair) -> list[Row]:
    """Every parameter of transformers' model against ours, experts decoded."""
    rows = []
    for name, dtype in DTYPES.items():
        ours, theirs = pair.ours(name).weights, dict(pair.theirs(name).named_parameters())
        wanted = {"embed": theirs.pop("model.embed_tokens.weight"), "final_norm": theirs.pop("model.norm.weight"),
                  "unembed": theirs.pop("lm_head.weight")}
        for index in range(len(ours.layers)):
            for field, there in _LAYER.items():
                value = theirs.pop(f"model.layers.{index}.{there}")
                wanted[f"layers.{index}.{field}"] = value.transpose(1, 2) if field in ("gate_up", "down") else value
        assert not theirs, f"not compared: {list(theirs)}"
        held = dict(ours.tensors())
        places = held.pop("row_of_token", None)
        assert held.keys() == wanted.keys()
        differ = count = 0
        for field, want in wanted.items():
            got = _dense(held[field], dtype)
            if places is not None and field in ("embed", "unembed"):
                got = got[places]
            differ += bits_differ(got.to(want.dtype), want.detach())
            count += want.numel()
        rows.append(Row(GROUP, pair.name, "all weights as loaded", "transformers", name, METRIC, differ, "NONE",
                        count=count, line="all weights as loaded"))
    return rows


def layouts(folder: Path) -> list[Row]:
    """The same values written down in every layout load as the same model."""
    rows, model = [], tiny_model(seed=1)
    first = dict(wb.load(LAYOUTS["hf"](folder / "hf", model)).weights.tensors())
    for layout, write in LAYOUTS.items():
        if layout == "hf":
            continue
        other = dict(wb.load(write(folder / layout, model)).weights.tensors())
        places = other.pop("row_of_token", None)
        differ = count = 0
        for name, value in first.items():
            one, two = _dense(value, torch.bfloat16), _dense(other[name], torch.bfloat16)
            two = two[places] if places is not None and name in ("embed", "unembed") else two
            differ, count = differ + bits_differ(one, two), count + one.numel()
        rows.append(Row(GROUP, layout, "all weights as loaded", "ours, layout hf", "bfloat16", METRIC, differ, "NONE",
                        count=count, line="all weights, in every layout"))
    return rows


def _dense(value: Tensor | Mxfp4Tensor, dtype: torch.dtype) -> Tensor:
    return dequantize(value, dtype) if isinstance(value, Mxfp4Tensor) else value


_LAYER = {
    "attn_norm": "input_layernorm.weight", "sinks": "self_attn.sinks", "mlp_norm": "post_attention_layernorm.weight",
    **{f"{letter}_{what}": f"self_attn.{letter}_proj.{what}" for letter in "qkvo" for what in ("weight", "bias")},
    "router_weight": "mlp.router.weight", "router_bias": "mlp.router.bias",
    "gate_up": "mlp.experts.gate_up_proj", "gate_up_bias": "mlp.experts.gate_up_proj_bias",
    "down": "mlp.experts.down_proj", "down_bias": "mlp.experts.down_proj_bias",
}
