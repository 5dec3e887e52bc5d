"""From a name to a folder: a local path is taken as it is, ``org/name`` comes from the Hugging Face Hub.

Without a network the Hub's own client tries for half a minute. Here the endpoint is first asked for a bare
connection, and what is already in the cache is used when none comes.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import threading
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from gptoss_workbench.errors import ModelNotFound, WorkbenchError

PATIENCE = 2.0
"""Seconds the endpoint has to accept a connection."""

# The published repositories hold every weight up to three times: original/ and metal/ are left there.
NEEDED = ("config.json", "*.safetensors", "model.safetensors.index.json")
WELCOME = ("generation_config.json", "tokenizer.json")
SUBFOLDERS = "*/*"

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
_CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_YES = {"1", "ON", "YES", "TRUE"}
_ALTERNATIVES = "give a folder with the weights, or use wb.load() for the embedded model"


def resolve(name: str | Path, revision: str | None = None) -> Path:
    """The folder that holds a model, downloaded first if need be.

    Args:
        name: an existing folder, or ``"org/name"`` of a repository on the Hub.
        revision: branch, tag or commit of the repository; its main branch when None.
    Raises:
        ModelNotFound: no such folder or repository, no access to it, or no network and nothing in the cache.
    """
    if not str(name).strip():
        raise ModelNotFound("the name of the model is empty", expected='a folder, or "org/name"')
    folder = Path(name).expanduser()
    if _exists(folder):
        if not folder.is_dir():
            raise ModelNotFound("a file was given where a folder is needed", got=str(folder.absolute()),
                                hint=f"give its folder: {folder.absolute().parent}")
        if revision is not None:
            raise WorkbenchError("a folder has no revisions", where=str(folder.absolute()),
                                 got=f"revision={revision!r}", hint="leave revision out")
        return folder
    if isinstance(name, Path) or _looks_like_path(name):
        raise ModelNotFound("there is no such folder", where=str(folder.absolute()),
                            expected='a folder, or "org/name" of a repository on the Hub',
                            hint="check the spelling, or use wb.load() for the embedded model")
    return _from_hub(name, revision)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for a path, or with a NUL inside
        return False


def _looks_like_path(name: str) -> bool:
    if "://" in name:
        return False
    return name.count("/") != 1 or "\\" in name or name.endswith("/") or name[0] in "/.~"


def _from_hub(name: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except errors.HFValidationError as error:
        raise ModelNotFound("this is not the name of a repository", got=repr(name)[:120],
                            expected='"org/name", e.g. "openai/gpt-oss-20b"',
                            hint=_first_line(error)) from error
    endpoint = constants.ENDPOINT
    offline = constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in _YES
    reachable = not offline and _answers(endpoint)
    asked = f"{name} at revision {revision}" if revision else name

    def snapshot(patterns: list[str], local: bool) -> Path:
        return Path(huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns=[SUBFOLDERS],
            local_files_only=local,
        ))

    try:
        if reachable:
            with suppress(errors.LocalEntryNotFoundError):  # it answered, but not with the files
                return snapshot([*NEEDED, *WELCOME], local=False)
        # What is only welcome must not make a complete cached copy count as incomplete.
        return snapshot([*NEEDED], local=True)
    except errors.GatedRepoError as error:
        raise ModelNotFound("access to this repository must be asked for", where=asked,
                            hint=f"accept its terms at {endpoint}/{name}, then log in with `hf auth login`"
                            ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFound("there is no such repository, or it is private", where=f"{asked} at {endpoint}",
                            got=f"no such folder here either: {Path(name).absolute()}",
                            hint=f"check the spelling, or log in with `hf auth login`; {_ALTERNATIVES}"
                            ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFound("the repository has no such revision", where=name, got=repr(revision),
                            hint="give a branch, a tag or a full commit hash") from error
    except errors.LocalEntryNotFoundError as error:
        raise _not_at_hand(name, revision, offline, reachable, error) from error
    except Exception as error:  # the client's errors differ from version to version
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise _no_room(name, revision, asked) from error
        if isinstance(error, OSError) and error.errno in _CLOSED:
            raise ModelNotFound("the cache of the Hub cannot be written", where=constants.HF_HUB_CACHE,
                                got=f"{error.strerror or type(error).__name__}, for {asked}",
                                hint="set HF_HOME to a folder that you may write to") from error
        raise ModelNotFound("the download failed", where=f"{asked} at {endpoint}",
                            got=f"{type(error).__name__}: {_first_line(error)}",
                            hint=f"try again: finished files are kept; or {_ALTERNATIVES}") from error


def _no_room(name: str, revision: str | None, asked: str) -> ModelNotFound:
    import huggingface_hub
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    needed = "more"
    with suppress(Exception):  # the size is a courtesy
        files = huggingface_hub.HfApi().model_info(name, revision=revision, files_metadata=True).siblings or []
        wanted = [file for file in files if "/" not in file.rfilename
                  and any(fnmatch(file.rfilename, pattern) for pattern in (*NEEDED, *WELCOME))]
        needed = f"{sum(file.size or 0 for file in wanted) / 1e9:.1f} GB"
    return ModelNotFound("the disk is full", where=f"{asked}, to be kept in {cache}", expected=f"{needed} for it",
                         got=f"{shutil.disk_usage(there).free / 1e9:.1f} GB free",
                         hint="make room (`hf cache rm`), or set HF_HOME to a folder on another disk")


def _not_at_hand(name: str, revision: str | None, offline: bool, reachable: bool, error: Exception) -> ModelNotFound:
    from huggingface_hub import constants

    asked = f"{name} at revision {revision}" if revision else name
    partial = type(error).__name__ == "IncompleteSnapshotError"  # absent from older clients
    cached = f"{'only a part of it' if partial else 'no copy'} in the cache {constants.HF_HUB_CACHE}"
    commits = _snapshots(name)
    if commits and not partial:
        return ModelNotFound(f"the cache does not say which commit {revision or 'main'} is", where=asked,
                             expected=f"a file refs/{revision or 'main'} in the cache {constants.HF_HUB_CACHE}",
                             got=f"snapshots without it: {', '.join(commits[:3])}",
                             hint=f"give revision={commits[0]!r}, or run: hf download {name}"
                             + (f" --revision {revision}" if revision else ""))
    if offline:
        problem, hint = "the Hub may not be asked: HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE to download"
    elif reachable:
        problem, hint = "the Hub answered, but not with the model", "try again later"
    else:
        problem, hint = "the Hub cannot be reached", "HF_HUB_OFFLINE=1 asks only the cache, at once"
    return ModelNotFound(problem, where=f"{asked} at {constants.ENDPOINT}",
                         got=f"{cached}, and no folder {Path(name).absolute()}",
                         hint=f"{_ALTERNATIVES}; {hint}")


def _snapshots(name: str) -> list[str]:
    """Commits of a repository that the cache holds files of."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "snapshots"
    return sorted(path.name for path in folder.glob("*") if any(path.iterdir())) if folder.is_dir() else []


def _answers(endpoint: str, patience: float = PATIENCE) -> bool:
    """Whether the endpoint, or the proxy in front of it, accepts a connection within ``patience`` seconds.

    Looking a host name up has no time limit of its own, hence the thread.
    """
    url = urlsplit(endpoint)
    host = url.hostname or ""
    proxy = getproxies().get(url.scheme) if host and not proxy_bypass(host) else None
    if proxy:
        url = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        host = url.hostname or ""
    answered: list[bool] = []

    def connect() -> None:
        try:
            port = url.port or (443 if url.scheme == "https" else 80)
            with socket.create_connection((host, port), timeout=patience):
                answered.append(True)
        except (OSError, ValueError):
            pass

    attempt = threading.Thread(target=connect, daemon=True, name="gptoss-hub-probe")
    attempt.start()
    attempt.join(patience)
    return bool(answered)


def _first_line(error: Any) -> str:
    """One line of a message of somebody else's, without anything that looks like a token."""
    line = next((part.strip() for part in str(error).splitlines() if part.strip()), "no message")
    return re.sub(r"hf_[A-Za-z0-9]{8,}", "hf_...", line)[:200]
