"""How a bad checkpoint is made and what must be said about it, as a value; and the tools to make one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

from safetensors.torch import load_file, save_file
from torch import Tensor

from gptoss_workbench.errors import CheckpointError, CorruptFile, WorkbenchError
from gptoss_workbench.model.config import ModelConfig
from gptoss_workbench.model.layouts import Layout, Sizes

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
FIRST, SECOND, LAST = (f"model-0000{i}-of-00002.safetensors" for i in range(3))

SINKS = "model.layers.1.self_attn.sinks"
QUERY = "model.layers.0.self_attn.q_proj.weight"
KEY_BIAS, VALUE_BIAS = "model.layers.2.self_attn.k_proj.bias", "model.layers.2.self_attn.v_proj.bias"
BLOCKS, SCALES = (f"model.layers.2.mlp.experts.down_proj_{part}" for part in ("blocks", "scales"))
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        number: of the list of 52 bad inputs.
        what: the input in a few words.
        make: damages the folder of a good checkpoint.
        problem, expected, got, hint: text that the parts of the message must contain.
        file: what the message names, below the folder; "" for the folder itself.
        tensor: what the message names exactly.
        base: which good checkpoint, a key of ``bases``.
        error: the class that is raised.
    """

    number: int
    what: str
    make: Callable[[Path], object]
    problem: str
    file: str = SINGLE
    tensor: str | None = None
    expected: str | None = None
    got: str | None = None
    hint: str | None = None
    base: str = "hf"
    error: type[WorkbenchError] = CheckpointError

    def __str__(self) -> str:
        return f"#{self.number} {self.what}"


def broken(number: int, what: str, make: Callable[[Path], object], problem: str, **others: Any) -> Case:
    """A case of a file that is to be deleted and downloaded again, which the hint says."""
    return Case(number, what, make, problem, **{"error": CorruptFile, "hint": "download", **others})


# -- making them ---------------------------------------------------------------------------------------------


def content(data: bytes | str, file: str = SINGLE) -> Callable[[Path], object]:
    """Put other content into a file."""
    raw = data.encode() if isinstance(data, str) else data
    return lambda folder: (folder / file).write_bytes(raw)


def with_length(length: int, rest: bytes = b"{}") -> bytes:
    """The eight bytes that begin a safetensors file, and what follows."""
    return length.to_bytes(8, "little") + rest


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a file, and the bytes after it."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:8 + length]), raw[8 + length:]


def headed(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Change the header of the single file; an edit that returns bytes or text replaces it."""
    def make(folder: Path) -> None:
        file = folder / SINGLE
        header, data = header_of(file)
        result = edit(header)
        new = result if isinstance(result, bytes) else json.dumps(header).encode()
        file.write_bytes(with_length(len(new), new) + data)

    return make


def entry(name: str, **changes: Any) -> Callable[[Path], object]:
    """Change fields of one tensor in the header; ... takes a field out."""
    def edit(header: dict[str, Any]) -> None:
        both = {**header[name], **changes}
        header[name] = {field: value for field, value in both.items() if value is not ...}

    return headed(edit)


def tensors(edit: Callable[[dict[str, Tensor]], object], file: str = SINGLE) -> Callable[[Path], object]:
    """Change the tensors of one file, which stays sound."""
    def make(folder: Path) -> None:
        found = load_file(folder / file)
        edit(found)
        save_file(found, folder / file)

    return make


def tensor(name: str, new: Callable[[Tensor], Tensor], file: str = SINGLE) -> Callable[[Path], object]:
    """Put another tensor in the place of one."""
    return tensors(lambda found: found.update({name: new(found[name])}), file)


def config(**changes: Any) -> Callable[[Path], object]:
    """Change keys of config.json; ... takes a key out."""
    def make(folder: Path) -> None:
        path = folder / CONFIG
        both = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in both.items() if value is not ...}))

    return make


def rope(**changes: Any) -> Callable[[Path], object]:
    """Change keys of the rotary settings; ... takes a key out."""
    def make(folder: Path) -> None:
        both = {**json.loads((folder / CONFIG).read_text())["rope_scaling"], **changes}
        config(rope_scaling={key: value for key, value in both.items() if value is not ...})(folder)

    return make


def indexed(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Change the weight map of the index."""
    def make(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        edit(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return make


def replaced(make: Callable[[Path], object], file: str = SINGLE) -> Callable[[Path], object]:
    """Put something that is no file in the place of one; ``make`` gets its path."""
    def both(folder: Path) -> None:
        (folder / file).unlink()
        make(folder / file)

    return both


@contextmanager
def unreadable(name: str) -> Iterator[None]:
    """Files of this name refuse to be opened, as a file of another owner does. Nothing is closed to root, so this
    stands in for ``chmod``."""
    real = Path.open

    def refuse(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **options)

    with patch.object(Path, "open", refuse):
        yield


# -- checkpoints of published size that take no room ---------------------------------------------------------


def write_sparse(folder: Path, data: dict[str, Any], *, original: bool = False) -> Path:
    """A checkpoint with every tensor of a config.json in one file that is all hole: sizes are real, data is zeros.

    Args:
        data: the configuration, in the Hugging Face form or OpenAI's.
    """
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(data))
    read = ModelConfig.from_original if original else ModelConfig.from_hf
    layout = Layout(original=original, packed=True, compact=False)
    header, at = {}, 0
    for slot in layout.all(Sizes.of(read(data))):
        dtype = slot.dtypes[0]
        end = at + prod(slot.shape) * {"U8": 1, "BF16": 2}[dtype]
        header[slot.name] = {"dtype": dtype, "shape": slot.shape, "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header).encode()
    with (folder / SINGLE).open("wb") as file:
        file.write(with_length(len(raw), raw))
        file.truncate(8 + len(raw) + at)
    return folder


def published(layers: int, experts: int) -> dict[str, Any]:
    """The published config.json of gpt-oss-20b (24 layers, 32 experts) or -120b (36, 128), Hugging Face form."""
    return {
        "architectures": ["GptOssForCausalLM"], "attention_bias": True, "eos_token_id": 200002, "head_dim": 64,
        "experts_per_token": 4, "hidden_act": "silu", "hidden_size": 2880, "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2), "max_position_embeddings": 131072,
        "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": layers,
        "num_key_value_heads": 8, "num_local_experts": experts, "pad_token_id": 199999, "rms_norm_eps": 1e-5,
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
        "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn",
                         "original_max_position_embeddings": 4096, "truncate": False},
        "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False,
        "vocab_size": 201088,
    }


def published_original(layers: int, experts: int) -> dict[str, Any]:
    """The same as OpenAI publishes it under original/."""
    return {
        "num_hidden_layers": layers, "num_experts": experts, "experts_per_token": 4, "vocab_size": 201088,
        "hidden_size": 2880, "intermediate_size": 2880, "swiglu_limit": 7.0, "head_dim": 64,
        "num_attention_heads": 64, "num_key_value_heads": 8, "sliding_window": 128, "initial_context_length": 4096,
        "rope_theta": 150000, "rope_scaling_factor": 32.0, "rope_ntk_alpha": 1, "rope_ntk_beta": 32,
    }


def is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0
