"""The header of a safetensors file, read strictly: which tensors it holds, and that its bytes are theirs alone.

The format: eight bytes of length, little-endian; that many bytes of JSON; the data. The tensors must cover the
data from its first byte to its last without overlaps or holes. The safetensors library reads the header too,
and the two must agree; its own errors name neither file nor, mostly, tensor.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from gptoss_workbench.errors import CheckpointError, CorruptFile, NotEnoughMemory
from gptoss_workbench.model.files import (
    LARGEST_JSON,
    again,
    cannot_read,
    parse_json,
    regular_size,
    shorten,
    what_it_is,
)
from gptoss_workbench.model.mounts import may_map

WIDTHS = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
          "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8}
"""Bytes of one value of each dtype."""
_LARGEST = 2**63 - 1  # bytes; what an offset may be
_MOST_DIMENSIONS = 8  # gpt-oss needs four


class TensorHeader(NamedTuple):
    """What a safetensors header says about one tensor; ``begin`` is the byte of the file where it lies."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int = 0

    @property
    def nbytes(self) -> int:
        return WIDTHS[self.dtype] * math.prod(self.shape)


class _Span(NamedTuple):
    """The bytes [begin, end) of the data that a tensor claims."""

    begin: int
    end: int
    name: str


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Names, dtypes and shapes of a safetensors file, without reading a tensor.

    Raises:
        CheckpointError: naming the file, and the tensor as far as one is to blame.
    """
    raw, size = _header_bytes(path)
    header = parse_json(raw, path, "the header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptFile("the header's __metadata__ must be strings", file=str(path), expected="{text: text, ...}",
                          got=repr(metadata)[:80], hint=again(path))
    tensors: dict[str, TensorHeader] = {}
    spans: list[_Span] = []
    for name, entry in header.items():
        tensors[name], span = _entry(name, entry, path, 8 + len(raw))
        spans.append(span)
    _check_cover(sorted(spans), path, data=size - 8 - len(raw))
    if may_map(path):  # else it is not the library that reads the tensors
        _ask_the_library(path, tensors)
    return tensors


def _header_bytes(path: Path) -> tuple[bytes, int]:
    """The JSON of the header, and the size of the file."""
    size = regular_size(path)
    try:
        with path.open("rb") as file:
            start = file.read(24)
            length = int.from_bytes(start[:8], "little")
            _check_start(path, start, length, size)
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise cannot_read(path, error) from error
    if not raw.startswith(b"{"):
        raise CorruptFile("the header must begin with '{'", file=str(path), expected="{...}", got=repr(raw[:16]),
                          hint=again(path))
    return raw, size


def _check_start(path: Path, start: bytes, length: int, size: int) -> None:
    other = what_it_is(start)
    # A sound file has "{" after eight bytes of length, whatever those look like.
    if other is not None and start[8:9] != b"{":
        raise CorruptFile("this is not a safetensors file", file=str(path), got=other[0], hint=other[1])
    if size < 8:
        problem = "empty file (0 bytes)" if not size else f"too short for a safetensors file ({size} bytes)"
        raise CorruptFile(problem, file=str(path), expected="8 bytes and a header", got=f"{size} bytes",
                          hint=again(path))
    if length > LARGEST_JSON:
        raise CorruptFile("not a safetensors file", file=str(path),
                          expected=f"a header of at most {LARGEST_JSON} bytes",
                          got=f"{length} as its length; the file begins {start[:16]!r}", hint=again(path))
    if length > size - 8:
        raise CorruptFile(f"truncated: the header says {length} bytes, the file has {size}", file=str(path),
                          expected=f"more than {length + 8} bytes", got=f"{size} bytes", hint=again(path))


def _entry(name: str, entry: Any, path: Path, data: int) -> tuple[TensorHeader, _Span]:
    def wrong(problem: str, expected: object, got: object) -> CorruptFile:
        return CorruptFile(problem, file=str(path), tensor=shorten(name), expected=expected, got=str(got)[:200],
                           hint=again(path))

    fields = ("dtype", "shape", "data_offsets")
    if not isinstance(entry, dict):
        raise wrong("a tensor is not described in the header", f"an object with {', '.join(fields)}", repr(entry))
    for field in fields:
        if field not in entry:
            raise wrong(f"the header gives a tensor no {field}", ", ".join(fields), ", ".join(map(shorten, entry)))
    dtype, shape, offsets = (entry[field] for field in fields)
    if not isinstance(dtype, str) or dtype not in WIDTHS:
        raise wrong("unknown dtype", ", ".join(WIDTHS), repr(dtype))
    for field, values in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(values, list) or any(type(value) is not int or value < 0 for value in values):
            raise wrong(f"{field} must be whole numbers from 0", "[0, 1, ...]", f"{field} {values!r}")
    if len(offsets) != 2:
        raise wrong("data_offsets must be two numbers", "[begin, end]", f"data_offsets {offsets}")
    if len(shape) > _MOST_DIMENSIONS or max([*shape, *offsets]) > _LARGEST or math.prod(shape) > _LARGEST // 8:
        raise wrong("a tensor larger than any file", f"at most {_MOST_DIMENSIONS} dimensions, {_LARGEST} bytes",
                    f"{dtype} {shape}")
    if 0 in shape:
        raise wrong("an empty tensor: gpt-oss has none", "at least one value", f"shape {shape}")
    begin, end = offsets
    if end < begin:
        raise wrong("a tensor's offsets run backwards", "[begin, end] with begin < end", f"data_offsets {offsets}")
    tensor = TensorHeader(path, dtype, tuple(shape), data + begin)
    if tensor.nbytes != end - begin:
        raise wrong("a tensor's bytes do not fit its shape", f"{tensor.nbytes} bytes for {dtype} {shape}",
                    f"{end - begin} bytes, data_offsets {offsets}")
    return tensor, _Span(begin, end, name)


def _check_cover(spans: list[_Span], path: Path, data: int) -> None:
    """Hold the tensors, in the order of their bytes, to the length of the data."""
    covered, before = 0, "the header"
    for span in spans:
        name = shorten(span.name)
        if span.begin < covered:
            raise CorruptFile("two tensors claim the same bytes", file=str(path), tensor=f"{before} and {name}",
                              expected=f"{name} to begin at byte {covered} of the data",
                              got=f"{name} at {span.begin} to {span.end}, {before} up to {covered}", hint=again(path))
        if span.begin > covered:
            raise CorruptFile(f"a gap of {span.begin - covered} bytes before a tensor", file=str(path), tensor=name,
                              expected=f"begin at byte {covered} of the data, where {before} ends",
                              got=f"begin at byte {span.begin}", hint=again(path))
        covered, before = span.end, name
    if data < covered:
        raise CorruptFile(f"truncated: {covered - data} bytes are missing", file=str(path),
                          expected=f"{covered} bytes of data", got=f"{data} bytes of data", hint=again(path))
    if data > covered:
        raise CorruptFile(f"{data - covered} unexpected bytes after the last tensor", file=str(path),
                          expected=f"{covered} bytes of data", got=f"{data} bytes of data", hint=again(path))


def no_room_to_map(path: Path) -> NotEnoughMemory:
    """The error for a file that is larger than the address space that is left, as `ulimit -v` sets it."""
    return NotEnoughMemory("a file cannot be mapped", file=str(path),
                           expected=f"{regular_size(path)} bytes of address space", got="less than that",
                           hint="raise `ulimit -v`, or set GPTOSS_NO_MMAP=1, which copies the weights into memory")


def _ask_the_library(path: Path, tensors: dict[str, TensorHeader]) -> None:
    """A second reader of the same bytes, which must see the same: two parsers that differ are how a file lies."""
    try:
        with safe_open(path, "np") as opened:  # which maps for reading only, so that no size is too large
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            seen = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    except MemoryError as error:
        raise no_room_to_map(path) from error
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError("the safetensors library refuses this file", file=str(path), got=str(error)[:200],
                              hint=again(path)) from error
    ours = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    if seen != ours:
        odd = next(name for name in [*ours, *seen] if ours.get(name) != seen.get(name))
        raise CheckpointError("two readers disagree about this file", file=str(path), tensor=shorten(odd),
                              expected=ours.get(odd, "no such tensor"), got=seen.get(odd, "no such tensor"),
                              hint=again(path))
