"""What this machine can run: software, hardware, vocabulary, the embedded model, and which published model fits how."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from gptoss_kernels import cpu, select
from gptoss_workbench.errors import WorkbenchError
from gptoss_workbench.model.config import ModelConfig
from gptoss_workbench.model.headers import TensorHeader
from gptoss_workbench.model.layouts import Layout, Sizes
from gptoss_workbench.model.memory import Need, available, gigabytes, memory_need
from gptoss_workbench.model.plan import Plan
from gptoss_workbench.model.published import PUBLISHED

Row = tuple[str, str]

PACKAGES = ("numba", "safetensors", "huggingface-hub", "openai-harmony")
MODELS = ("gpt-oss-20b", "gpt-oss-120b")
WORKING_ROOM = 1_500_000_000
"""Bytes kept free beside the weights: keys and values of a few thousand tokens, and activations."""


@dataclass(frozen=True)
class Fit:
    """Whether a published model has room on a device.

    Attributes:
        model: its name.
        device: "cpu" or "cuda".
        need: bytes that its weights take, bfloat16 with experts packed in MXFP4, as the loader counts them.
        free: bytes free on the device.
        how: "fits"; "from disk" where the weights, mapped, are more than the free memory and are read again and again;
            or "does not fit".
    """

    model: str
    device: str
    need: Need
    free: int
    how: str

    @property
    def ok(self) -> bool:
        return self.how != "does not fit"

    @property
    def wanted(self) -> int:
        """Bytes on the device: weights and working room."""
        weights = self.need.allocated + self.need.mapped if self.device == "cpu" else self.need.device
        return weights + WORKING_ROOM

    def __str__(self) -> str:
        how = "from disk, slowly" if self.how == "from disk" else self.how
        place = "CPU" if self.device == "cpu" else "GPU"
        return f"{place}: {how} ({gigabytes(self.wanted)} wanted, {gigabytes(self.free)} free)"


@dataclass(frozen=True, repr=False)
class Checkup:
    """What ``wb.doctor`` found; prints as a table.

    Attributes:
        rows: (what, finding), always in the same order.
        fits: every published model on every device there is.
    """

    rows: tuple[Row, ...]
    fits: tuple[Fit, ...]

    def __getitem__(self, what: str) -> str:
        """The finding of a row, e.g. ``wb.doctor()["GPU"]``."""
        return dict(self.rows)[what]

    def __repr__(self) -> str:
        width = max(len(what) for what, _ in self.rows)
        return "\n".join(f"{what:{width}}  {finding}" for what, finding in self.rows)


def doctor() -> Checkup:
    """Look at this machine: what is installed, what works, and which model fits how.

    Loads the embedded model and lets it read one token, on each kind of device. Nothing is asked of the network.
    """
    import gptoss_workbench as wb

    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    free = {device: available(device) for device in devices}
    fits = [fit(model, PUBLISHED[model], device, free[device], free["cpu"]) for model in MODELS for device in devices]
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    rows = [
        ("gptoss-workbench", wb.__version__),
        ("python", f"{platform.python_version()} ({platform.system()} {platform.machine()})"),
        ("torch", f"{torch.__version__}, {cuda}, threads: {torch.get_num_threads()}"),
        ("triton", version("triton")),
        ("packages", installed(PACKAGES)),
        ("GPU", "; ".join(_gpus()) or "none that torch can use"),
        *((f"kernels on {device}", _kernels(device)) for device in devices),
        ("cpu kernels", cpu.outlook()),
        ("memory", f"{gigabytes(_total_memory())}, {gigabytes(free['cpu'])} free"),
        *_downloads(),
        ("vocabulary", _vocabulary()),
        ("embedded model", _embedded(devices)),
        *((model, _model(model, [one for one in fits if one.model == model])) for model in MODELS),
    ]
    return Checkup(tuple(rows), tuple(fits))


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def installed(packages: tuple[str, ...]) -> str:
    """Packages and their versions in one line."""
    return ", ".join(f"{package} {version(package)}" for package in packages)


def fit(model: str, config: ModelConfig, device: str, free: int, free_memory: int, mapped: bool = True) -> Fit:
    """Whether a model with experts packed, as it is published, has room on a device.

    Args:
        device: "cpu" or "cuda".
        free: bytes free there.
        free_memory: bytes of this machine's memory that are free.
        mapped: whether its files can be mapped, as on local disks.
    """
    need = memory_need(published_plan(config), torch.bfloat16, device, mapped)
    if device != "cpu":
        room = need.device + WORKING_ROOM <= free and need.allocated <= free_memory
        return Fit(model, device, need, free, "fits" if room else "does not fit")
    if need.allocated + WORKING_ROOM > free:
        return Fit(model, device, need, free, "does not fit")
    whole = need.allocated + need.mapped + WORKING_ROOM <= free
    return Fit(model, device, need, free, "fits" if whole else "from disk")


def published_plan(config: ModelConfig) -> Plan:
    """What the loader would plan for a model of this configuration, in the layout that is published, from no file."""
    layout, sizes = Layout(original=False, packed=True, compact=False), Sizes.of(config)
    tensors = {slot.name: TensorHeader(Path("model.safetensors"), slot.dtypes[0], slot.shape)
               for slot in layout.all(sizes)}
    return Plan(Path(), config, layout, sizes, tensors, {})


def _gpus() -> Iterator[str]:
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        yield (f"{torch.cuda.get_device_name(index)} (sm_{major}{minor}), {gigabytes(total)}, "
               f"{gigabytes(free)} free")


def _kernels(device: str) -> str:
    """What computes there in which dtype unless somebody names another, and why some can't."""
    try:
        used = [f"{select.choose(None, device, dtype)} for {str(dtype).removeprefix('torch.')}"
                for dtype in (torch.bfloat16, torch.float32)]
    except select.KernelsUnavailable as error:
        return f"not usable: {_first_line(error)}"
    return "; ".join([", ".join(used), *(f"no {name}: {why}" for name, why in select.available(device).items() if why)])


