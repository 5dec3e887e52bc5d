"""``%gptoss doctor``: what is installed here, whether it is whole, and which models fit."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import platform
from importlib import resources
from pathlib import Path

Row = tuple[str, str]

PACKAGES = ("triton", "numba", "openai-harmony", "jupyterlab", "ipykernel", "ipywidgets", "anywidget", "plotly")
PUBLISHED = {"gpt-oss-20b": 13.8e9, "gpt-oss-120b": 65.2e9}
"""Bytes of the published weights, experts packed."""
WORKING_ROOM = 1.5e9
"""Bytes kept free beside the weights: keys and values of a few thousand tokens, and activations."""


def report() -> str:
    """All findings as text, a line each, always in the same order."""
    found = rows()
    width = max(len(name) for name, _ in found)
    return "\n".join(f"{name:{width}}  {finding}" for name, finding in found)


def rows() -> list[Row]:
    """(what, finding) pairs."""
    import psutil

    import gptoss_workbench as wb

    memory = psutil.virtual_memory()
    gpu = _gpu()
    return [
        ("gptoss-workbench", wb.__version__),
        ("python", f"{platform.python_version()} ({platform.system()} {platform.machine()})"),
        ("torch", _torch()),
        *((name, version(name)) for name in PACKAGES),
        ("GPU", "none" if gpu is None else f"{gpu[0]}, {gigabytes(gpu[2])}, {gigabytes(gpu[1])} free"),
        ("memory", f"{gigabytes(memory.total)}, {gigabytes(memory.available)} free"),
        ("model downloads", _hub_cache()),
        ("vocabulary", _vocabulary()),
        ("embedded model", _embedded()),
        *((name, fit(size, memory.available, gpu[1] if gpu else None)) for name, size in PUBLISHED.items()),
    ]


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


def fit(size: float, memory: float, gpu_memory: float | None) -> str:
    """Where a model of ``size`` bytes has room, given the free bytes of memory and of the GPU, if there is one."""
    needed = size + WORKING_ROOM
    if gpu_memory is not None and gpu_memory >= needed:
        return f"fits on the GPU ({gigabytes(needed)} needed)"
    if memory >= needed:
        return f"fits in memory, computed on the CPU ({gigabytes(needed)} needed)"
    most = max(memory, gpu_memory or 0.0)
    return f"does not fit: {gigabytes(needed)} needed, {gigabytes(most)} free"


def _torch() -> str:
    import torch

    return f"{torch.__version__}, {torch.get_num_threads()} threads"


def _gpu() -> tuple[str, int, int] | None:
    """Name, free and total bytes of the GPU that torch would use."""
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return torch.cuda.get_device_name(), free, total


def _hub_cache() -> str:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE).expanduser()
    with contextlib.suppress(ValueError, RuntimeError):
        folder = "~" / folder.relative_to(Path.home())
    return str(folder)


def _vocabulary() -> str:
    from gptoss_workbench.errors import VocabularyError
    from gptoss_workbench.harmony.vocabulary import load_vocabulary

    try:
        return f"{len(load_vocabulary())} ids, sha256 right"  # loading it checks it
    except VocabularyError as error:
        return f"not usable: {error}"


def _embedded() -> str:
    assets = resources.files("gptoss_workbench.nano").joinpath("assets")
    wrong = []
    for line in assets.joinpath("SHA256").read_text().splitlines():
        expected, name = line.split()
        file = assets.joinpath(name)
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != expected:
            wrong.append(name)
    return f"damaged: {', '.join(wrong)}; install the package again" if wrong else "there, sha256 right"
