"""The first pass over a checkpoint: from the headers and the configuration to a plan, or to one clear refusal.

The world is closed: a tensor that is missing, unexpected, of another shape or of another dtype is an error. No
tensor is read and nothing is allocated here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptoss_workbench.errors import CheckpointError, ModifiedConfig
from gptoss_workbench.model import layouts
from gptoss_workbench.model.config import ModelConfig
from gptoss_workbench.model.files import Stamp, read_json, shorten, stamp
from gptoss_workbench.model.headers import TensorHeader
from gptoss_workbench.model.layouts import Layout, Sizes, Slot
from gptoss_workbench.model.published import check_published, published_name
from gptoss_workbench.model.shards import CONFIG, SAME_PLACE, checkpoint_folder, gather_headers

GENERATION = "generation_config.json"
_MOST_NAMED = 3  # tensors in one message


@dataclass(frozen=True)
class Plan:
    """An accepted checkpoint of which only headers have been read.

    Attributes:
        folder: where the weights are (an ``original`` subfolder when only that is there).
        tensors: every tensor of the model by its name in the files.
        stamps: what each weights file looked like at the time.
    """

    folder: Path
    config: ModelConfig
    layout: Layout
    sizes: Sizes
    tensors: dict[str, TensorHeader]
    stamps: dict[Path, Stamp]

    def __str__(self) -> str:
        name = published_name(self.config) or "a gpt-oss model of its own sizes"
        return (f"{name}: {self.layout}, {self.config.num_hidden_layers} layers, {self.config.num_local_experts} "
                f"experts, {len(self.tensors)} tensors in {len(self.files)} file(s), {self.nbytes / 1e9:.2f} GB")

    @property
    def files(self) -> list[Path]:
        """The weights files."""
        return sorted(self.stamps)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def plan_checkpoint(folder: str | Path, *, allow_modified_config: bool = False) -> Plan:
    """Read configuration and headers, and check that they describe one complete gpt-oss model.

    Args:
        allow_modified_config: accept constants that differ from those of the published model of these sizes, and a
            ``quantization_config`` that does not fit the tensors.
    Raises:
        ModelNotFound: no checkpoint in the folder.
        CheckpointError: the checkpoint is damaged, incomplete, or not of gpt-oss.
    """
    folder = checkpoint_folder(Path(folder))
    tensors = gather_headers(folder)
    stamps = {file: stamp(file) for file in {tensor.file for tensor in tensors.values()}}
    layout = layouts.detect(tensors, str(folder))
    config = _read_config(folder, layout, allow_modified_config)
    rows = None
    if layout.compact:
        embed = tensors.get("model.embed_tokens.rows")
        rows = embed.shape[0] if embed and embed.shape else 0
    sizes = Sizes.of(config, rows)
    _check_sizes(folder, layout, sizes, tensors)
    if not allow_modified_config:  # after the sizes, which tell what it is to be compared with
        check_published(config, str(folder / CONFIG))
    return Plan(folder, config, layout, sizes, tensors, stamps)


def _read_config(folder: Path, layout: Layout, allow_modified: bool) -> ModelConfig:
    file = folder / CONFIG
    if not os.path.lexists(file):
        raise CheckpointError("config.json is missing beside the weights", file=str(file), expected="a file",
                              got="no such file", hint=SAME_PLACE)
    data = read_json(file)
    if layout.original:
        if "model_type" in data:  # which ends a generation elsewhere, even where the sizes agree
            raise CheckpointError("config.json is in another form than the weights", file=str(file),
                                  expected="OpenAI's own form, as it lies beside tensors named block.N...",
                                  got="the Hugging Face form, with model_type", hint=SAME_PLACE)
        return ModelConfig.from_original(data, str(file))
    config = ModelConfig.from_hf(data, str(file))
    if not allow_modified:
        _check_quantization(data, layout, file)
    generation = folder / GENERATION
    if os.path.lexists(generation):  # where both say when to stop, generation follows this one
        stops = ModelConfig.eos_ids(read_json(generation), str(generation))
        config = replace(config, eos_token_ids=stops or config.eos_token_ids)
    return config


def _check_quantization(data: dict[str, Any], layout: Layout, file: Path) -> None:
    """Both forms of the experts are read, but the configuration must not claim the other one."""
    stated = data.get("quantization_config")
    method = stated.get("quant_method") if isinstance(stated, dict) else stated
    if isinstance(stated, dict) and stated.get("dequantize") is True:
        method = None  # written by transformers beside the experts that it unpacked
    if layout.packed and method != "mxfp4":
        raise ModifiedConfig("quantization_config does not fit the experts", file=str(file),
                             expected='quant_method "mxfp4": the files hold packed experts', got=repr(method)[:80],
                             hint=f"{SAME_PLACE}; or allow_modified_config=True")
    if not layout.packed and method is not None:
        raise ModifiedConfig("quantization_config does not fit the experts", file=str(file),
                             expected="no such key: the files hold unpacked bfloat16 experts, which are read as well",
                             got=repr(method)[:80], hint="take the key out of config.json")


def _check_sizes(folder: Path, layout: Layout, sizes: Sizes, tensors: dict[str, TensorHeader]) -> None:
    """Hold the tensors to the configuration. When they agree with each other, blame the configuration."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    implied = layouts.implied_sizes(layout, shapes, sizes)
    if implied is not None and implied != sizes:
        fields = [name for name in Sizes._fields[:-1] if getattr(implied, name) != getattr(sizes, name)]
        raise CheckpointError(
            "config.json does not describe these weights", file=str(folder / CONFIG),
            expected=", ".join(f"{name} = {getattr(implied, name)}" for name in fields),
            got=", ".join(f"{name} = {getattr(sizes, name)}" for name in fields), hint=SAME_PLACE,
        )
    if layout.packed and (sizes.hidden_size % 32 or sizes.intermediate_size % 32):
        raise CheckpointError("MXFP4 packs 32 values a block", file=str(folder / CONFIG),
                              expected="hidden_size and intermediate_size to be multiples of 32",
                              got=f"{sizes.hidden_size} and {sizes.intermediate_size}")
    # A layer count out of proportion would make a table of its own size.
    slots = layout.all(sizes._replace(num_hidden_layers=min(sizes.num_hidden_layers, len(tensors) + 1)))
    known = {slot.name for slot in slots}
    missing = [slot for slot in slots if slot.name not in tensors]
    if missing:
        raise _missing(missing, folder, layout, tensors)
    for slot in slots:
        _check_tensor(slot, tensors)
    extra = sorted(name for name in tensors if name not in known)
    if extra:
        raise CheckpointError(
            "a tensor that no gpt-oss model has", file=str(tensors[extra[0]].file), tensor=shorten(extra[0]),
            expected=f"{len(known)} tensors ({layout})",
            got=f"{len(extra)} more: {_some(extra)}", hint=SAME_PLACE,
        )


