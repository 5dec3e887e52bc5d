"""What every token is: a parser of harmony streams that takes whatever comes and never raises.

openai-harmony's own parser gives messages of text and stops at the first malformed token. This one gives
each token a label (role, channel, recipient, message, field), says what is wrong with it if something is,
and goes on. It reads ids only; bytes are looked up for the words of headers alone.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from gptoss_workbench.harmony import tokens
from gptoss_workbench.harmony.header import Header
from gptoss_workbench.harmony.vocabulary import as_ids, load_vocabulary

if TYPE_CHECKING:
    from gptoss_workbench.harmony.vocabulary import Vocabulary

Field = Literal["header", "content", "control"]


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLabel:
    """What one token is.

    Attributes:
        role: "system", "developer", "user", "assistant" or "tool"; None where no message says so.
        channel: "analysis", "commentary", "final", or what else stands there; None without one.
        recipient: whom the message is for, e.g. "functions.get_weather"; None without ``to=``.
        message: the message's index in the stream, from 0. Text outside any message counts as one too;
            a control token that belongs to none has the index of the message before it.
        field: "header" (the words of a header), "content", or "control" (harmony's special tokens where
            they belong, and others outside content).
        flaw: what is malformed here, as a short text; None if nothing is.
        author: the name behind the role: "functions.get_weather" for a tool, "bob" in "user:bob".
        content_type: e.g. "<|constrain|>json" or "code", as openai-harmony spells it.
    """

    role: str | None
    channel: str | None
    recipient: str | None
    message: int
    field: Field
    flaw: str | None = None
    author: str | None = None
    content_type: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """A stretch of tokens with one label, ids[start:stop] of the stream; see :class:`TokenLabel`."""

    start: int
    stop: int
    ids: tuple[int, ...]
    role: str | None
    channel: str | None
    recipient: str | None
    message: int
    field: Field
    flaw: str | None = None
    author: str | None = None
    content_type: str | None = None


class SpanParser:
    """Labels a stream token by token, each in constant time whatever came before.

    Start it at the beginning of the stream: feed the prompt first, then the generated tokens. While a
    header is being read its tokens are labelled with what is known so far; from ``<|message|>`` on the
    labels are final. (:func:`labels` fills the headers in afterwards.)

    Args:
        vocabulary: whose bytes the words of headers are read from; loaded at the first header otherwise.
    """

    def __init__(self, vocabulary: Vocabulary | None = None) -> None:
        self.position = 0
        """How many tokens were fed."""
        self.header: Header | None = None
        """The header of the current or last message; None for text outside any message."""
        self._vocabulary = vocabulary
        # "begin": nothing yet; "text": plain text outside any message; "after": a message has ended
        self._state: Literal["begin", "text", "header", "content", "after"] = "begin"
        self._message = -1
        self._stop = ""  # the name of the token that ended the last message
        self._plain = TokenLabel(None, None, None, 0, "content")  # the label of text in the current state

    def copy(self) -> SpanParser:
        """A parser in the same state that goes its own way from here."""
        twin = SpanParser(self._vocabulary)
        twin.__dict__.update(self.__dict__)
        twin.header = self.header.copy() if self.header is not None else None
        return twin

    def feed(self, token: int) -> TokenLabel:
        """Take the next id, an integer of any value, and label it."""
        token = operator.index(token)
        self.position += 1
        if token == tokens.START:
            return self._start()
        if self._state == "header":
            return self._in_header(token)
        if self._state == "content":
            return self._in_content(token)
        return self._outside(token)

    @property
    def inside_header(self) -> bool:
        """Whether the next token is expected to belong to a header."""
        return self._state == "header"

    def _start(self) -> TokenLabel:
        flaw = None
        if self._state == "content":
            flaw = "<|start|> inside content"
        elif self._state == "header" and self.header is not None and self.header.flaw is None:
            flaw = "<|start|> inside a header"
        elif self._state == "text" and self._plain.flaw is None:
            flaw = "<|start|> after text outside any message"
        self._begin(Header(length=1))
        return self._label("control", flaw)

    def _outside(self, token: int) -> TokenLabel:
        if 0 <= token < tokens.RANKS and self._state != "after":
            if self._state == "begin":
                self._begin_text(None)
            return self._plain
        if token in (tokens.STARTOFTEXT, tokens.ENDOFTEXT):
            return self._between_documents()
        name = tokens.special_name(token)
        if token in tokens.STOPS:
            flaw = f"{name} after {self._stop}" if self._state == "after" else f"{name} without a message"
            self._state, self._stop = "after", name
            return self._label("control", flaw)
        if token in (tokens.CHANNEL, tokens.CONSTRAIN, tokens.MESSAGE) or 0 <= token < tokens.RANKS:
            # A header without <|start|>. A stream that begins with <|channel|> is what the model wrote
            # after a prompt's `<|start|>assistant`, read on its own, and so no flaw.
            alone = self._state == "begin" and token == tokens.CHANNEL
            missing = f"after {self._stop}" if self._state == "after" else "before this"
            self._begin(Header(started=False, flaw=None if alone else f"no <|start|> {missing}"))
            return self._in_header(token)
        if self._state == "after":
            return self._label("control", f"{name} after {self._stop}")
        if self._state == "begin":
            self._begin_text(None)
        return dataclasses.replace(self._plain, flaw=f"{name} in text")

    def _in_header(self, token: int) -> TokenLabel:
        header = self.header
        assert header is not None
        header.length += 1
        if 0 <= token < tokens.RANKS:
            if self._vocabulary is None:
                self._vocabulary = load_vocabulary()
            header.text(self._vocabulary.token_bytes(token))
            if header.stray:
                self._state = "text"
                self._plain = TokenLabel(None, None, None, self._message, "content", header.flaw)
                return self._plain
            return self._label("header", header.flaw)
        if token == tokens.CHANNEL:
            header.channel_marker()
        elif token == tokens.CONSTRAIN:
            header.constrain_marker()
        elif token == tokens.MESSAGE:
            header.end()
            self._state = "content"
            self._plain = self._label("content")
        elif token in tokens.STOPS:
            header.end(f"{tokens.special_name(token)} inside a header")
            self._state, self._stop = "after", tokens.special_name(token)
        elif token == tokens.ENDOFTEXT:
            header.end("<|endoftext|> inside a header")
            label = self._label("control", header.flaw)
            self._between_documents()
            return label
        else:
            header.other(tokens.special_name(token))
        return self._label("control", header.flaw)

    def _in_content(self, token: int) -> TokenLabel:
        if 0 <= token < tokens.RANKS:
            return self._plain
        name = tokens.special_name(token)
        if token in tokens.STOPS:
            self._state, self._stop = "after", name
            return self._label("control")
        if token == tokens.ENDOFTEXT:
            label = self._label("control", "<|endoftext|> inside a message")
            self._between_documents()
            return label
        return dataclasses.replace(self._plain, flaw=f"{name} inside content")

    def _between_documents(self) -> TokenLabel:
        self._state, self.header = "begin", None
        return self._label("control")

    def _begin(self, header: Header) -> None:
        self._message += 1
        self._state, self.header = "header", header

    def _begin_text(self, flaw: str | None) -> None:
        self._message += 1
        self._state, self.header = "text", None
        self._plain = self._label("content", flaw)

    def _label(self, field: Field, flaw: str | None = None) -> TokenLabel:
        return _label_of(self.header, max(self._message, 0), field, flaw)


def labels(
    ids: Iterable[int],
    vocabulary: Vocabulary | None = None,
    *,
    after: Iterable[int] = (),
    finished: bool = True,
) -> list[TokenLabel]:
    """One label for each token of a stream; the tokens of a header carry all that it says in the end.

    Args:
        ids: the stream, or a part of it; ids of any value.
        vocabulary: see :class:`SpanParser`.
        after: what came before ``ids``, e.g. the prompt of generated tokens. It gets no labels here, but
            messages are counted from its beginning.
        finished: False if the stream still goes on: then a header cut off by its end is no flaw, and its
            last word waits for the rest. (A header that has only named its role, as the last of a prompt,
            never is a flaw.)

    Raises:
        PromptError: ``ids`` are no integers. A malformed stream never raises.
    """
    before = as_ids(after)
    parser = SpanParser(vocabulary)
    found: list[TokenLabel] = []
    headers: list[tuple[int, Header]] = []
    for token in (*before, *as_ids(ids)):
        last = parser.header
        found.append(parser.feed(token))
        if parser.header is not None and parser.header is not last:
            headers.append((len(found) - 1, parser.header))
    for first, header in headers:
        at_end = not header.closed and first + header.length == len(found)
        if at_end and finished and header.past_role:
            header.fault("the stream ends inside a header")
        if finished or not at_end:
            header.finish()
        for at in range(first, first + header.length):
            label = found[at]
            field = "content" if header.stray and label.field == "header" else label.field
            found[at] = _label_of(header, label.message, field, label.flaw or header.flaw)
    return found[len(before):]


def parse(
    ids: Iterable[int],
    vocabulary: Vocabulary | None = None,
    *,
    after: Iterable[int] = (),
    finished: bool = True,
) -> list[Span]:
    """The spans of a stream: contiguous, in order, covering every token; arguments as for :func:`labels`.

    Plain text without any harmony structure is one span of content whose role and channel are None.

    Example:
        >>> [span.channel for span in parse(ids) if span.field == "content"]  # doctest: +SKIP
        [None, None, 'analysis', 'final']
    """
    plain = as_ids(ids)
    spans: list[Span] = []
    start = 0
    for label, group in groupby(labels(plain, vocabulary, after=after, finished=finished)):
        stop = start + sum(1 for _ in group)
        spans.append(
            Span(
                start, stop, tuple(plain[start:stop]), label.role, label.channel, label.recipient,
                label.message, label.field, label.flaw, label.author, label.content_type,
            )
        )
        start = stop
    return spans


def _label_of(header: Header | None, message: int, field: Field, flaw: str | None) -> TokenLabel:
    if header is None or header.stray:
        return TokenLabel(None, None, None, message, field, flaw)
    return TokenLabel(
        header.role, header.channel, header.recipient, message, field, flaw,
        header.author, header.content_type,
    )
