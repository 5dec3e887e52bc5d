"""The ids of gpt-oss: which are text, which are harmony's special tokens, which have no row at all."""

from __future__ import annotations

RANKS = 199_998
"""Ids below this are text: each is a rank of the o200k vocabulary."""
SIZE = 201_088
"""Rows of the embedding table; valid ids are 0 .. SIZE - 1."""

STARTOFTEXT, ENDOFTEXT = 199_998, 199_999
RETURN, CONSTRAIN, CHANNEL = 200_002, 200_003, 200_005
START, END, MESSAGE, CALL = 200_006, 200_007, 200_008, 200_012

NAMES = {
    STARTOFTEXT: "<|startoftext|>",
    ENDOFTEXT: "<|endoftext|>",
    RETURN: "<|return|>",
    CONSTRAIN: "<|constrain|>",
    CHANNEL: "<|channel|>",
    START: "<|start|>",
    END: "<|end|>",
    MESSAGE: "<|message|>",
    CALL: "<|call|>",
}
"""The special tokens that mean something; all others are reserved."""

STOPS = frozenset({END, RETURN, CALL})
"""The tokens that end a message."""


def special_name(token: int) -> str:
    """The name of an id that is no text: ``<|end|>``, ``<|reserved_200013|>``, or ``id -1`` outside."""
    if token in NAMES:
        return NAMES[token]
    return f"<|reserved_{token}|>" if RANKS <= token < SIZE else f"id {token}"
