"""Which row kernels a processor can run, best first.

| path | processor | experts | bfloat16 matrices |
|---|---|---|---|
| avx512_bf16 | AMD from Zen 4, Intel Sapphire Rapids | ``vpermw``, ``vdpbf16ps`` (``pairs``) | ``vdpbf16ps`` |
| avx2 | x86 since about 2013 | ``vpshufb``, ``vpmaddubsw`` (``digits``) | shift or mask, float32 |
| portable | any that LLVM compiles for | arithmetic, float32 (``floats``) | shift or mask, float32 |
| torch | any, also without numba | ``gptoss_kernels.mxfp4`` | torch |

Float32 activations on avx512_bf16 take the avx2 products.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch

from gptoss_kernels.cpu.products import DIGITS, FLOATS, PAIRS

ENVIRONMENT = "GPTOSS_CPU_PATH"
"""Environment variable that names a path; it is taken, or it is an error."""


@dataclass(frozen=True)
class Path:
    """One way through all kernels.

    Attributes:
        name: as in the table above.
        needs: features of the processor, as LLVM calls them.
        experts: the product with a packed row, by the activations' dtype.
        dense: the product with a bfloat16 row.
        scratch: the decoding into a scratch, by the scratch's dtype.
    """

    name: str
    needs: tuple[str, ...]
    experts: Mapping[torch.dtype, int]
    dense: int
    scratch: Mapping[torch.dtype, int]


PATHS: Mapping[str, Path] = {path.name: path for path in (
    Path("avx512_bf16", ("avx512f", "avx512bw", "avx512bf16", "avx2", "fma"),
         {torch.bfloat16: PAIRS, torch.float32: DIGITS}, PAIRS, {torch.bfloat16: PAIRS, torch.float32: DIGITS}),
    Path("avx2", ("avx2", "fma"),
         {torch.bfloat16: DIGITS, torch.float32: DIGITS}, FLOATS, {torch.bfloat16: DIGITS, torch.float32: DIGITS}),
    Path("portable", (),
         {torch.bfloat16: FLOATS, torch.float32: FLOATS}, FLOATS, {torch.bfloat16: FLOATS, torch.float32: FLOATS}),
)}
"""Best first. The path ``torch`` has no kernels and no entry."""


def why_not(name: str) -> str | None:
    """Why this processor, or this installation, can't take a path; None when it can."""
    if name == "torch":
        return None
    if not _numba():
        return "numba is not installed"
    lacking = [feature for feature in PATHS[name].needs if feature not in features()]
    return f"the processor lacks {', '.join(lacking)}" if lacking else None


@cache
def features() -> frozenset[str]:
    """What the processor has, as LLVM sees it."""
    from llvmlite import binding

    return frozenset(name for name, there in binding.get_host_cpu_features().items() if there)


@cache
def processor() -> str:
    """LLVM's name of the processor."""
    if not _numba():
        return "unknown"
    from llvmlite import binding

    return binding.get_host_cpu_name()


def asked() -> str | None:
    """The path that the environment names.

    Raises:
        RuntimeError: there is no such path, or the processor can't take it.
    """
    name = os.environ.get(ENVIRONMENT) or None
    if name is None:
        return None
    if name != "torch" and name not in PATHS:
        raise RuntimeError(f"{ENVIRONMENT}={name}: expected one of {', '.join((*PATHS, 'torch'))}")
    if why_not(name) is not None:
        raise RuntimeError(f"{ENVIRONMENT}={name}: {why_not(name)}")
    return name


def _numba() -> bool:
    return importlib.util.find_spec("numba") is not None and importlib.util.find_spec("llvmlite") is not None
