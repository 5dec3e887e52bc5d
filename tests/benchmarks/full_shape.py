"""Random checkpoints in the published shapes: ``python -m tests.benchmarks.full_shape FOLDER [--model 20b|120b]``.

Names, shapes, dtypes and shards are those of the published Hugging Face folders; the values are random and sane:
every map keeps the size of what it is given, norms are near 1, nothing is infinite. They say nothing, in any language.

Nothing here comes from the library that will read it. Bytes are made and written a block at a time, so memory stays
small; each tensor has a generator of its own, so its values depend on the seed and its name alone.
"""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SHARD_BYTES = 4_800_000_000  # no published shard holds more
BLOCK_BYTES = 1 << 23
MARGIN_BYTES = 1 << 28  # left free on the disk

CODES, SCALES, NORM, DENSE = "codes", "scales", "norm", "dense"
CODE_RMS = math.sqrt(8.5625)  # of the sixteen MXFP4 codes
SIZES: dict[str, dict[str, int]] = {
    "20b": {"num_hidden_layers": 24, "num_local_experts": 32},
    "120b": {"num_hidden_layers": 36, "num_local_experts": 128},
}


class Spec(NamedTuple):
    """One tensor: its dtype as safetensors writes it, its shape, how to fill it, and how large its values are."""

    dtype: str
    shape: tuple[int, ...]
    kind: str
    rms: float = 1.0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * (2 if self.dtype == "BF16" else 1)


def config(model: str = "20b", **sizes: Any) -> dict[str, Any]:
    """The published config.json. ``sizes`` override any key, e.g. ``num_hidden_layers=1``."""
    found: dict[str, Any] = {
        "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
        "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880,
        "initial_context_length": 4096, "initializer_range": 0.02, "intermediate_size": 2880,
        "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 64,
        "num_experts_per_tok": 4, "num_key_value_heads": 8, "output_router_logits": False, "pad_token_id": 199999,
        "quantization_config": {
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
                                       "lm_head"],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
                         "rope_type": "yarn", "truncate": False},
        "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
        "tie_word_embeddings": False, "use_cache": True, "vocab_size": 201088, **SIZES[model], **sizes,
    }
    kinds = ("sliding_attention", "full_attention")
    found["layer_types"] = [kinds[layer % 2] for layer in range(found["num_hidden_layers"])]
    return found


