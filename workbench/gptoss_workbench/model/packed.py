"""A copy of a model's dense matrices for decoding on a processor, packed without loss (``gptoss_kernels.cpu.packing``).

Two thirds of what a token of gpt-oss-20b reads is bfloat16: attention and unembedding. Packed they are a quarter less.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from gptoss_kernels.cpu import packing
from gptoss_workbench.errors import NotEnoughMemory, WorkbenchError
from gptoss_workbench.model import graphs
from gptoss_workbench.model.memory import available, gigabytes
from gptoss_workbench.model.weights import Weights

if TYPE_CHECKING:
    from gptoss_workbench.model.model import Model

LARGE = 100_000_000
"""Bytes from which on somebody waits and is told."""


def matrices(weights: Weights) -> list[torch.Tensor]:
    """Those that every token reads whole, each once."""
    found = [one for w in weights.layers for one in (w.q_weight, w.k_weight, w.v_weight, w.o_weight)]
    return [*found, weights.unembed]


def pack(model: Model) -> int:
    """Pack what is not packed yet -> bytes of all packed copies. See ``Model.pack``."""
    kernels, every = model.transformer.kernels.name, matrices(model.weights)
    if kernels != "cpu" or model.dtype != "bfloat16":
        raise WorkbenchError("Only the kernels for a processor read packed matrices, and only bfloat16 ones.",
                             expected='a model loaded with dtype="bfloat16" and kernels="cpu"',
                             got=f"{model.dtype}, {kernels} kernels")
    before = sum(one.nbytes for one in every)
    missing = sum(one.nbytes for one in every if packing.of(one) is None) * 3 // 4
    if missing > available():
        raise NotEnoughMemory("the packed matrices do not fit into the memory of this machine",
                              expected=f"{gigabytes(missing)} free", got=f"{gigabytes(available())} free",
                              hint="decode without them: the numbers are the same")
    begun = time.perf_counter()
    try:
        sizes = list(packing.keep(every))
    except RuntimeError as error:
        raise WorkbenchError("This processor can't read packed matrices.", got=str(error),
                             hint="decode without them: the numbers are the same") from error
    graphs.pool(model).clear()  # recordings of the matrices as they were
    if before > LARGE:
        left = sum(one.nbytes for one, size in zip(every, sizes) if not size)
        print(f"{len(every)} matrices, {gigabytes(before)}, packed to {gigabytes(sum(sizes) + left)} in "
              f"{time.perf_counter() - begun:.1f} s", flush=True)
    return sum(sizes)
