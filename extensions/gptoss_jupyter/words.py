"""Errors in plain words, for a status line; the traceback goes to the log."""

from __future__ import annotations

import logging

from gptoss_workbench.errors import WorkbenchError

log = logging.getLogger("gptoss_workbench")
log.addHandler(logging.NullHandler())  # without a handler Python prints errors, from whatever thread they are in


def plain_words(error: BaseException) -> str:
    """What went wrong, in at most six lines, with nothing that only a programmer reads."""
    if isinstance(error, WorkbenchError):
        return "\n".join(line.strip() for line in str(error).splitlines())
    log.error("unexpected error in the dashboard", exc_info=error)
    if isinstance(error, UnicodeError):
        return "This text holds half a character and cannot be encoded.\nhint: delete the odd character and type on."
    said = str(error).strip().splitlines()
    return (f"Something unexpected went wrong ({type(error).__name__}): {said[0][:300] if said else 'no details'}\n"
            "hint: the text is kept; the log of gptoss_workbench has the details.")