def _some(names: list[str]) -> str:
    return ", ".join(map(shorten, names[:_MOST_NAMED])) + (", ..." if len(names) > _MOST_NAMED else "")


def _missing(slots: list[Slot], folder: Path, layout: Layout, tensors: dict[str, TensorHeader]) -> CheckpointError:
    first = slots[0]
    twin = _twin(first, tensors)
    got = f"{len(slots)} missing: {_some([slot.name for slot in slots])}"
    return CheckpointError("a tensor is missing", file=str(folder), tensor=first.name,
                           expected=f"{first.dtypes[0]} {list(first.shape)} ({layout})",
                           got=got + (f"; {twin} is there" if twin else ""), hint=SAME_PLACE)


def _twin(slot: Slot, tensors: dict[str, TensorHeader]) -> str | None:
    """The other half of an MXFP4 pair, blocks of scales and scales of blocks, with its shape."""
    if slot.kind != layouts.PACKED:
        return None
    here, there = ("blocks", "scales") if slot.name.endswith("blocks") else ("scales", "blocks")
    name = slot.name.removesuffix(here) + there
    return f"{name} {list(tensors[name].shape)}" if name in tensors else None


def _check_tensor(slot: Slot, tensors: dict[str, TensorHeader]) -> None:
    found = tensors[slot.name]
    file = str(found.file)
    if found.dtype not in slot.dtypes:
        raise CheckpointError("a tensor has the wrong dtype", file=file, tensor=slot.name,
                              expected=" or ".join(slot.dtypes), got=found.dtype,
                              hint="nothing is converted silently: save the model in bfloat16")
    if found.shape != slot.shape:
        twin = _twin(slot, tensors)
        raise CheckpointError("a tensor has the wrong shape", file=file, tensor=slot.name, expected=list(slot.shape),
                              got=f"{list(found.shape)} beside {twin}" if twin else list(found.shape),
                              hint=SAME_PLACE)
