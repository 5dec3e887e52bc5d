"""Digests of a checkpoint's files, in the form that ``sha256sum`` writes and reads.

Many kinds of damage leave a checkpoint sound in form: a flipped bit in a weight is another weight. Only a
digest taken where the file was made can tell. A folder may therefore hold a file ``SHA256``, one line a file:
64 hexadecimal digits, two spaces, the bare name. ``sha256sum *.json *.safetensors > SHA256`` makes it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from gptoss_workbench.errors import CheckpointError, CorruptFile, MissingShard
from gptoss_workbench.model.files import again, bare_name, cannot_read, read_bytes, regular_size

MANIFEST = "SHA256"
_LARGEST = 1_000_000  # bytes; a line takes about a hundred
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
_STEP = 1 << 20  # bytes


def read_manifest(folder: str | Path) -> dict[str, str]:
    """The digests that a folder says its files have.

    Returns:
        Bare file name -> sha256 in lower-case hexadecimal, in the order of the manifest; empty without one.
    Raises:
        CheckpointError: the manifest is there and is not one: a line of another form, a name with a folder in
            it, or a file named twice.
    """
    path = Path(folder) / MANIFEST
    if not os.path.lexists(path):
        return {}
    def wrong(got: str) -> CheckpointError:
        return CheckpointError("a manifest of digests cannot be read", file=str(path),
                               expected="a line for each file: sha256, two spaces, bare name", got=got,
                               hint="make it anew with sha256sum")

    digests: dict[str, str] = {}
    for number, line in enumerate(read_bytes(path, _LARGEST).decode("utf-8", "replace").splitlines(), 1):
        found = _LINE.fullmatch(line)
        if found is None or not bare_name(found[2]) or found[2] in digests:
            raise wrong(f"line {number}: {line[:80]!r}")
        digests[found[2]] = found[1].lower()
    if not digests:
        raise wrong("no line at all")
    return digests


def write_manifest(folder: str | Path, names: Iterable[str]) -> Path:
    """Write the manifest of these files of a folder, bare names; returns its path."""
    lines = [f"{file_digest(Path(folder) / name)}  {name}\n" for name in names]
    path = Path(folder) / MANIFEST
    path.write_text("".join(lines))
    return path


def check_manifest(folder: str | Path, files: Iterable[Path], on_bytes: Callable[[int], object] | None = None) -> bool:
    """Hold the files of a folder to its manifest; each file it names is read once.

    Args:
        files: those that are going to be used, each of which must be in the manifest if there is one.
        on_bytes: as for ``file_digest``.
    Returns:
        Whether there was a manifest.
    Raises:
        CorruptFile: a file has another digest.
        MissingShard: a file of the manifest is not there.
        CheckpointError: a file to be used is not in the manifest, or the manifest is damaged.
    """
    folder = Path(folder)
    digests = read_manifest(folder)
    if not digests:
        return False
    for file in files:
        if file.name not in digests:
            raise CheckpointError("the manifest does not name this file", file=str(file),
                                  expected=f"a line for it in {MANIFEST}", got=f"{len(digests)} other files",
                                  hint=f"add it, or delete {MANIFEST} to load without a check")
    for name, digest in digests.items():
        path = folder / name
        if not os.path.lexists(path):
            raise MissingShard(f"a file that {MANIFEST} names is missing", file=str(path), expected=f"sha256 {digest}",
                               got="no such file", hint=again(path))
        found = file_digest(path, on_bytes)
        if found != digest:
            raise CorruptFile(f"the content of a file is not what {MANIFEST} says", file=str(path),
                              expected=f"sha256 {digest}", got=f"sha256 {found}", hint=again(path))
    return True


def file_digest(path: str | Path, on_bytes: Callable[[int], object] | None = None) -> str:
    """The sha256 of a file in lower-case hexadecimal, read in steps of 1 MiB.

    Args:
        on_bytes: called with the number of bytes after each step, for a progress bar.
    Raises:
        CheckpointError: it is missing, not a regular file, or cannot be read.
    """
    path = Path(path)
    regular_size(path)
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            while step := file.read(_STEP):
                digest.update(step)
                if on_bytes is not None:
                    on_bytes(len(step))
    except OSError as error:
        raise cannot_read(path, error) from error
    return digest.hexdigest()
