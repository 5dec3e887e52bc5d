"""Compile a Triton kernel ahead for a GPU that is not there, and read what the machine code does."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Code:
    """One kernel for one architecture.

    Attributes:
        registers: of a thread.
        spilled: bytes of local memory of a thread; 0 when everything stays in registers.
        stack: bytes of its stack.
        shared: bytes of shared memory of a program.
        ptx: the text that the assembler got.
        instructions: how often each machine instruction occurs, with its modifiers, e.g. ``LDG.E.128``.
    """

    registers: int
    spilled: int
    stack: int
    shared: int
    ptx: str
    instructions: Counter[str]

    @property
    def spilled_anything(self) -> bool:
        return self.spilled > 0 or self.stack > 0

    def count(self, *beginnings: str) -> int:
        """Instructions whose name begins with one of these."""
        return sum(n for name, n in self.instructions.items() if name.startswith(beginnings))

    def widest_load(self) -> int:
        """Bits of the widest load from global memory by a thread, in plain or asynchronous form."""
        names = [name for name in self.instructions if name.startswith(("LDG", "LDGSTS"))]
        widths = [int(bits) for name in names for bits in re.findall(r"\.(64|128)\b", name)]
        return max(widths, default=32 if names else 0)


def compile_ahead(
    kernel: Any, arguments: dict[str, Any], architecture: int, warps: int = 4, aligned: bool = True,
) -> Code:
    """Compile for compute capability ``architecture`` (80, 90, ...).

    Args:
        arguments: by name, in any order: a type such as ``"*bf16"`` or ``"i32"`` for what is passed at run time,
            a value for what is fixed.
        aligned: whether pointers count as multiples of 16 bytes, as those of torch are.
    """
    signature, fixed, promises = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if isinstance(value, str):
            signature[name] = value
            if value.startswith("*") and aligned:
                promises[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            fixed[(index,)] = value
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=promises)
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32),
                          options={"num_warps": warps})
    with tempfile.TemporaryDirectory() as folder:
        cubin = os.path.join(folder, "kernel.cubin")
        Path(cubin).write_bytes(made.asm["cubin"])
        usage, machine_code = _tool("cuobjdump", "-res-usage", cubin), _tool("nvdisasm", cubin)

    def resource(name: str) -> int:
        return int(re.findall(rf"\b{name}:(\d+)", usage)[-1])

    names = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", machine_code, re.MULTILINE)
    return Code(resource("REG"), resource("LOCAL"), resource("STACK"), resource("SHARED"), made.asm["ptx"],
                Counter(names))


@functools.cache
def compile_once(
    kernel: Any, arguments: tuple[tuple[str, Any], ...], architecture: int, warps: int = 4, aligned: bool = True,
) -> Code:
    """``compile_ahead`` of arguments as pairs, remembered."""
    return compile_ahead(kernel, dict(arguments), architecture, warps, aligned)


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
