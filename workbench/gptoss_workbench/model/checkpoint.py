"""Reading a checkpoint in two passes: plan from the headers and the configuration, then read.

Nothing is allocated before the plan is accepted. The world is closed: a tensor that is missing, unexpected,
of another shape or of another dtype is an error.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptoss_kernels.mxfp4 import Mxfp4Tensor
from gptoss_workbench.errors import CheckpointError, ModelNotFound, WorkbenchError
from gptoss_workbench.model import layouts
from gptoss_workbench.model.config import ModelConfig
from gptoss_workbench.model.files import AGAIN, TensorHeader, read_header, read_json
from gptoss_workbench.model.layouts import Layout, Sizes, Slot, shorten
from gptoss_workbench.model.weights import LayerWeights, Weights

INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
SAME_PLACE = "take config.json and all safetensors files from the same place"


@dataclass(frozen=True)
class Plan:
    """An accepted checkpoint of which only headers have been read.

    Attributes:
        folder: where the weights are (an ``original`` subfolder when only that is there).
        tensors: every tensor of the model by its name in the files.
    """

    folder: Path
    config: ModelConfig
    layout: Layout
    sizes: Sizes
    tensors: dict[str, TensorHeader]

    @property
    def files(self) -> list[Path]:
        return sorted({tensor.file for tensor in self.tensors.values()})


def read_checkpoint(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[ModelConfig, Weights]:
    """Read a gpt-oss model from a folder, in any layout it is published in.

    Args:
        folder: holds config.json and safetensors files.
        dtype: torch.float32 or torch.bfloat16, for all dense tensors but the float32 norm scales.
        device: where the tensors go. On a CPU what needs no conversion stays mapped from the file, unless the
            environment variable GPTOSS_NO_MMAP is 1 (for network disks on which mapping is slow or unsafe).
    Raises:
        ModelNotFound: no checkpoint in the folder.
        CheckpointError: the checkpoint is damaged, incomplete, or not of gpt-oss.
    """
    plan = plan_checkpoint(folder)
    return plan.config, read_weights(plan, dtype, device)


def plan_checkpoint(folder: str | Path) -> Plan:
    """Read configuration and headers, and check that they describe one complete gpt-oss model.

    Raises:
        ModelNotFound, CheckpointError: as ``read_checkpoint``.
    """
    folder = _checkpoint_folder(Path(folder))
    tensors = _gather_headers(folder)
    layout = layouts.detect(tensors, str(folder))
    config = _read_config(folder, layout)
    rows = None
    if layout.compact:
        embed = tensors.get("model.embed_tokens.rows")
        rows = embed.shape[0] if embed and embed.shape else 0
    sizes = Sizes.of(config, rows)
    _check_sizes(folder, layout, sizes, tensors)
    return Plan(folder, config, layout, sizes, tensors)


def read_weights(plan: Plan, dtype: torch.dtype, device: torch.device | str = "cpu") -> Weights:
    """Read the tensors of an accepted plan, layer by layer."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise WorkbenchError("the model computes in float32 or bfloat16", got=dtype)
    backend = "pread" if os.environ.get("GPTOSS_NO_MMAP") == "1" else "mmap"
    with ExitStack() as stack:
        opened: dict[Path, Any] = {}

        def fetch(slot: Slot) -> Tensor:
            file = plan.tensors[slot.name].file
            try:
                if file not in opened:
                    opened[file] = stack.enter_context(safe_open(file, "pt", backend=backend))
                tensor = opened[file].get_tensor(slot.name)
            except (SafetensorError, OSError) as error:
                raise CheckpointError("a tensor cannot be read", file=str(file), tensor=slot.name,
                                      got=str(error)[:200], hint=AGAIN) from error
            return _converted(tensor, slot.kind, dtype, device)

        top = {slot.field: fetch(slot) for slot in plan.layout.top(plan.sizes)}
        rows = top.get("row_of_token")
        if rows is not None and not 0 <= int(rows.min()) <= int(rows.max()) < plan.sizes.rows:
            raise CheckpointError("a token points past the stored rows", tensor="row_of_token",
                                  file=str(plan.tensors["row_of_token"].file),
                                  expected=f"numbers from 0 to {plan.sizes.rows - 1}",
                                  got=f"numbers from {int(rows.min())} to {int(rows.max())}")
        layers = [_read_layer(plan, index, fetch) for index in range(plan.sizes.num_hidden_layers)]
    return Weights(top["embed"], layers, top["final_norm"], top["unembed"], rows)


