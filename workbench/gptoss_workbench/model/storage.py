"""Reading tensors from the files of a plan: mapped from local disks, copied from network ones.

A mapped file that somebody shortens kills the process that touches the lost part (SIGBUS), and no Python code
can catch that. So each file is looked at again before each of its tensors and once more at the end, which
leaves the moment of the read itself, and a file shortened in place after loading. Files that are replaced by a
new one of the same name, as downloads do, are harmless. GPTOSS_NO_MMAP=1 maps nothing.

Neither is left to the safetensors library. It maps a file for a moment to read its header even when told to copy,
and it maps for torch in a way that Linux refuses when the file is larger than memory and swap together.
"""

from __future__ import annotations

import errno
import mmap
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from io import FileIO
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from gptoss_workbench.errors import CheckpointError, CorruptFile
from gptoss_workbench.model.files import Stamp, again, cannot_read, stamp
from gptoss_workbench.model.headers import TensorHeader, no_room_to_map
from gptoss_workbench.model.mounts import may_map

_DTYPES = {"U8": torch.uint8, "U16": torch.uint16, "I32": torch.int32, "I64": torch.int64, "BF16": torch.bfloat16,
           "F32": torch.float32}
"""Those that a layout may hold."""
_NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux, which Python names from 3.13 on
_STEP = 1 << 30  # bytes; one read of the system gives at most two of these


class Storage:
    """The tensors of a plan, read one at a time. A context manager: files close at its end, mappings live on.

    Args:
        tensors: what the headers said.
        stamps: what each file looked like when its header was read.
    """

    def __init__(self, tensors: Mapping[str, TensorHeader], stamps: Mapping[Path, Stamp]) -> None:
        self._tensors, self._stamps = tensors, stamps
        self._maps: dict[Path, mmap.mmap] = {}
        self._files: dict[Path, FileIO] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Storage:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        self._stack.close()

    def tensor(self, name: str) -> Tensor:
        """One tensor as stored, on the CPU; mapped where its file may be.

        Raises:
            CheckpointError: its file changed since the plan, or cannot be read.
        """
        file = self._tensors[name].file
        self._check(file)
        try:
            if file not in self._files:
                self._open(file)
            return self._lying(name) if file in self._maps else self._copied(name)
        except OSError as error:
            self._check(file, name)  # the likelier reason, and the clearer message
            if error.errno == errno.ENOMEM:
                raise no_room_to_map(file) from error
            raise cannot_read(file, error) from error
        except ValueError as error:
            self._check(file, name)
            raise CheckpointError("a tensor cannot be read", file=str(file), tensor=name, got=str(error)[:200],
                                  hint=again(file)) from error

    def _open(self, path: Path) -> None:
        file = self._files[path] = self._stack.enter_context(path.open("rb", buffering=0))
        if may_map(path):
            try:
                self._maps[path] = _private_map(file)
            except OSError as error:
                if error.errno != errno.ENODEV:  # a file system that cannot map
                    raise

    def _lying(self, name: str) -> Tensor:
        header = self._tensors[name]
        flat = torch.frombuffer(self._maps[header.file], dtype=_DTYPES[header.dtype], count=prod(header.shape),
                                offset=header.begin)
        return flat.view(header.shape)

    def _copied(self, name: str) -> Tensor:
        header = self._tensors[name]
        file, done = self._files[header.file], 0
        tensor = torch.empty(header.shape, dtype=_DTYPES[header.dtype])
        room = tensor.view(-1).view(torch.uint8).numpy().data
        file.seek(header.begin)
        while done < len(room):
            count = file.readinto(room[done:done + _STEP])
            if not count:
                raise ValueError(f"the file ends {len(room) - done} bytes too early")
            done += count
        return tensor

    def check(self) -> None:
        """Look at every file once more; CheckpointError when one changed while it was read."""
        for file in self._stamps:
            self._check(file)

    def _check(self, file: Path, tensor: str | None = None) -> None:
        before, now = self._stamps[file], stamp(file)
        if now != before:
            raise CorruptFile("a file changed while the model was loading", file=str(file), tensor=tensor,
                              expected=f"{before.size} bytes, as when its header was read",
                              got=f"{now.size} bytes" + (", written to" if now.size == before.size else ""),
                              hint="wait until nothing writes to the folder any more, then load again")


def _private_map(file: FileIO) -> mmap.mmap:
    """A mapping that may be written to, which changes memory and not the file; no memory is set aside for that."""
    if sys.platform == "linux":
        return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | _NO_RESERVE,
                         prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
