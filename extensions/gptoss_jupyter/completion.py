"""Tab completion of what follows ``%gptoss``, which IPython leaves to the magic."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from IPython.core.completer import CompletionContext, SimpleCompletion, SimpleMatcherResult, context_matcher

from gptoss_jupyter.commands import COMMANDS, PUBLISHED

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

_MAGIC = re.compile(r"\s*(?:[\w\s,]+=\s*)?(%%?)gptoss\s+(.*)", re.DOTALL)


def candidates(before: list[str], cell: bool) -> list[str]:
    """What may come after the words before the cursor.

    Args:
        before: the finished words after ``%gptoss``.
        cell: whether it is ``%%gptoss``, which only asks.
    """
    if cell and before[:1] != ["ask"]:
        first = [] if before else ["ask"]
        before = ["ask", *before]
    elif not before:
        return list(COMMANDS)
    else:
        first = []
    parser = COMMANDS.get(before[0])
    if parser is None:
        return []
    if parser.takes_value(before[-1]):
        return parser.values(before[-1])
    if parser.command == "help":
        first = [name for name in COMMANDS if len(before) == 1]
    elif parser.command == "load" and len(before) == 1:
        first = list(PUBLISHED)
    return first + [option for option in parser.options if option not in before]


@context_matcher(identifier="gptoss_magic", priority=100)
def complete_gptoss(context: CompletionContext) -> SimpleMatcherResult:
    """IPython's side of it: the words that fit the fragment under the cursor."""
    found = _MAGIC.fullmatch(context.text_until_cursor)
    if not found:
        return {"completions": [], "suppress": False}
    words = found[2].split()
    fragment = "" if not words or found[2][-1].isspace() else words.pop()
    fitting = [word for word in candidates(words, found[1] == "%%") if word.startswith(fragment)]
    return {
        "completions": [SimpleCompletion(word, type="param") for word in fitting],
        "suppress": bool(fitting),
        "matched_fragment": fragment,
        "ordered": True,
    }


def register(ipython: InteractiveShell) -> None:
    if complete_gptoss not in ipython.Completer.custom_matchers:
        ipython.Completer.custom_matchers.append(complete_gptoss)


def unregister(ipython: InteractiveShell) -> None:
    if complete_gptoss in ipython.Completer.custom_matchers:
        ipython.Completer.custom_matchers.remove(complete_gptoss)
