"""Harmony, the message format of gpt-oss: vocabulary, conversations, and spans of what is what.

Nothing heavy is imported before it is asked for: ``parse`` needs openai-harmony only for headers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptoss_workbench.harmony.conversation import chat, render
    from gptoss_workbench.harmony.spans import Span, SpanParser, TokenLabel, labels, parse
    from gptoss_workbench.harmony.vocabulary import Vocabulary, load_vocabulary

_HOMES = {
    "chat": "conversation",
    "render": "conversation",
    "Span": "spans",
    "SpanParser": "spans",
    "TokenLabel": "spans",
    "labels": "spans",
    "parse": "spans",
    "Vocabulary": "vocabulary",
    "load_vocabulary": "vocabulary",
}

__all__ = [
    "Span",
    "SpanParser",
    "TokenLabel",
    "Vocabulary",
    "chat",
    "labels",
    "load_vocabulary",
    "parse",
    "render",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
