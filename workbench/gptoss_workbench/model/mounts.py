"""Which file system a file lies on, and so whether to map it into memory."""

from __future__ import annotations

import os
import re
from pathlib import Path

_MOUNTS = Path("/proc/self/mountinfo")
_REMOTE = re.compile(r"nfs|nfs4|lustre|gpfs|fuse.*|9p|cifs|smb.*|beegfs|ceph|afs|panfs|glusterfs")


def file_system(path: Path, mounts: str | None = None) -> str:
    """The type of the file system that a path lies on, links followed, e.g. "ext4" or "nfs4"; "" when unknown.

    Args:
        mounts: the text of /proc/self/mountinfo, which is read when None.
    """
    if mounts is None:
        try:
            mounts = _MOUNTS.read_text()
        except OSError:
            return ""
    place, best, kind = str(path.resolve()), 0, ""
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        if len(left.split()) < 5 or not right:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), left.split()[4]).rstrip("/")
        above = place == point or place.startswith(point + "/")
        if above and len(point) >= best:  # of two mounts on one point, the later one is seen
            best, kind = len(point), right.split()[0]
    return kind


def may_map(path: Path) -> bool:
    """Whether to map a file: not on network disks and user-space file systems, nor when GPTOSS_NO_MMAP is 1."""
    return os.environ.get("GPTOSS_NO_MMAP") != "1" and _REMOTE.fullmatch(file_system(path)) is None