def _total_memory() -> int:
    import psutil

    return psutil.virtual_memory().total


def _downloads() -> Iterator[Row]:
    """Where the Hub's client puts models, and whether it may ask the Hub. Tokens are not looked at."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE).expanduser()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    shown = folder
    with contextlib.suppress(ValueError, RuntimeError):
        shown = Path("~") / folder.relative_to(Path.home())
    yield "model downloads", f"{shown}, {gigabytes(shutil.disk_usage(there).free)} of disk free"
    yield "HF_HUB_OFFLINE", os.environ.get("HF_HUB_OFFLINE") or "not set"


def _vocabulary() -> str:
    from gptoss_workbench.harmony.vocabulary import load_vocabulary

    try:
        return f"{len(load_vocabulary())} ids, sha256 right"  # loading it checks it
    except (WorkbenchError, ImportError) as error:
        return f"not usable: {_first_line(error)}"


def _embedded(devices: tuple[str, ...]) -> str:
    """Load it, which holds its file to the sum it was shipped with, and let it read one token."""
    import gptoss_workbench as wb

    said = []
    for device in devices:
        try:
            model = wb.load(device=device)
            sound = bool(model.run([0]).logits.isfinite().all())
        except (WorkbenchError, ImportError, OSError, RuntimeError) as error:
            return f"not usable on {device}: {_first_line(error)}"
        if not sound:
            return f"computes no finite numbers on {device}"
        said.append(f"{model.transformer.kernels.name} kernels on {device}")
    return f"there, sha256 right, runs with {', '.join(said)}"


def _model(model: str, fits: list[Fit]) -> str:
    from huggingface_hub import try_to_load_from_cache

    there = try_to_load_from_cache(f"openai/{model}", "config.json")
    place = "in the cache" if isinstance(there, str) else "not downloaded"
    size = published_plan(PUBLISHED[model]).nbytes
    return "; ".join([f"{gigabytes(size)}, {place}", *map(str, fits)])


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:100]