def _converted(tensor: Tensor, kind: str, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    if kind == layouts.PACKED:
        return tensor.to(device)
    if kind == layouts.ROWS:
        return tensor.to(torch.int64).to(device)
    if kind == layouts.EXPERT:  # stored (expert, in, out)
        return tensor.to(device, dtype).transpose(1, 2).contiguous()
    return tensor.to(device, torch.float32 if kind == layouts.NORM else dtype)


def _read_layer(plan: Plan, index: int, fetch: Callable[[Slot], Tensor]) -> LayerWeights:
    parts: dict[str, Any] = {slot.field: fetch(slot) for slot in plan.layout.layer(index, plan.sizes)}
    if plan.layout.original:
        widths = [plan.sizes.dims()[letters] for letters in ("q", "kv", "kv")]
        for what in ("weight", "bias"):
            split = parts.pop(f"qkv_{what}").split(widths)
            parts.update(zip((f"q_{what}", f"k_{what}", f"v_{what}"), split, strict=True))
    if plan.layout.packed:
        for what in ("gate_up", "down"):
            parts[what] = Mxfp4Tensor(parts.pop(f"{what}_blocks"), parts.pop(f"{what}_scales"))
    return LayerWeights(**parts)


def _checkpoint_folder(folder: Path) -> Path:
    """The folder itself, or its ``original`` subfolder when only that has weights."""
    if not folder.is_dir():
        raise ModelNotFound("there is no such folder", where=str(folder.absolute()),
                            hint="give the folder that holds config.json and *.safetensors")
    for candidate in (folder, folder / "original"):
        if os.path.lexists(candidate / INDEX) or _safetensors(candidate):
            return candidate
    others = sorted(path.name for path in folder.iterdir())
    listed = ", ".join(others[:6]) + (", ..." if len(others) > 6 else "")
    raise ModelNotFound(
        "the folder holds no checkpoint", where=str(folder.absolute()),
        expected=f"{CONFIG} with {SINGLE}, {INDEX}, or *.safetensors; or the same under original/",
        got=listed or "an empty folder", hint="only safetensors files are read, never pickles or GGUF",
    )


def _safetensors(folder: Path) -> list[Path]:
    """The weights files of a folder, without the hidden ones that some systems put beside them."""
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("."))


def _gather_headers(folder: Path) -> dict[str, TensorHeader]:
    """Every tensor of the folder, from the index if there is one."""
    if os.path.lexists(folder / INDEX):
        return _indexed_headers(folder)
    single = folder / SINGLE
    files = [single] if os.path.lexists(single) else _safetensors(folder)
    tensors: dict[str, TensorHeader] = {}
    for file in files:
        for name, header in read_header(file).items():
            if name in tensors:
                raise CheckpointError("two files hold the same tensor", file=str(file), tensor=shorten(name),
                                      got=f"also in {tensors[name].file.name}", hint=SAME_PLACE)
            tensors[name] = header
    return tensors


