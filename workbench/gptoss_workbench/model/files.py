"""Opening the files of a checkpoint with distrust: regular files only, strict JSON, and what to do about damage."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from gptoss_workbench.errors import CheckpointError, CorruptFile, one_line

LARGEST_JSON = 100_000_000  # bytes; what the safetensors format allows a header to have
_OTHER_FORMATS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file", "run `git lfs pull`, or use `hf download`"),
    (b"GGUF", "a GGUF file", "only safetensors files are read"),
    (b"PK\x03\x04", "a zip or a PyTorch pickle", "only safetensors files are read"),
    (b"\x1f\x8b", "a gzip file", "only safetensors files are read"),
    (b"\x80", "a pickle", "only safetensors files are read"),
    (b"<", "an HTML page: the download was answered by a web page", "log in if need be, and download again"),
)


class Stamp(NamedTuple):
    """What tells that a file is still the one that was looked at."""

    size: int
    modified_ns: int
    device: int
    inode: int


def stamp(path: Path) -> Stamp:
    """The stamp of a regular file.

    Links are followed, as the Hugging Face cache is made of them; what they lead to must be a plain file,
    since opening a named pipe would wait for ever.

    Raises:
        CheckpointError: when it is missing, out of reach, or not a plain file.
    """
    try:
        found = path.stat()
    except OSError as error:
        if path.is_symlink() and not os.path.exists(path):
            raise CheckpointError("a broken link: the cache was moved or cleaned", file=str(path),
                                  got=f"link to {one_line(os.readlink(path))}", hint=again(path)) from error
        raise cannot_read(path, error) from error
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError("not a regular file", file=str(path), expected="a plain file",
                              got=_kind(found.st_mode))
    return Stamp(found.st_size, found.st_mtime_ns, found.st_dev, found.st_ino)


def regular_size(path: Path) -> int:
    """Size of a regular file in bytes; CheckpointError as ``stamp``."""
    return stamp(path).size


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"),
             (stat.S_ISCHR, "a character device"), (stat.S_ISBLK, "a block device"))
    return next((name for test, name in kinds if test(mode)), stat.filemode(mode))


def cannot_read(path: Path, error: OSError) -> CheckpointError:
    """The error to raise for a file that the system will not open or read."""
    if not isinstance(error, PermissionError):
        return CheckpointError("a file cannot be read", file=str(path), got=error.strerror or str(error))
    try:
        found = path.stat()
        got = f"mode {stat.filemode(found.st_mode)}, owner {_owner(found.st_uid)}"
    except OSError:
        got = f"a folder above it is closed to {_owner(os.geteuid())}"
    return CheckpointError("permission denied", file=str(path), expected="a file that you may read", got=got,
                           hint=f"chmod u+r, or ask its owner; you are {_owner(os.geteuid())}")


def _owner(uid: int) -> str:
    try:
        import pwd

        return f"{pwd.getpwuid(uid).pw_name} ({uid})"
    except (ImportError, KeyError):
        return str(uid)


def again(path: Path) -> str:
    """What to do about a damaged or missing file. In a Hugging Face cache, the command that mends it."""
    command = download_command(path)
    if command is None:
        return "delete the file and download it again"
    if not path.exists():
        return f"run: {command}"
    return f"delete {path.resolve()}, then run: {command}"  # the client trusts any blob that is there


def download_command(path: Path) -> str | None:
    """The command that fetches what a snapshot of the Hugging Face cache lacks; None elsewhere."""
    parts = path.absolute().parts
    for repository, snapshots, commit in zip(parts, parts[1:], parts[2:], strict=False):
        if snapshots == "snapshots" and repository.startswith("models--"):
            name = repository.removeprefix("models--").replace("--", "/", 1)
            return f"hf download {name} --revision {commit}"
    return None


def what_it_is(start: bytes) -> tuple[str, str] | None:
    """The format that the first bytes of a file give away, and what to do about it; None when none is known."""
    return next(((what, hint) for magic, what, hint in _OTHER_FORMATS if start.startswith(magic)), None)


def bare_name(name: object) -> bool:
    """Whether it is a file name without any folder, drive or control character, on every system."""
    if not isinstance(name, str) or not name.isprintable() or name in ("", ".", ".."):
        return False
    return PurePosixPath(name).name == name and PureWindowsPath(name).name == name


def read_bytes(path: Path, most: int = LARGEST_JSON) -> bytes:
    """The bytes of a small file.

    Raises:
        CheckpointError: it is missing, no plain file, unreadable, or larger than ``most`` bytes.
    """
    size = regular_size(path)
    if size > most:
        raise CheckpointError("a file is far too large for what it should hold", file=str(path),
                              expected=f"at most {most} bytes", got=f"{size} bytes")
    try:
        return path.read_bytes()
    except OSError as error:
        raise cannot_read(path, error) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, refusing duplicate keys and numbers that are not JSON.

    Raises:
        CheckpointError: naming the file.
    """
    raw = read_bytes(path)
    if not raw:
        raise CorruptFile("empty file (0 bytes)", file=str(path), expected="a JSON object", hint=again(path))
    other = what_it_is(raw)
    if other is not None:
        raise CorruptFile("this is not JSON", file=str(path), got=other[0], hint=other[1])
    return parse_json(raw, path, "the file")


def parse_json(raw: bytes, path: Path, what: str) -> dict[str, Any]:
    """Bytes -> a JSON object, strictly.

    Args:
        what: what the bytes are, e.g. "the file" or "the header".
    Raises:
        CorruptFile: no UTF-8, no JSON, no object, a number that JSON does not have, or a key twice.
    """
    twice: list[tuple[object, str]] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            names = [name for name, _ in items]
            twice.append((found, next(name for name in names if names.count(name) > 1)))
        return found

    def refuse(number: str) -> None:
        raise ValueError(f"{number} is not a JSON number")

    def wrong(problem: str, got: object) -> CorruptFile:
        return CorruptFile(problem, file=str(path), got=one_line(got)[:200], hint=again(path))

    try:
        text = raw.decode("utf-8")
        data = json.loads(text, object_pairs_hook=pairs, parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise wrong(f"{what} is not UTF-8 at byte {error.start}", error.reason) from error
    except json.JSONDecodeError as error:
        place = len(error.doc[:error.pos].encode())
        raise wrong(f"{what} is not JSON at byte {place}", error.msg) from error
    except RecursionError as error:
        raise wrong(f"{what} is nested too deep", "objects in objects in objects ...") from error
    except ValueError as error:  # NaN, Infinity, or an integer of thousands of digits
        raise wrong(f"{what} holds no readable JSON", error) from error
    if not isinstance(data, dict):
        raise CorruptFile(f"{what} must be a JSON object", file=str(path), expected="{...}",
                          got=type(data).__name__, hint=again(path))
    for where, name in twice:
        owner = next((key for key, value in data.items() if value is where), name)
        raise CorruptFile(f"{what} defines {shorten(name)!r} twice", file=str(path), expected="each key once",
                          got=f"two of them under {shorten(owner)!r}" if owner != name else None, hint=again(path))
    return data


def shorten(name: str, most: int = 80) -> str:
    """A name from outside fit for a message: control characters escaped, at most ``most`` characters."""
    text = name[:most + 1].encode("unicode_escape").decode("ascii")
    return text if len(text) <= most else text[:most - 3] + "..."
