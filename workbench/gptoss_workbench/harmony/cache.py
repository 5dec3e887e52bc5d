"""The folder from which openai-harmony reads the vocabulary: the user's own, or a cache of ours."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from gptoss_workbench.errors import VocabularyError
from gptoss_workbench.harmony.ranks import SHA256

VARIABLE = "TIKTOKEN_ENCODINGS_BASE"
"""The environment variable with which openai-harmony is told where its vocabulary lies."""
FILE = "o200k_base.tiktoken"


def users_own_folder() -> Path | None:
    """The folder that the user's ``TIKTOKEN_ENCODINGS_BASE`` names, checked; None if it is not set.

    Raises:
        VocabularyError: the variable is set, but the file is not there or is another one.
    """
    value = os.environ.get(VARIABLE)
    if not value:
        return None
    path = Path(value) / FILE
    got = sha256_of(path)
    if got != SHA256:
        raise VocabularyError(
            f"{VARIABLE} is set, but does not lead to the o200k vocabulary.", where=str(path),
            expected=f"sha256 {SHA256}", got=f"sha256 {got}" if got else "no readable file",
            hint=f"unset {VARIABLE} to use the vocabulary that comes with gptoss-workbench, or put the "
            f"right {FILE} there",
        )
    return path.parent


def cached_folder(make: Callable[[], bytes]) -> Path:
    """A folder holding the right ``o200k_base.tiktoken``, written now if it is not there yet.

    Tries the per-user cache, then the temporary folder, then a fresh temporary one (which a home that
    cannot be written to, and a temporary folder that is another user's, end in).

    Args:
        make: gives the bytes of the file; called only if it must be written.

    Raises:
        VocabularyError: none of the folders can be written.
    """
    failures = []
    for folder in _candidates():
        path = folder / FILE
        try:
            if sha256_of(path) != SHA256:
                folder.mkdir(parents=True, exist_ok=True)
                _write_once(path, make())
            return folder
        except OSError as error:
            failures.append(f"{folder}: {error.strerror or error}")
    raise VocabularyError(
        "The vocabulary cannot be written anywhere.", expected="4 MB in one folder of these",
        got="; ".join(failures) or "no temporary folder",
        hint=f"make one of them writable, or set {VARIABLE} to a folder with {FILE}",
    )


def sha256_of(path: Path) -> str | None:
    """The sha256 of a file in hex, or None if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _candidates() -> Iterator[Path]:
    base = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    with contextlib.suppress(RuntimeError):  # no home at all
        yield (Path(base) if base else Path.home() / ".cache") / "gptoss-workbench"
    with contextlib.suppress(OSError, KeyError, ImportError):  # a user without a name, or no temporary folder
        yield Path(tempfile.gettempdir()) / f"gptoss-workbench-{getpass.getuser()}"
    with contextlib.suppress(OSError):
        yield Path(tempfile.mkdtemp(prefix="gptoss-workbench-"))


def _write_once(path: Path, data: bytes) -> None:
    """Write under another name and rename: whoever looks sees no file or the whole one."""
    handle, name = tempfile.mkstemp(prefix=FILE, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        try:
            os.replace(name, path)
        except PermissionError:  # Windows: another process has just put the same file there and reads it
            if sha256_of(path) != SHA256:
                raise
    finally:
        Path(name).unlink(missing_ok=True)
