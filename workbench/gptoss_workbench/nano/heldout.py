"""Which problems are kept for evaluation: a stable hash of a canonical key decides, not a list."""

from __future__ import annotations

import hashlib

HELD_OUT_ONE_IN = 8


def is_held_out(key: str) -> bool:
    """True for one key in eight; the same on every machine and in every version of Python."""
    return hashlib.blake2b(key.encode(), digest_size=4).digest()[0] % HELD_OUT_ONE_IN == 0


def pair_key(task: str, first: object, second: object) -> str:
    """Key of an unordered pair, so that a + b and b + a fall on the same side."""
    low, high = sorted((first, second), key=lambda value: (len(str(value)), str(value)))
    return f"{task}:{low},{high}"
