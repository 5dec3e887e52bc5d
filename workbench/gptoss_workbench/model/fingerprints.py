"""What is known of a file's content from where it was made: sums in a manifest, and those the Hub handed out.

The Hub's client keeps the sum that the Hub stated for each file, though it does not check it: as the name of the
blob in its cache, and in ``.cache/huggingface/download`` beside files that went to a folder of one's own. Large
files go by their sha256, small ones by the sha1 that git gives a blob.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import NamedTuple

from gptoss_workbench.model.files import read_bytes
from gptoss_workbench.model.manifest import MANIFEST

PUBLISHED_BYTES = {13_761_264_768: "openai/gpt-oss-20b", 65_248_815_744: "openai/gpt-oss-120b"}
"""Bytes of all tensors together, as the published index states them (``total_size``)."""

_SHA256, _GIT = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
_LARGEST_NOTE = 10_000  # bytes of the client's record of one file
_LARGEST_BLOB = 50_000_000  # bytes; larger files do not go by git's sum


class KnownSum(NamedTuple):
    """What a file should be.

    Attributes:
        kind: "sha256" or "git" (sha1 over ``blob <size>``, a NUL and the content).
        digest: lower-case hexadecimal.
        source: who says so.
    """

    kind: str
    digest: str
    source: str


def known_sum(path: Path, manifest: dict[str, str]) -> KnownSum | None:
    """The sum that a file is known to have; None when nobody stated one. The folder's own manifest comes first."""
    if path.name in manifest:
        return KnownSum("sha256", manifest[path.name], MANIFEST)
    stated = _blob(path) or _note(path)[1]
    if _SHA256.fullmatch(stated):
        return KnownSum("sha256", stated, "the Hub")
    return KnownSum("git", stated, "the Hub") if _GIT.fullmatch(stated) else None


def _blob(path: Path) -> str:
    """The name of the blob that a snapshot's link leads to; empty for any other file.

    Only the first link counts: a blob may be a link itself, to a store whose files go by sums of another kind.
    """
    if not path.is_symlink():
        return ""
    target = Path(os.path.normpath(path.parent.absolute() / os.readlink(path)))
    return target.name if target.parent.name == "blobs" and target.parents[1].name.startswith("models--") else ""


def revision_of(folder: Path) -> str | None:
    """The commit on the Hub that a folder was downloaded from; None when it does not tell."""
    for part, name in zip(folder.absolute().parts, folder.absolute().parts[1:], strict=False):
        if part == "snapshots" and _GIT.fullmatch(name):
            return name
    commit = _note(folder / "config.json")[0]
    return commit if _GIT.fullmatch(commit) else None


def _note(path: Path) -> tuple[str, str]:
    """Commit and sum in the client's record of a file that it put into a folder; empty without one."""
    note = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    if not os.path.lexists(note):
        return "", ""
    lines = [*read_bytes(note, _LARGEST_NOTE).decode("utf-8", "replace").splitlines(), "", ""]
    return lines[0].strip(), lines[1].strip()


def git_digest(path: Path) -> str | None:
    """What git calls the content of a file; None for one too large to be kept by git."""
    if path.stat().st_size > _LARGEST_BLOB:
        return None
    content = read_bytes(path, _LARGEST_BLOB)
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def header_digest(files: list[Path]) -> str:
    """sha256 over names and contents of JSON files, and names and headers of safetensors files.

    It costs no look at the weights, and tells any two models apart whose shapes, layout or configuration differ.
    """
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.name):
        content = _header(path) if path.suffix == ".safetensors" else read_bytes(path)
        digest.update(f"{path.name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        length = file.read(8)
        return length + file.read(int.from_bytes(length, "little"))
