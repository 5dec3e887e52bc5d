"""Is a checkpoint what it should be? Its files, sums, headers and values looked through; nothing is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gptoss_workbench.errors import ModelNotFound, WorkbenchError
from gptoss_workbench.model import origin
from gptoss_workbench.model.files import Stamp, stamp
from gptoss_workbench.model.fingerprints import PUBLISHED_BYTES, git_digest, known_sum
from gptoss_workbench.model.headers import TensorHeader, read_header
from gptoss_workbench.model.hub import resolve
from gptoss_workbench.model.manifest import MANIFEST, file_digest, read_manifest
from gptoss_workbench.model.plan import GENERATION, Plan, plan_checkpoint
from gptoss_workbench.model.scan import Scan
from gptoss_workbench.model.shards import CONFIG, INDEX, checkpoint_folder
from gptoss_workbench.model.verification import FileReport, Finding, Verification

Progress = Callable[[int, int], object]
_REPORT = 1 << 23  # bytes between two calls of on_progress


class _Stopped(Exception):
    """Somebody asked to stop."""


class _Meter:
    """Counts bytes, tells them on, and asks whether to go on."""

    def __init__(self, on_progress: Progress | None, should_stop: Callable[[], bool] | None) -> None:
        self.total = self._done = self._told = 0
        self._on_progress, self._should_stop = on_progress, should_stop

    def add(self, count: int) -> None:
        """Raises _Stopped when somebody asked to stop."""
        self._done += count
        if self._done - self._told < _REPORT and self._done < self.total:
            return
        self._told = self._done
        if self._on_progress is not None:
            self._on_progress(self._done, self.total)
        if self._should_stop is not None and self._done < self.total and self._should_stop():
            raise _Stopped


def verify(
    name: str | Path | None = None, *, revision: str | None = None, on_progress: Progress | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Verification:
    """Look through a checkpoint without loading it: sizes, sums, headers, MXFP4 scales, numbers that are not finite.

    Sums are compared with a file ``SHA256`` in the folder, as ``sha256sum`` writes it, and with those that the Hub
    stated at the download. What is found about the weights goes into the provenance of models loaded from the same
    files in this process, before or after.

    Args:
        name, revision: as for ``wb.load``; None for the embedded model.
        on_progress: called with (bytes done, bytes in all). Every byte is read once for its sum, and those of dense
            tensors and of scales once more.
        should_stop: asked between steps of a few megabytes; True ends the check with what it has.

    Returns:
        Verification. Damage is listed there and never raised.

    Raises:
        ModelNotFound: no such folder or repository, or no network to reach it.
    """
    from gptoss_workbench.model.model import EMBEDDED

    given = EMBEDDED if name is None else resolve(name, revision)
    try:
        folder = checkpoint_folder(given)
    except ModelNotFound as error:
        return Verification(str(given), None, (), None, 0, 0, (Finding.of(error),), True, origin.NONE)
    findings: list[Finding] = []
    plan = _try(lambda: plan_checkpoint(folder), findings)
    manifest = _try(lambda: read_manifest(folder), findings) or {}
    stamps = _stamps(folder, findings)
    headers = _headers(stamps, findings)
    values = Scan(headers, findings)
    meter = _Meter(on_progress, should_stop)
    meter.total = sum(found.size for found in stamps.values()) + values.nbytes
    reports: list[FileReport] = []
    complete = True
    try:
        for file, found in stamps.items():
            reports.append(_sum(file, found, manifest, findings, meter))
            values.read(file, meter.add)
    except _Stopped:
        complete = False
        reports += [FileReport(file.name, found.size, None, known_sum(file, manifest), None)
                    for file, found in list(stamps.items())[len(reports):]]
    if complete:
        names = {file.name for file in stamps}
        findings += [Finding(f"{MANIFEST} names a file that is not there", str(folder / absent))
                     for absent in manifest if absent not in names]
        findings += [Finding("the file changed while it was verified", str(file)) for file, found in stamps.items()
                     if _try(lambda file=file: stamp(file), []) != found]
    verdict = _verdict(plan, reports, findings) if complete else origin.NONE
    if complete and plan is not None:
        origin.remember(plan.stamps, verdict)
    return Verification(str(folder), str(plan) if plan else None, tuple(reports), values.scales, values.finite,
                        values.non_finite, tuple(dict.fromkeys(findings)), complete, verdict)


def _try(step: Callable[[], Any], findings: list[Finding]) -> Any:
    """A step whose refusal is a finding; None then."""
    try:
        return step()
    except WorkbenchError as error:
        findings.append(Finding.of(error))
        return None


def _stamps(folder: Path, findings: list[Finding]) -> dict[Path, Stamp]:
    """The files of the folder, by name; not its subfolders, hidden files, and the manifest, which can't sum itself."""
    files = sorted(path for path in folder.iterdir()
                   if not path.name.startswith(".") and path.name != MANIFEST and not path.is_dir())
    stamps = {file: _try(lambda file=file: stamp(file), findings) for file in files}
    return {file: found for file, found in stamps.items() if found is not None}


def _headers(stamps: Mapping[Path, Stamp], findings: list[Finding]) -> dict[str, TensorHeader]:
    """The tensors of every file that can be read, whether or not they make a model."""
    headers: dict[str, TensorHeader] = {}
    for file in stamps:
        if file.suffix == ".safetensors":
            headers |= _try(lambda file=file: read_header(file), findings) or {}
    return headers


def _sum(file: Path, found: Stamp, manifest: dict[str, str], findings: list[Finding], meter: _Meter) -> FileReport:
    """Take a file's sum and hold it to the known one."""
    known = known_sum(file, manifest)
    digest = _try(lambda: file_digest(file, meter.add), findings)
    same_kind = _try(lambda: git_digest(file), findings) if known is not None and known.kind == "git" else digest
    right = None if known is None or same_kind is None else same_kind == known.digest
    if right is False and known is not None:
        findings.append(Finding(f"the content is not what {known.source} states", str(file), None,
                                f"{known.kind} {known.digest}", same_kind))
    return FileReport(file.name, found.size, digest, known, right)


def _verdict(plan: Plan | None, reports: list[FileReport], findings: list[Finding]) -> str:
    if plan is None:
        return origin.NONE
    weights = {file.name for file in plan.files}
    read = weights | {CONFIG, INDEX, GENERATION}
    if any(finding.file is None or Path(finding.file).name in read for finding in findings):
        return origin.NONE
    if all(report.right for report in reports if report.name in weights):
        return origin.SHA256
    return origin.SIZE if plan.nbytes in PUBLISHED_BYTES else origin.NONE
