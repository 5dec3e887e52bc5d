"""Opening the files of a checkpoint with distrust: regular files only, strict JSON, headers read twice."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from gptoss_workbench.errors import CheckpointError
from gptoss_workbench.model.layouts import shorten

AGAIN = "delete the file and download it again"
_LARGEST_HEADER = 100_000_000  # what the safetensors format allows
_WIDTHS = {"BF16": 2, "F16": 2, "F32": 4, "U8": 1, "I8": 1, "U16": 2, "I32": 4, "I64": 8}
_OTHER_FORMATS = (
    (b"version https://git-lfs", "a Git LFS pointer: run `git lfs pull`, or download with `hf download`"),
    (b"GGUF", "a GGUF file"),
    (b"PK\x03\x04", "a zip or a PyTorch pickle"),
    (b"\x1f\x8b", "a gzip file"),
    (b"\x80", "a pickle"),
    (b"<", "an HTML page: the download was answered by a web page"),
)


class TensorHeader(NamedTuple):
    """What a safetensors header says about one tensor."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def regular_size(path: Path) -> int:
    """Size of a file in bytes.

    Links are followed, as the Hugging Face cache is made of them; what they lead to must be a plain file,
    since opening a named pipe would wait for ever.

    Raises:
        CheckpointError: when it is missing, unreadable, or not a plain file.
    """
    try:
        found = path.stat()
    except OSError as error:
        if path.is_symlink():
            raise CheckpointError("a link leads nowhere: the cache was moved or cleaned", file=str(path),
                                  got=f"link to {os.readlink(path)}", hint=AGAIN) from error
        raise CheckpointError("a file cannot be opened", file=str(path), got=error.strerror) from error
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError("not a regular file", file=str(path), expected="a plain file",
                              got=stat.filemode(found.st_mode))
    return found.st_size


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, refusing duplicate keys and numbers that are not JSON.

    Raises:
        CheckpointError: naming the file.
    """
    if regular_size(path) > _LARGEST_HEADER:
        raise CheckpointError("a JSON file is far too large", file=str(path),
                              expected=f"at most {_LARGEST_HEADER} bytes")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError("a file cannot be read", file=str(path), got=error.strerror) from error
    return _parse(raw, path)


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Names, dtypes and shapes of a safetensors file, without reading a tensor.

    The header is parsed here, strictly, and by the safetensors library, and the two must agree.

    Raises:
        CheckpointError: naming the file, and the tensor as far as one is to blame.
    """
    header = _parse(_header_bytes(path), path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError("the metadata of a safetensors file must be strings", file=str(path))
    tensors = {name: _entry(name, entry, path) for name, entry in header.items()}
    _check_length(header, path)
    try:
        with safe_open(path, "pt") as opened:
            theirs = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            seen = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in theirs.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError("not a sound safetensors file", file=str(path), got=str(error)[:200],
                              hint=AGAIN) from error
    if seen != {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}:
        raise CheckpointError("two readers disagree about the header of this file", file=str(path),
                              hint=AGAIN)
    return tensors


def _header_bytes(path: Path) -> bytes:
    size = regular_size(path)
    try:
        with path.open("rb") as file:
            start = file.read(24)
            for magic, what in _OTHER_FORMATS:
                # A sound file has "{" after eight bytes of length, whatever those look like.
                if start.startswith(magic) and start[8:9] != b"{":
                    raise CheckpointError("this is not a safetensors file", file=str(path), got=what)
            length = int.from_bytes(start[:8], "little")
            if size < 8 or length > min(_LARGEST_HEADER, size - 8):
                says = f"a file of {size} bytes" + (f" whose header would be {length}" if size >= 8 else "")
                raise CheckpointError("not a safetensors file, or one cut short", file=str(path), got=says,
                                      hint=AGAIN)
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError("a file cannot be read", file=str(path), got=error.strerror) from error
    if not raw.startswith(b"{"):
        raise CheckpointError("the header of a safetensors file must begin with '{'", file=str(path),
                              got=repr(raw[:16]), hint=AGAIN)
    return raw


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{shorten(twice)!r} is defined twice", file=str(path), hint=AGAIN)
        return found

    def refuse(number: str) -> None:
        raise ValueError(f"{number} is not a JSON number")

    try:
        data = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise CheckpointError("a file holds no readable JSON", file=str(path), got=str(error)[:200],
                              hint=AGAIN) from error
    if not isinstance(data, dict):
        raise CheckpointError("a file must hold a JSON object", file=str(path), expected="{...}",
                              got=type(data).__name__)
    return data


def _entry(name: str, entry: Any, path: Path) -> TensorHeader:
    def whole(values: Any) -> bool:
        return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)

    right = isinstance(entry, dict) and isinstance(entry.get("dtype"), str) and whole(entry.get("shape"))
    if not right or not whole(entry.get("data_offsets")) or len(entry["data_offsets"]) != 2:
        raise CheckpointError("a tensor is described wrongly in the header", file=str(path),
                              tensor=shorten(name), expected="dtype, shape and data_offsets [begin, end]",
                              got=repr(entry)[:200], hint=AGAIN)
    begin, end = entry["data_offsets"]
    width = _WIDTHS.get(entry["dtype"])
    needed = None if width is None else width * math.prod(entry["shape"])
    if end < begin or needed not in (None, end - begin):
        raise CheckpointError("a tensor's bytes do not fit its shape", file=str(path), tensor=shorten(name),
                              expected=f"{needed} bytes for {entry['dtype']} {entry['shape']}",
                              got=f"{end - begin} bytes", hint=AGAIN)
    return TensorHeader(path, entry["dtype"], tuple(entry["shape"]))


def _check_length(header: dict[str, Any], path: Path) -> None:
    """The commonest damage is an interrupted copy: say how much is missing."""
    with path.open("rb") as file:
        data_starts = 8 + int.from_bytes(file.read(8), "little")
    needed = data_starts + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    size = regular_size(path)
    if size != needed:
        problem = "a safetensors file is cut short" if size < needed else "bytes follow the last tensor"
        raise CheckpointError(problem, file=str(path), expected=f"{needed} bytes", got=f"{size} bytes",
                              hint=AGAIN)
