"""Looking through the values of a checkpoint's files, a few megabytes at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from gptoss_workbench.model.files import shorten
from gptoss_workbench.model.headers import TensorHeader
from gptoss_workbench.model.values import OVERFLOW, ScaleFindings, non_finite, scale_findings
from gptoss_workbench.model.verification import Finding

_PART = 1 << 24  # bytes of one tensor that are looked at together
_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_DTYPES = {**_FLOATS, "U8": torch.uint8}


class Scan:
    """The values of the tensors, as far as they are looked at: scales of MXFP4, and dense tensors.

    Attributes:
        scales, finite, non_finite: as in ``Verification``, for what was read so far.

    Args:
        headers: every tensor, whether or not they make a model together.
        findings: what is wrong is added here.
    """

    def __init__(self, headers: Mapping[str, TensorHeader], findings: list[Finding]) -> None:
        self._headers, self._findings = headers, findings
        self._begins: dict[Path, dict[str, int]] = {}
        self._blocks = {name: name.removesuffix("scales") + "blocks" for name in headers if name.endswith("scales")}
        self._blocks = {name: blocks for name, blocks in self._blocks.items() if blocks in headers
                        and headers[name].dtype == headers[blocks].dtype == "U8"
                        and headers[blocks].shape == (*headers[name].shape, 16)}
        self._names = [name for name, header in headers.items() if name in self._blocks or header.dtype in _FLOATS]
        self.scales: ScaleFindings | None = None
        self.finite = self.non_finite = 0

    @property
    def nbytes(self) -> int:
        return sum(self._headers[name].nbytes for name in self._names)

    def read(self, file: Path, advance: Callable[[int], object]) -> None:
        """Look through the tensors of one file, telling ``advance`` how many bytes were read.

        The file is not mapped: if it shrinks meanwhile, that must not end the process.
        """
        for name in self._names:
            if self._headers[name].file != file:
                continue
            try:
                (self._read_scales if name in self._blocks else self._read_dense)(name, advance)
            except (OSError, ValueError, KeyError) as error:  # the file became another one since its header was read
                self._findings.append(Finding("a tensor cannot be read", str(file), shorten(name), None,
                                              str(error)[:200]))

    def _read_dense(self, name: str, advance: Callable[[int], object]) -> None:
        wrong, first = 0, None
        for start, part in self._parts(name, self._headers[name].nbytes):
            count, index = non_finite(part)
            self.non_finite += count
            self.finite += part.numel() - count
            wrong += count
            if first is None and index is not None:
                first = (start + index[0], *index[1:]) if index else ()
            advance(part.nbytes)
        if wrong:
            self._findings.append(Finding("values that are NaN or infinite", str(self._headers[name].file),
                                          shorten(name), "finite numbers", f"{wrong:,}, first at {list(first or ())}"))

    def _read_scales(self, name: str, advance: Callable[[int], object]) -> None:
        blocks = self._blocks[name]
        found = None
        for start, part in self._parts(name, self._headers[blocks].nbytes):
            beside = torch.empty(0, 16, dtype=torch.uint8)
            if int(part.max()) >= OVERFLOW:
                beside = self._rows(blocks, start, start + len(part))
            found = merged(found, scale_findings(part, beside))
            advance(part.nbytes)
        self.scales = merged(self.scales, found)
        if found is not None and not found.ok:
            self._findings.append(Finding("MXFP4 scales out of range", str(self._headers[name].file), shorten(name),
                                          "none of 255, and 253 or more on zeros alone",
                                          f"{found.nans:,} of 255, {found.overflows:,} of 253 or more on values"))

    def _parts(self, name: str, nbytes: int) -> Iterator[tuple[int, torch.Tensor]]:
        """A tensor cut along its first dimension, so that ``nbytes`` in all are at most ``_PART`` a piece."""
        count = self._headers[name].shape[0] if self._headers[name].shape else 1
        rows = max(1, _PART * count // max(nbytes, 1))
        for start in range(0, count, rows):
            yield start, self._rows(name, start, min(start + rows, count))

    def _rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Entries start to stop of a tensor's first dimension. The library's own slices read the tensor whole."""
        header = self._headers[name]
        width = header.nbytes // (header.shape[0] if header.shape else 1)
        raw = bytearray((stop - start) * width)
        if header.file not in self._begins:
            self._begins[header.file] = _data_begins(header.file)
        with header.file.open("rb", buffering=0) as file:
            file.seek(self._begins[header.file][name] + start * width)
            view = memoryview(raw)
            while view:
                got = file.readinto(view)
                if not got:
                    raise OSError("the file ends before the tensor does")
                view = view[got:]
        part = torch.frombuffer(raw, dtype=_DTYPES[header.dtype])
        return part.reshape(stop - start, *header.shape[1:]) if header.shape else part[0]


def _data_begins(file: Path) -> dict[str, int]:
    """Where each tensor begins in a file whose header ``read_header`` accepted."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def merged(one: ScaleFindings | None, other: ScaleFindings | None) -> ScaleFindings | None:
    """The findings of two tensors together; ``first`` means nothing any more."""
    if one is None or other is None:
        return one or other
    return ScaleFindings(min(one.low, other.low), max(one.high, other.high), one.nans + other.nans,
                         one.overflows + other.overflows)
