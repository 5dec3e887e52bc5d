"""Where compiled code is kept, so that only the first process of all waits for the compiler.

numba keeps code beside the source, which an installed package must not need to write to, and it looks only at the one
file a function stands in. So there is a folder for each state of all the files in ``compiled``:
``gptoss-workbench/kernels-<hash>`` in the user's cache folder, or the folder that ``NUMBA_CACHE_DIR`` names.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def keeping() -> Iterator[bool]:
    """While functions are defined inside, numba keeps them in our folder -> whether there is one."""
    from numba.core import config as numba_config

    config: Any = numba_config
    before, ours = config.CACHE_DIR, folder()
    if ours is None:
        yield False
        return
    config.CACHE_DIR = str(ours)
    try:
        yield True
    finally:
        config.CACHE_DIR = before


@cache
def folder() -> Path | None:
    """The first folder that can be written, made if need be; None where there is none and code is not kept."""
    for base in _candidates():
        path = base / f"kernels-{source_hash()}"
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            _check_owner(path)
            with tempfile.TemporaryFile(dir=path):
                return path
        except OSError:
            continue
    return None


@cache
def source_hash() -> str:
    """Of every source file of ``compiled``."""
    state = hashlib.sha256()
    for path in sorted((Path(__file__).parent / "compiled").glob("*.py")):
        state.update(path.read_bytes())
    return state.hexdigest()[:16]


def _check_owner(path: Path) -> None:
    """Code is loaded from here, so a folder that somebody else made in a shared place will not do."""
    if hasattr(os, "getuid") and path.stat().st_uid != os.getuid():
        raise PermissionError(f"{path} belongs to somebody else")


def _candidates() -> Iterator[Path]:
    named = os.environ.get("NUMBA_CACHE_DIR")
    if named:
        yield Path(named)
    base = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    with contextlib.suppress(RuntimeError):  # no home at all
        yield (Path(base) if base else Path.home() / ".cache") / "gptoss-workbench"
    with contextlib.suppress(OSError, KeyError, ImportError):  # a user without a name, or no temporary folder
        yield Path(tempfile.gettempdir()) / f"gptoss-workbench-{getpass.getuser()}"
