"""Which implementation of the kernels computes: explicit, printable, overridable.

An implementation is a module with every function of ``gptoss_kernels.reference`` under the same signature, and

    name: str
    missing(device: torch.device, dtype: torch.dtype) -> str | None    why it cannot compute there, None when it can

It is imported only when it is chosen or listed. ``reference`` is the specification and computes everywhere; the same
tests (``tests/kernels/specification``) hold the others to it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

import torch

ENVIRONMENT = "GPTOSS_KERNELS"
"""Environment variable that names an implementation; an explicit choice in code goes before it."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute, not yet imported.

    Attributes:
        module: import path.
        needs: packages without which importing makes no sense.
        meaning: one line.
    """

    module: str
    needs: tuple[str, ...]
    meaning: str


IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "reference": Implementation("gptoss_kernels.reference", (), "plain torch, the specification; any device"),
    "triton": Implementation("gptoss_kernels.triton", ("triton",), "Triton kernels for an NVIDIA GPU"),
    "cpu": Implementation("gptoss_kernels.cpu", (), "kernels for a processor, compiled by numba where it is there"),
}

PREFERRED: Mapping[str, str] = {"cuda": "triton", "cpu": "cpu"}
"""By device type, what is taken for bfloat16 when nobody asks, if it can compute there.

Anything else is the reference's: float32 is asked for where exactness counts more than speed."""


class KernelsUnavailable(RuntimeError):
    """The implementation that was asked for does not exist or cannot compute here.

    ``expected`` and ``reason`` are parts of the message.
    """

    def __init__(self, name: str, expected: str, reason: str) -> None:
        self.name, self.expected, self.reason = name, expected, reason
        super().__init__(f"kernels {name!r}: {reason} (expected {expected})")


def available(device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16) -> dict[str, str | None]:
    """Every implementation, with the reason why it cannot compute on that device in that dtype, None when it can."""
    return {name: why_not(name, torch.device(device), dtype) for name in IMPLEMENTATIONS}


def why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why one implementation cannot compute there; None when it can."""
    entry = IMPLEMENTATIONS[name]
    for package in (*entry.needs, entry.module):
        if not _installed(package):
            return f"{package} is not installed"
    try:
        module = importlib.import_module(entry.module)
    except Exception as error:  # a compiler package that is there but does not load: a reason, not a crash
        return f"{entry.module} does not load: {type(error).__name__}: {error}"[:200]
    if not hasattr(module, "missing"):
        return f"{entry.module} has no missing()"
    return module.missing(device, dtype)


def choose(asked: str | None = None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16) -> str:
    """The name of the implementation to use: what is asked for, else what the environment names, else the preferred.

    Raises:
        KernelsUnavailable: what was asked for is unknown or cannot compute there. A preferred one that cannot is
            passed over; one that somebody named never is.
    """
    device = torch.device(device)
    name = asked or os.environ.get(ENVIRONMENT) or None
    if name is None:
        preferred = PREFERRED.get(device.type)
        fast = dtype == torch.bfloat16 and preferred is not None and why_not(preferred, device, dtype) is None
        return preferred if fast and preferred else "reference"
    source = "" if asked else f" (from {ENVIRONMENT})"
    if name not in IMPLEMENTATIONS:
        raise KernelsUnavailable(name, " or ".join(IMPLEMENTATIONS), f"there are none of that name{source}")
    reason = why_not(name, device, dtype)
    if reason is not None:
        usable = [other for other, why in available(device, dtype).items() if why is None]
        raise KernelsUnavailable(name, " or ".join(usable), f"{reason}{source}")
    return name


def load(asked: str | None = None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
         ) -> ModuleType:
    """The implementation itself. Arguments and errors as for ``choose``."""
    return importlib.import_module(IMPLEMENTATIONS[choose(asked, device, dtype)].module)


def table(device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16) -> str:
    """A text to print: each implementation, whether it computes there, and which one is chosen."""
    chosen = choose(None, device, dtype)
    lines = []
    for name, reason in available(device, dtype).items():
        state = "chosen" if name == chosen else "available" if reason is None else reason
        lines.append(f"{name:10} {IMPLEMENTATIONS[name].meaning:58} {state}")
    return "\n".join(lines)


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
