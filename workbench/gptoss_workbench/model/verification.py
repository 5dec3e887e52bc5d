"""The report of ``wb.verify``: what each file is, what the values are like, and what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gptoss_workbench.errors import WorkbenchError
from gptoss_workbench.model.files import shorten
from gptoss_workbench.model.fingerprints import KnownSum
from gptoss_workbench.model.values import ScaleFindings

_SHOWN = 20  # findings in the printed report


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, in words; ``file`` and ``tensor`` name the place as far as it is known."""

    problem: str
    file: str | None = None
    tensor: str | None = None
    expected: str | None = None
    got: str | None = None

    @classmethod
    def of(cls, error: WorkbenchError) -> Finding:
        expected, got = (None if part is None else str(part) for part in (error.expected, error.got))
        return cls(error.problem, getattr(error, "file", None), getattr(error, "tensor", None), expected, got)

    def __str__(self) -> str:
        place = ", ".join(text for text in (self.file and Path(self.file).name, self.tensor) if text)
        expected = f"expected {self.expected}" if self.expected else ""
        got = f"got {self.got}" if self.got else ""
        more = "; ".join(text for text in (expected, got) if text)
        return (f"{place}: " if place else "") + self.problem + (f" ({more})" if more else "")


@dataclass(frozen=True)
class FileReport:
    """One file of the folder.

    Attributes:
        size: in bytes.
        sha256: as it is, in hexadecimal; None when it could not be read, or the check was stopped before it.
        known: the sum it should have, from a manifest or the Hub; None when nobody states one.
        right: whether the sum is the known one; None when there is none to compare, or none was taken.
    """

    name: str
    size: int
    sha256: str | None
    known: KnownSum | None
    right: bool | None

    def __str__(self) -> str:
        said = {True: "right", False: "WRONG", None: "unknown"}[self.right]
        source = f" ({self.known.source})" if self.known else ""
        return f"{shorten(self.name, 40):40} {self.size:>14,}  {self.sha256 or 'not read':16.16}  {said}{source}"


@dataclass(frozen=True)
class Verification:
    """What ``wb.verify`` found.

    Attributes:
        folder: where the weights are.
        layout: what the checkpoint is, in words; None when it is no complete gpt-oss model.
        files: every file of the folder.
        scales: all MXFP4 scales together; None without any.
        finite, non_finite: how many values of the dense tensors are numbers, and how many are NaN or infinite.
        findings: what is wrong.
        complete: False when the check was stopped early.
        weights_verified: "sha256" when the sum of every weights file is known and right, "size" when no sum is known
            but the tensors have as many bytes as those of a published model, else "none".
    """

    folder: str
    layout: str | None
    files: tuple[FileReport, ...]
    scales: ScaleFindings | None
    finite: int
    non_finite: int
    findings: tuple[Finding, ...]
    complete: bool
    weights_verified: str

    @property
    def ok(self) -> bool:
        """Looked through to the end, and nothing wrong. Whether sums were known is in ``weights_verified``."""
        return self.complete and not self.findings

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        many = f"{len(self.findings)} finding" + ("s" if len(self.findings) > 1 else "")
        state = "sound" if self.ok else many if self.findings else "nothing wrong so far"
        yield f"{self.folder}: {state}" + ("" if self.complete else ", stopped before the end")
        yield f"  {self.layout or 'no complete gpt-oss model'}"
        yield from (f"  {file}" for file in self.files)
        if self.scales is not None:
            s = self.scales
            yield (f"  MXFP4 scales from {s.low} to {s.high}; {s.nans:,} of 255 (NaN), "
                   f"{s.overflows:,} of 253 or more on values")
        yield f"  dense values: {self.finite:,} finite, {self.non_finite:,} not"
        yield f"  weights verified: {self.weights_verified}"
        yield from (f"  - {finding}" for finding in self.findings[:_SHOWN])
        if len(self.findings) > _SHOWN:
            yield f"  - and {len(self.findings) - _SHOWN} more"
