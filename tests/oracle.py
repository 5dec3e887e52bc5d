"""transformers' GptOssForCausalLM as the second opinion. Only tests import it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def transformers_model(folder: Path, dtype: torch.dtype = torch.float32):
    """The checkpoint of a folder in transformers: experts unpacked, plain attention, one expert loop for all."""
    from transformers import GptOssForCausalLM, Mxfp4Config

    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = GptOssForCausalLM.from_pretrained(
        folder, quantization_config=Mxfp4Config(dequantize=True), dtype=dtype, attn_implementation="eager",
    )
    return model.eval()
