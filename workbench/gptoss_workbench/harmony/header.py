"""One message's header, read word by word as its tokens come: role, recipient, channel, content type.

Both orders are understood: ``assistant to=functions.f<|channel|>commentary <|constrain|>json`` (as a past
call is rendered) and ``assistant<|channel|>commentary to=functions.f <|constrain|>json`` (as the model
writes it).
"""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
CHANNELS = frozenset({"analysis", "commentary", "final"})

_BLANK = re.compile(rb"[ \t\r\n\f\v]+")
_TOOL = re.compile(r"(functions|browser)\.\S+|python")  # a word that can only be a tool's name
_LONGEST_NAME = max(map(len, ROLES | CHANNELS))
_LONGEST_WORD = 256  # bytes; text after <|end|> that goes on for longer with no blank is no header


@dataclasses.dataclass(slots=True)
class Header:
    """What is known of a header so far. Mutable; :meth:`copy` gives an independent one.

    Attributes:
        started: whether ``<|start|>`` came before it.
        flaw: the first thing found wrong with it, or None.
        length: tokens fed so far, from ``<|start|>`` to ``<|message|>``, both counted.
        stray: it turned out to be no header but text that stands outside any message.
    """

    started: bool = True
    flaw: str | None = None
    length: int = 0
    closed: bool = False
    stray: bool = False
    author: str | None = None
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    _role: str | None = None
    _marked: bool = False  # <|channel|> has come
    _expects: Literal["author", "channel", "format", "junk", "more"] = "author"  # what the next word is
    _word: bytearray = dataclasses.field(default_factory=bytearray)  # the word that is not yet at its end

    @property
    def role(self) -> str | None:
        """One of the five roles, or None while it is not known."""
        if self._role is not None:
            return self._role
        if self.author is not None:
            return "tool" if self.recipient is not None or _TOOL.fullmatch(self.author) else None
        # Only the assistant begins a message with a channel: its turn was opened by what came before.
        return "assistant" if self.channel is not None else None

    def copy(self) -> Header:
        """An independent header in the same state."""
        return dataclasses.replace(self, _word=bytearray(self._word))

    def text(self, data: bytes) -> None:
        """Take the bytes of one text token."""
        first, *others = _BLANK.split(data)
        self._word += first
        for piece in others:
            self._end_word(blank=True)
            self._word += piece
        if not self.started and self._expects == "author" and len(self._word) > _LONGEST_WORD:
            self.stray = True
        self._guess()

    def channel_marker(self) -> None:
        """Take ``<|channel|>``."""
        self._end_word()
        if self._marked or self.channel is not None:
            self.fault("a second <|channel|> in a header")
            self._expects = "junk"
        else:
            self._marked = True
            self._expects = "channel"

    def constrain_marker(self) -> None:
        """Take ``<|constrain|>``."""
        self._end_word()
        self._expects = "format"
        self.content_type = "<|constrain|>"

    def other(self, name: str) -> None:
        """Take a special token that no header may hold."""
        self._end_word()
        self.fault(f"{name} inside a header")

    def end(self, flaw: str | None = None) -> None:
        """The header is over: at ``<|message|>`` (no flaw), or cut off by something else."""
        self._end_word(blank=flaw is not None)
        if flaw is not None:
            self.fault(flaw)
        elif self._marked and self.channel is None:
            self.fault("no name after <|channel|>")
        elif self.author is not None and self.role is None:
            self.fault(f"unknown role {self.author[:40]!r}")
        elif self.role is None or (self.started and self._role is None and self.author is None):
            self.fault("a header without a role")
        elif self.role == "tool" and self.recipient is None:
            self.fault("a tool's message without to=")
        self.closed = True

    def finish(self) -> None:
        """No more tokens come, and none that said so: let the last word count."""
        if not self.closed:
            self._end_word(blank=True)

    @property
    def past_role(self) -> bool:
        """Whether it holds more than a role."""
        return self._marked or self.recipient is not None or self.content_type is not None

    def fault(self, flaw: str) -> None:
        """Remember a flaw, unless an earlier one is."""
        self.flaw = self.flaw or flaw

    def _end_word(self, blank: bool = False) -> None:
        """The word read so far is complete, for a blank (or the end) or a special token follows."""
        if not self._word:
            return
        word = self._word.decode("utf-8", "replace")
        self._word = bytearray()
        if self._expects == "channel":
            self._expects = "more"
            self.channel = word
            if word not in CHANNELS:
                self.fault(f"unknown channel {word[:40]!r}")
        elif self._expects == "format":
            self._expects = "more"
            self.content_type = f"<|constrain|>{word}"
        elif self._expects == "junk":
            self._expects = "more"
        elif word.startswith("to="):
            if self.recipient is not None or word == "to=":
                self.fault("a second recipient" if self.recipient else "no name after to=")
            self.recipient = self.recipient or word[3:] or None
            self._expects = "more"
        elif self._expects == "author":
            self._expects = "more"
            self._take_author(word, blank)
        elif self.recipient is None and _TOOL.fullmatch(word):
            self.recipient = word
            self.fault("a recipient without to=")
        elif self.content_type is None:
            self.content_type = word
        else:
            self.fault(f"{word[:40]!r} in a header")

    def _take_author(self, word: str, blank: bool) -> None:
        role, _, name = word.partition(":")
        if role in ROLES:
            self._role, self.author = role, name or None
        elif not self.started and word in CHANNELS:
            self.channel = word  # "<|end|>commentary to=...": <|start|>assistant<|channel|> was left out
        elif not self.started and blank and not _TOOL.fullmatch(word):
            self.stray = True
        else:
            self.author = word

    def _guess(self) -> None:
        """Let an unfinished word count already while it is the name of a role or a channel."""
        word = self._word.decode("utf-8", "replace") if len(self._word) <= _LONGEST_NAME else ""
        if self._expects == "author":
            self._role = word if word in ROLES else None
        elif self._expects == "channel":
            self.channel = word if word in CHANNELS else None
