"""What the weights of a plan will take and what the machine has, compared before anything is allocated.

Numbers are bytes; messages say GB (10^9). Counted are weights alone: activations and the cache come on top.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from gptoss_workbench.errors import NotEnoughMemory
from gptoss_workbench.model import layouts
from gptoss_workbench.model.headers import WIDTHS, TensorHeader
from gptoss_workbench.model.layouts import Slot
from gptoss_workbench.model.mounts import may_map
from gptoss_workbench.model.plan import Plan

STORED_AS = {torch.bfloat16: "BF16", torch.float32: "F32"}
_UNLIMITED = 1 << 60  # control groups write a number like this, or "max"


@dataclass(frozen=True)
class Need:
    """What loading takes.

    Attributes:
        allocated: memory of this machine that is taken.
        mapped: bytes used from the file where they lie; the system may drop them and read them again.
        device: memory of an accelerator.
    """

    allocated: int
    mapped: int
    device: int = 0

    def __str__(self) -> str:
        named = ((self.device, "on the device"), (self.allocated, "of memory"), (self.mapped, "mapped from the files"))
        return " and ".join(f"{gigabytes(count)} {what}" for count, what in named if count) or "nothing"


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def memory_need(plan: Plan, dtype: torch.dtype, device: torch.device | str = "cpu", mapped: bool | None = None) -> Need:
    """What a plan takes when it is read.

    Args:
        dtype: of the dense tensors, torch.float32 or torch.bfloat16.
        mapped: whether files are mapped; found out from where they lie when None.
    """
    if mapped is None:
        mapped = all(map(may_map, plan.files))
    one_layer = plan.layout.layer(0, plan.sizes)
    # What is not mapped is read by the layer, and converted from there.
    passing = 0 if mapped else sum(plan.tensors[slot.name].nbytes for slot in one_layer)
    held = lying = 0
    for slot in plan.layout.all(plan.sizes):
        stored = plan.tensors[slot.name]
        if mapped and _as_stored(slot, stored, dtype):
            lying += stored.nbytes
        else:
            held += stored.nbytes // WIDTHS[stored.dtype] * _width(slot, dtype)
    if torch.device(device).type == "cpu":
        return Need(held + passing, lying)
    return Need(passing, 0, held + lying)


def _as_stored(slot: Slot, stored: TensorHeader, dtype: torch.dtype) -> bool:
    """Whether a tensor is used as it lies in the file, with no copy."""
    if slot.kind == layouts.NORM:
        return stored.dtype == "F32"
    return slot.kind == layouts.PACKED or (slot.kind == layouts.DENSE and stored.dtype == STORED_AS[dtype])


def _width(slot: Slot, dtype: torch.dtype) -> int:
    return {layouts.PACKED: 1, layouts.ROWS: 8, layouts.NORM: 4}.get(slot.kind, dtype.itemsize)


def check_memory(plan: Plan, dtype: torch.dtype, device: torch.device | str = "cpu") -> Need:
    """Compare what a plan takes with what is free, and refuse what cannot fit.

    Warns when mapped weights are more than the free memory: that works, at the speed of the disk.

    Raises:
        NotEnoughMemory: with both numbers, and the smallest way to load the model that does fit.
    """
    device = torch.device(device)
    wanted = memory_need(plan, dtype, device)
    free, free_there = available(), available(device)
    if not _fits(wanted, free, free_there):
        short = wanted.device > free_there
        raise NotEnoughMemory(
            f"the weights do not fit into the memory of {device if short else 'this machine'}", file=str(plan.folder),
            expected=f"{gigabytes(wanted.device if short else wanted.allocated)} free",
            got=f"{gigabytes(free_there if short else free)} free", hint=_way_out(plan, device, free, free_there),
        )
    room = _address_room()
    if room is not None and wanted.mapped + wanted.allocated > room:
        raise NotEnoughMemory("the address space allowed to this process is too small", file=str(plan.folder),
                              expected=str(wanted), got=f"{gigabytes(room)} left of it", hint="raise `ulimit -v`")
    if wanted.allocated + wanted.mapped > free:
        warnings.warn(f"{plan.folder}: {wanted}, with {gigabytes(free)} free. It works, but what does not fit is read "
                      "from the disk again and again.", stacklevel=4)
    return wanted


def _fits(wanted: Need, free: int, free_there: int) -> bool:
    return wanted.allocated <= free and wanted.device <= free_there


def _way_out(plan: Plan, device: torch.device, free: int, free_there: int) -> str:
    """The smallest option that fits, or how much the smallest takes when none does."""
    options = [("dtype=\"bfloat16\"", memory_need(plan, torch.bfloat16, device))]
    if device.type != "cpu":
        options.append(("dtype=\"bfloat16\" on device=\"cpu\"", memory_need(plan, torch.bfloat16, "cpu")))
    if os.environ.get("GPTOSS_NO_MMAP") == "1":
        options.append(("dtype=\"bfloat16\", device=\"cpu\", GPTOSS_NO_MMAP unset",
                        memory_need(plan, torch.bfloat16, "cpu", mapped=True)))
    fitting = [(text, need) for text, need in options if _fits(need, free, free_there)]
    if fitting:
        text, need = fitting[0]
        return f"{text} fits: {need}"
    text, need = min(options, key=lambda option: option[1].allocated + option[1].device)
    packed = "" if plan.layout.packed else f"; with MXFP4 experts the model is about {gigabytes(_packed_size(plan))}"
    return f"nothing fits here: {text} takes {need}{packed}"


def _packed_size(plan: Plan) -> int:
    """Bytes of a checkpoint whose experts would be packed: 17 bytes for 32 values."""
    total = 0
    for slot in plan.layout.all(plan.sizes):
        stored = plan.tensors[slot.name]
        count = stored.nbytes // WIDTHS[stored.dtype]
        total += count * 17 // 32 if slot.kind == layouts.EXPERT else count * 2
    return total


# -- what is free --------------------------------------------------------------------------------------------


def available(device: torch.device | str = "cpu") -> int:
    """Free bytes of a device: of an accelerator what its driver says, else what the system and its control groups
    would still give without swapping."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return _UNLIMITED  # not known; the allocation itself will tell
    return min([_system_memory(), *_group_rooms()])


def _system_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import psutil  # where there is no /proc

    return psutil.virtual_memory().available


def _group_rooms(root: Path = Path("/")) -> Iterator[int]:
    """What each control group of this process still gives, from its own up to the top one."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            base, limit, used, idle = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit, used = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            idle = "total_inactive_file"
        else:
            continue
        group = Path(path.lstrip("/"))
        for part in (group, *group.parents):
            folder = root / base / part
            most, now = _number(folder / limit), _number(folder / used)
            if most is not None and now is not None and most < _UNLIMITED:
                # File pages that nobody touched lately are given back before anything is refused.
                yield max(0, most - now + _statistic(folder / "memory.stat", idle))


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _statistic(file: Path, name: str) -> int:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), 0)


def _address_room() -> int | None:
    """Bytes of address space left under `ulimit -v`; None without such a limit."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit == resource.RLIM_INFINITY:
            return None
        return limit - int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (ImportError, OSError):
        return None
