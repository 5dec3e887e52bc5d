"""YaRN: frequencies, concentration, and the cosines and sines made of them, bit for bit."""

from __future__ import annotations

from itertools import product

import torch

from gptoss_kernels import reference
from tests.parity.rows import Row, bits_differ

GROUP = "YaRN"
METRIC = "values that differ in a bit"
POSITIONS = (*range(256), 4095, 4096, 65_537, 131_071)


def frequencies() -> list[Row]:
    """Head sizes 16 to 128, the ramp's ends rounded or not, two settings of base and stretch."""
    rows = []
    for truncate, (theta, factor, context) in product((False, True), ((150000.0, 32.0, 4096), (10000.0, 4.0, 2048))):
        sizes = (16, 32, 64, 128)
        differ = count = 0
        for size in sizes:
            rope = _theirs(size, truncate, theta, factor, context)
            ours, concentration = reference.yarn_frequencies(size, theta, factor, 32.0, 1.0, context, truncate)
            differ += bits_differ(ours, rope.inv_freq) + (concentration != rope.attention_scaling)
            count += len(ours) + 1
        case = f"theta {theta:g}, factor {factor:g}, truncate {str(truncate).lower()}"
        rows.append(Row(GROUP, case, "frequencies and concentration, heads of 16, 32, 64, 128", "transformers",
                        "float32", METRIC, differ, "NONE", count=count))
    return rows


def tables() -> list[Row]:
    """Cosine and sine of the published settings, at positions up to the last one, 131,071."""
    rope = _theirs(64, False, 150000.0, 32.0, 4096)
    ours, concentration = reference.yarn_frequencies(64, 150000.0, 32.0, 32.0, 1.0, 4096, False)
    positions = torch.tensor([POSITIONS])
    rows = []
    for name in ("float32", "bfloat16"):
        dtype = getattr(torch, name)
        mine = reference.rope_tables(positions, ours, concentration, dtype)
        other = rope(torch.zeros(1, dtype=dtype), positions)
        differ = sum(bits_differ(one, two) for one, two in zip(mine, other))
        rows.append(Row(GROUP, "published settings", f"cos and sin at {len(POSITIONS)} positions", "transformers",
                        name, METRIC, differ, "NONE", count=2 * mine[0].numel()))
    return rows


def _theirs(size: int, truncate: bool, theta: float, factor: float, context: int):
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

    config = GptOssConfig(head_dim=size, rope_parameters={
        "rope_type": "yarn", "rope_theta": theta, "factor": factor, "beta_fast": 32.0, "beta_slow": 1.0,
        "original_max_position_embeddings": context, "truncate": truncate})
    return GptOssRotaryEmbedding(config)