def tensors(config: dict[str, Any]) -> dict[str, Spec]:
    """Every tensor of the Hugging Face layout, the layers first and the vocabulary matrices last, as published."""
    d, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads, head = (config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    experts = config["num_local_experts"]

    def matrix(rows: int, columns: int) -> Spec:
        return Spec("BF16", (rows, columns), DENSE, columns**-0.5)

    def bias(*shape: int) -> Spec:
        return Spec("BF16", shape, DENSE, 0.1)

    def packed(name: str, rows: int, columns: int) -> dict[str, Spec]:
        groups, size = columns // 32, columns**-0.5 / CODE_RMS
        return {f"{name}_bias": bias(experts, rows), f"{name}_blocks": Spec("U8", (experts, rows, groups, 16), CODES),
                f"{name}_scales": Spec("U8", (experts, rows, groups), SCALES, size)}

    layer = {"input_layernorm.weight": Spec("BF16", (d,), NORM),
             **packed("mlp.experts.down_proj", d, inner), **packed("mlp.experts.gate_up_proj", 2 * inner, d),
             "mlp.router.bias": bias(experts), "mlp.router.weight": matrix(experts, d),
             "post_attention_layernorm.weight": Spec("BF16", (d,), NORM)}
    for name, rows, columns in (("k", kv_heads * head, d), ("o", d, heads * head), ("q", heads * head, d),
                                ("v", kv_heads * head, d)):
        layer |= {f"self_attn.{name}_proj.bias": bias(rows), f"self_attn.{name}_proj.weight": matrix(rows, columns)}
    layer["self_attn.sinks"] = Spec("BF16", (heads,), DENSE)
    found = {f"model.layers.{index}.{name}": spec for index in range(config["num_hidden_layers"])
             for name, spec in layer.items()}
    found |= {"model.embed_tokens.weight": Spec("BF16", (vocab, d), DENSE),
              "model.norm.weight": Spec("BF16", (d,), NORM), "lm_head.weight": matrix(vocab, d)}
    return found


def shards(specs: dict[str, Spec], most: int = SHARD_BYTES) -> dict[str, list[str]]:
    """File name -> its tensors, each file filled in turn; numbered from zero to the number after "of", as published."""
    parts: list[list[str]] = [[]]
    for name, spec in specs.items():
        if parts[-1] and sum(specs[other].nbytes for other in parts[-1]) + spec.nbytes > most:
            parts.append([])
        parts[-1].append(name)
    return {f"model-{number:05d}-of-{len(parts) - 1:05d}.safetensors": names for number, names in enumerate(parts)}


def header(names: list[str], specs: dict[str, Spec]) -> bytes:
    """What a safetensors file begins with: the length of the JSON (8 bytes, little-endian), then the JSON."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        spec = specs[name]
        entries[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [offset, offset + spec.nbytes]}
        offset += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def data(name: str, spec: Spec, seed: int) -> Iterator[memoryview]:
    """The bytes of one tensor, a block at a time."""
    generator = np.random.PCG64([seed, zlib.crc32(name.encode())])
    for start in range(0, spec.nbytes, BLOCK_BYTES):
        size = min(BLOCK_BYTES, spec.nbytes - start)
        noise = generator.random_raw(-(-size // 8)).astype("<u8", copy=False)
        yield memoryview(_shaped(noise, spec)).cast("B")[:size]


def _shaped(noise: np.ndarray, spec: Spec) -> np.ndarray:
    """Random bits to values. A bfloat16 is a sign bit, eight bits of exponent (127 is 2 ** 0), seven of mantissa."""
    if spec.kind == CODES:
        return noise
    if spec.kind == SCALES:  # four neighbouring powers of two, 4.6 times the lowest in the mean
        lowest = 127 + round(math.log2(spec.rms / 4.61))
        return (noise.view(np.uint8) & 3) + np.uint8(lowest)
    bits = noise.view("<u2")
    if spec.kind == NORM:  # 1 to 1.24
        return (bits & np.uint16(0x1F)) | np.uint16(127 << 7)
    lowest = 127 + round(math.log2(spec.rms / 2.415))  # two neighbouring exponents, 2.415 times the lower in the mean
    return (bits & np.uint16(0x80FF)) + np.uint16(lowest << 7)


def make(folder: Path, config: dict[str, Any], seed: int = 0, most: int = SHARD_BYTES) -> int:
    """Write a checkpoint into a new or empty folder; the number of bytes of its safetensors files.

    Each file appears under its name when it is whole; config.json and the index come last.

    Raises:
        OSError: the folder holds something, or the disk has no room.
    """
    specs = tensors(config)
    files = shards(specs, most)
    headers = {file: header(names, specs) for file, names in files.items()}
    total = sum(map(len, headers.values())) + sum(spec.nbytes for spec in specs.values())
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(errno.EEXIST, "the folder is not empty", str(folder))
    free = shutil.disk_usage(folder).free
    if free < total + MARGIN_BYTES:
        raise OSError(errno.ENOSPC, f"{total:,} bytes are needed and {free:,} are free", str(folder))
    for file, names in files.items():
        _write(folder / file, headers[file], names, specs, seed)
    weight_map = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": sum(spec.nbytes for spec in specs.values())}, "weight_map": weight_map}
    generation = {"bos_token_id": 199998, "do_sample": True, "eos_token_id": [200002, 199999, 200012],
                  "pad_token_id": 199999}
    for name, content in (("model.safetensors.index.json", index), ("generation_config.json", generation),
                          ("config.json", config)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    return total


def _write(path: Path, begin: bytes, names: list[str], specs: dict[str, Spec], seed: int) -> None:
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb", buffering=0) as file:
            file.write(begin)
            for name in names:
                for block in data(name, specs[name], seed):
                    file.write(block)
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # the file cache is better used for something else
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=list(SIZES), default="20b")
    parser.add_argument("--layers", type=int, help="fewer layers than published")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    sizes = {} if options.layers is None else {"num_hidden_layers": options.layers}
    try:
        print(f"{make(options.folder, config(options.model, **sizes), options.seed):,} bytes in {options.folder}")
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