def _indexed_headers(folder: Path) -> dict[str, TensorHeader]:
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("the index has no weight_map", file=str(index),
                              expected='"weight_map": {tensor name: file name, ...}',
                              got=repr(weight_map)[:80])
    for name, shard in weight_map.items():
        if not _bare_name(shard):
            raise CheckpointError("the index points outside the checkpoint folder", file=str(index),
                                  tensor=shorten(name), expected="the bare name of a safetensors file",
                                  got=repr(shard)[:80])
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not os.path.lexists(folder / shard)]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(shards)} files named by the index are missing", file=str(index),
            expected=", ".join(missing[:3]) + (", ..." if len(missing) > 3 else ""),
            got=f"{len(shards) - len(missing)} of them in {folder}", hint="download the rest",
        )
    others = [path.name for path in _safetensors(folder) if path.name not in shards]
    if SINGLE in others:
        raise CheckpointError("two checkpoints lie in one folder", file=str(folder / SINGLE),
                              expected=f"{SINGLE}, or an index that names it",
                              got=f"{INDEX} names other files", hint="move one of them away")
    if others:
        warnings.warn(f"{folder}: not in the index, so not read: {', '.join(others)}", stacklevel=2)
    tensors: dict[str, TensorHeader] = {}
    for shard in shards:
        for name, header in read_header(folder / shard).items():
            if weight_map.get(name) != shard:
                entry = weight_map.get(name)
                says = f"the index says {entry}" if entry else "the index has no entry"
                raise CheckpointError("the index does not describe this file", file=str(folder / shard),
                                      tensor=shorten(name), expected=f"{INDEX} to name {shard}", got=says,
                                      hint=SAME_PLACE)
            tensors[name] = header
    absent = next((name for name in weight_map if name not in tensors), None)
    if absent is not None:
        raise CheckpointError("a tensor is not in the file that the index names",
                              file=str(folder / weight_map[absent]), tensor=shorten(absent),
                              expected="to be there", got="no such tensor", hint=SAME_PLACE)
    return tensors


def _bare_name(shard: object) -> bool:
    """A file name without any folder, drive or control character, on every system."""
    if not isinstance(shard, str) or not shard.endswith(".safetensors") or not shard.isprintable():
        return False
    return PurePosixPath(shard).name == shard and PureWindowsPath(shard).name == shard


def _read_config(folder: Path, layout: Layout) -> ModelConfig:
    file = folder / CONFIG
    if not os.path.lexists(file):
        raise CheckpointError("config.json is missing beside the weights", file=str(file), hint=SAME_PLACE)
    data = read_json(file)
    if layout.original and "model_type" not in data:
        return ModelConfig.from_original(data, str(file))
    config = ModelConfig.from_hf(data, str(file))
    generation = folder / "generation_config.json"
    if os.path.lexists(generation):  # where both say when to stop, generation follows this one
        stops = ModelConfig.eos_ids(read_json(generation), str(generation))
        config = replace(config, eos_token_ids=stops or config.eos_token_ids)
    return config


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
    for slot in slots:
        _check_tensor(slot, tensors.get(slot.name), folder, layout)
    known = {slot.name for slot in slots}
    extra = sorted(name for name in tensors if name not in known)
    if extra:
        raise CheckpointError(
            "a tensor that no gpt-oss model has", file=str(tensors[extra[0]].file), tensor=shorten(extra[0]),
            expected=f"{len(known)} tensors ({layout})", got=f"{len(extra)} more", hint=SAME_PLACE,
        )


def _check_tensor(slot: Slot, found: TensorHeader | None, folder: Path, layout: Layout) -> None:
    if found is None:
        raise CheckpointError("a tensor is missing", file=str(folder), tensor=slot.name,
                              expected=f"{slot.dtypes[0]} {list(slot.shape)} ({layout})",
                              got="no such tensor", hint=SAME_PLACE)
    file = str(found.file)
    if found.dtype not in slot.dtypes:
        raise CheckpointError("a tensor has the wrong dtype", file=file, tensor=slot.name,
                              expected=" or ".join(slot.dtypes), got=found.dtype,
                              hint="nothing is converted silently: save the model in bfloat16")
    if found.shape != slot.shape:
        raise CheckpointError("a tensor has the wrong shape", file=file, tensor=slot.name,
                              expected=list(slot.shape), got=list(found.shape), hint=SAME_PLACE)
