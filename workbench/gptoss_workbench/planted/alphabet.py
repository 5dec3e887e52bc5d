"""The tokens of the planted models, their features, and what the unembedding says.

Ids are those of the printable characters in the harmony vocabulary, so prompts can be read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptoss_workbench.planted.blueprint import ANSWER, ASIDE, IDENTITY, SYMBOLS, VOCAB, WIDTH, block, flag

UPPER = tuple(range(32, 32 + SYMBOLS))  # A to L: what is said and answered
LOWER = tuple(range(64, 64 + SYMBOLS))  # a to l: what is asked about
DIGITS = tuple(range(15, 15 + SYMBOLS - 2))  # 0 to 9: reasoning
FILLERS = tuple(range(3, 9))  # punctuation that names nothing
START, ASK, ON, OFF, THINK, END = 0, 30, 10, 12, 28, 13  # ! ? + - = .
FIRST_KIND, SECOND_KIND = LOWER[: SYMBOLS // 2], LOWER[SYMBOLS // 2 :]

SPOKEN = 2.0  # gain of the unembedding


def embedding() -> Tensor:
    """(vocab, d): a letter or digit has its identity and its class, a mark its flag."""
    table = torch.zeros(VOCAB, WIDTH)
    identities = block(IDENTITY)
    for ids, name in ((UPPER, "upper"), (LOWER, "lower"), (DIGITS, "digit")):
        for number, id in enumerate(ids):
            table[id] = identities[number] + flag(name)
    for id, names in ((START, ["start"]), (ASK, ["ask"]), (ON, ["switch", "on"]), (OFF, ["switch"]),
                      (THINK, ["think"]), (END, ["end"])):
        table[id] = flag(*names)
    return table


def two_kinds(table: Tensor) -> Tensor:
    """The embedding where a to f and g to l are the same six things, of a first and of a second kind."""
    table = table.clone()
    for ids, kind in ((FIRST_KIND, "first kind"), (SECOND_KIND, "second kind")):
        for number, id in enumerate(ids):
            table[id] = block(IDENTITY)[number] + flag("lower", kind)
    return table


def unembedding() -> Tensor:
    """(vocab, d): upper-case letters are read from one block, nothing else is ever said."""
    table = torch.zeros(VOCAB, WIDTH)
    table[list(UPPER)] = SPOKEN * block(ANSWER)
    return table


def with_digits(table: Tensor) -> Tensor:
    """The unembedding that says digits too, from a block of their own, and the end mark after a digit."""
    table = table.clone()
    table[list(DIGITS)] = 2 * SPOKEN * block(ASIDE)[: len(DIGITS)]
    table[END] = 3 * SPOKEN * flag("digit")
    return table
