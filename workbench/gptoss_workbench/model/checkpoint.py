"""Reading a checkpoint in two passes: plan from the headers and the configuration, then read.

The plan is ``model/plan.py``. Here it is held against the memory of the machine and against the digests that
the folder may carry, and only then are tensors read, each looked through for values that no model has.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptoss_kernels.mxfp4 import Mxfp4Tensor
from gptoss_workbench.errors import CheckpointError, WorkbenchError
from gptoss_workbench.model import layouts
from gptoss_workbench.model.config import ModelConfig
from gptoss_workbench.model.files import again
from gptoss_workbench.model.layouts import Slot
from gptoss_workbench.model.manifest import check_manifest
from gptoss_workbench.model.memory import Need, check_memory
from gptoss_workbench.model.plan import Plan, plan_checkpoint
from gptoss_workbench.model.shards import CONFIG, INDEX, SINGLE
from gptoss_workbench.model.storage import Storage
from gptoss_workbench.model.values import non_finite, scale_findings
from gptoss_workbench.model.weights import LayerWeights, Weights

__all__ = ["CONFIG", "INDEX", "SINGLE", "Plan", "plan_checkpoint", "read_checkpoint", "read_weights"]


def read_checkpoint(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", *,
    allow_modified_config: bool = False, check_values: bool = True,
    on_plan: Callable[[Plan, Need], object] | None = None,
) -> tuple[ModelConfig, Weights]:
    """Read a gpt-oss model from a folder, in any layout it is published in.

    Args:
        folder: holds config.json and safetensors files, and perhaps SHA256 (see ``model/manifest.py``).
        dtype: torch.float32 or torch.bfloat16, for all dense tensors but the float32 norm scales.
        device: where the tensors go. On a CPU what needs no conversion stays mapped from the file, unless it lies
            on a network disk or the environment variable GPTOSS_NO_MMAP is 1.
        allow_modified_config: see ``plan_checkpoint``.
        check_values: look through every scale and every dense tensor for values out of range; reads them once,
            at the speed of the memory or the disk.
        on_plan: called with the plan and what it takes, before anything is allocated.
    Raises:
        ModelNotFound: no checkpoint in the folder.
        CheckpointError: the checkpoint is damaged, incomplete, or not of gpt-oss; NotEnoughMemory, if it would
            not fit.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise WorkbenchError("the model computes in float32 or bfloat16", got=dtype)
    plan = plan_checkpoint(folder, allow_modified_config=allow_modified_config)
    need = check_memory(plan, dtype, device)
    if on_plan is not None:
        on_plan(plan, need)
    check_manifest(plan.folder, plan.files)
    return plan.config, read_weights(plan, dtype, device, check_values=check_values)


def read_weights(plan: Plan, dtype: torch.dtype, device: torch.device | str = "cpu", *, check_values: bool = True
                 ) -> Weights:
    """Read the tensors of an accepted plan, layer by layer.

    Raises:
        CheckpointError: a file changed since the plan, or a tensor holds values that it cannot have.
    """
    with Storage(plan.tensors, plan.stamps) as storage:

        def fetch(slots: list[Slot]) -> dict[str, Any]:
            raw = {slot.field: storage.tensor(slot.name) for slot in slots}
            for slot in slots:
                if check_values or slot.kind == layouts.ROWS:  # a row that is not there fails in mid-run
                    _check_values(slot, raw, plan)
            return {slot.field: _converted(raw.pop(slot.field), slot.kind, dtype, device) for slot in slots}

        top = fetch(plan.layout.top(plan.sizes))
        layers = [_layer(plan, fetch(plan.layout.layer(index, plan.sizes)))
                  for index in range(plan.sizes.num_hidden_layers)]
        storage.check()
    return Weights(top["embed"], layers, top["final_norm"], top["unembed"], top.get("row_of_token"))


def _converted(tensor: Tensor, kind: str, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    if kind == layouts.PACKED:
        return tensor.to(device)
    if kind == layouts.ROWS:
        return tensor.to(torch.int64).to(device)
    if kind == layouts.EXPERT:  # stored (expert, in, out)
        return tensor.to(device, dtype).transpose(1, 2).contiguous()
    return tensor.to(device, torch.float32 if kind == layouts.NORM else dtype)


def _layer(plan: Plan, parts: dict[str, Any]) -> LayerWeights:
    if plan.layout.original:
        widths = [plan.sizes.dims()[letters] for letters in ("q", "kv", "kv")]
        for what in ("weight", "bias"):
            split = parts.pop(f"qkv_{what}").split(widths)
            parts.update(zip((f"q_{what}", f"k_{what}", f"v_{what}"), split, strict=True))
    if plan.layout.packed:
        for what in ("gate_up", "down"):
            parts[what] = Mxfp4Tensor(parts.pop(f"{what}_blocks"), parts.pop(f"{what}_scales"))
    return LayerWeights(**parts)


def _check_values(slot: Slot, raw: dict[str, Tensor], plan: Plan) -> None:
    """Look through one tensor as stored; ``raw`` has its neighbours too."""
    problem = _out_of_range(slot, raw, plan)
    if problem is not None:
        what, expected, got = problem
        file = plan.tensors[slot.name].file
        raise CheckpointError(what, file=str(file), tensor=slot.name, expected=expected, got=got, hint=again(file))


def _out_of_range(slot: Slot, raw: dict[str, Tensor], plan: Plan) -> tuple[str, str, str] | None:
    """What is wrong with the values of one tensor: problem, expected, got."""
    tensor = raw[slot.field]
    if slot.kind == layouts.ROWS:
        low, high = int(tensor.to(torch.int64).min()), int(tensor.to(torch.int64).max())
        if not 0 <= low <= high < plan.sizes.rows:
            return ("a token points past the stored rows", f"numbers from 0 to {plan.sizes.rows - 1}",
                    f"numbers from {low} to {high}")
    elif slot.kind != layouts.PACKED:
        count, first = non_finite(tensor)
        if count:
            return (f"{count} values are NaN or infinite", "finite numbers only",
                    f"{count} of {tensor.numel()}, the first at {list(first or ())}")
    elif slot.field.endswith("_scales"):
        found = scale_findings(tensor, raw[slot.field.removesuffix("scales") + "blocks"])
        if not found.ok:
            first = torch.unravel_index(torch.tensor(found.first), tensor.shape)
            return ("MXFP4 scales are out of range", "0 to 252; 253 and 254 only on blocks of zeros",
                    f"{found.nans} of 255, {found.overflows} of 253 or more on values, "
                    f"the first at {[int(index) for index in first]}")
    return None
