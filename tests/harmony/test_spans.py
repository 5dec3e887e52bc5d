"""Spans of well-formed and of malformed streams, case by case."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from gptoss_workbench.errors import PromptError
from gptoss_workbench.harmony import (
    Span,
    SpanParser,
    chat,
    labels,
    load_vocabulary,
    parse,
    render,
    tokens,
)

MESSAGE = "<|start|>assistant<|channel|>final<|message|>"
FINAL = ("assistant", "final", None)
NOTHING = (None, None, None)
PROMPT = "<|start|>user<|message|>Hi<|end|><|start|>assistant"
CALL = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"


def seen(vocabulary, text, **arguments):
    """Spans as (text, role, channel, recipient, message, field letters), and the set of flaws."""
    spans = parse(vocabulary.encode(text), vocabulary, **arguments)
    rows = [(vocabulary.decode(s.ids), s.role, s.channel, s.recipient, s.message, s.field) for s in spans]
    return rows, {s.flaw for s in spans} - {None}


def contents(vocabulary, text):
    """(text, role, channel, recipient) of each stretch of content, and the set of flaws."""
    rows, flaws = seen(vocabulary, text)
    return [row[:4] for row in rows if row[5] == "content"], flaws


def test_a_whole_exchange(vocabulary):
    rows, flaws = seen(vocabulary, PROMPT + "<|channel|>final<|message|>Hello.<|return|>")
    user, answer = ("user", None, None, 0), ("assistant", "final", None, 1)
    assert rows == [
        ("<|start|>", *user, "control"), ("user", *user, "header"), ("<|message|>", *user, "control"),
        ("Hi", *user, "content"), ("<|end|>", *user, "control"),
        ("<|start|>", *answer, "control"), ("assistant", *answer, "header"),
        ("<|channel|>", *answer, "control"), ("final", *answer, "header"),
        ("<|message|>", *answer, "control"), ("Hello.", *answer, "content"),
        ("<|return|>", *answer, "control"),
    ]
    assert not flaws


@pytest.mark.parametrize(
    "header",
    [
        "assistant to=functions.f<|channel|>commentary <|constrain|>json",
        "assistant to=functions.f<|channel|>commentary<|constrain|>json",
        "assistant<|channel|>commentary to=functions.f <|constrain|>json",
        "assistant<|channel|>commentary to=functions.f<|constrain|> json",
    ],
)
def test_both_orders_of_a_call(vocabulary, header):
    spans = parse(vocabulary.encode(f"<|start|>{header}<|message|>{{}}<|call|>"), vocabulary)
    assert {(s.role, s.channel, s.recipient, s.content_type, s.author, s.flaw) for s in spans} == {
        ("assistant", "commentary", "functions.f", "<|constrain|>json", None, None)
    }


def test_a_tools_answer_and_a_named_user(vocabulary):
    tool = "<|start|>functions.f to=assistant<|channel|>commentary<|message|>3<|end|>"
    spans = parse(vocabulary.encode(tool + "<|start|>user:bob<|message|>x<|end|>"), vocabulary)
    assert {(s.role, s.author, s.channel, s.recipient, s.flaw) for s in spans} == {
        ("tool", "functions.f", "commentary", "assistant", None), ("user", "bob", *NOTHING),
    }


def test_plain_text_needs_no_vocabulary(monkeypatch):
    monkeypatch.setattr("gptoss_workbench.harmony.spans.load_vocabulary", lambda: pytest.fail("loaded"))
    assert parse([5, 6, 7]) == [Span(0, 3, (5, 6, 7), None, None, None, 0, "content")]
    begun = parse([tokens.STARTOFTEXT, 5, 6])
    assert begun == [
        Span(0, 1, (tokens.STARTOFTEXT,), None, None, None, 0, "control"),
        Span(1, 3, (5, 6), None, None, None, 0, "content"),
    ]
    padded = parse([tokens.ENDOFTEXT, tokens.ENDOFTEXT, 5])
    assert [(s.message, s.field, s.flaw) for s in padded] == [(0, "control", None), (0, "content", None)]
    assert parse([]) == [] and labels([]) == []


def test_a_prompt_is_no_flaw_and_goes_on(vocabulary):
    prompt = render(vocabulary, chat("Hi", developer="Be brief."))
    completion = vocabulary.encode(f"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant{CALL}")
    assert {span.flaw for span in parse(prompt, vocabulary)} == {None}
    alone = parse(completion, vocabulary, after=prompt)
    assert [(s.role, s.channel, s.recipient, s.message) for s in alone if s.field == "content"] == [
        ("assistant", "analysis", None, 3), ("assistant", "commentary", "functions.f", 4),
    ]
    assert (alone[0].start, alone[-1].stop) == (0, len(completion))
    whole = labels(prompt + completion, vocabulary)
    assert labels(completion, vocabulary, after=prompt) == whole[len(prompt) :]
    # without the prompt it reads the same, but for the count of messages
    bare = parse(completion, vocabulary)
    assert [(s.role, s.channel, s.recipient, s.field, s.ids) for s in bare] == [
        (s.role, s.channel, s.recipient, s.field, s.ids) for s in alone
    ]
    assert {span.flaw for span in bare} == {None}


def test_streaming_says_what_is_known(vocabulary):
    parser = SpanParser(vocabulary)
    ids = vocabulary.encode("<|start|>assistant<|channel|>commentary to=functions.f<|message|>x")
    said = [(vocabulary.token_text(token), parser.feed(token)) for token in ids]
    known = [(piece, label.role, label.channel, label.recipient) for piece, label in said]
    assert known == [
        ("<|start|>", *NOTHING),
        ("assistant", "assistant", None, None),
        ("<|channel|>", "assistant", None, None),
        ("comment", "assistant", None, None),  # it may still become another word
        ("ary", "assistant", "commentary", None),
        (" to", "assistant", "commentary", None),
        ("=", "assistant", "commentary", None),
        ("functions", "assistant", "commentary", None),
        (".f", "assistant", "commentary", None),
        ("<|message|>", "assistant", "commentary", "functions.f"),
        ("x", "assistant", "commentary", "functions.f"),
    ]
    assert [label.field for _, label in said[-2:]] == ["control", "content"]
    assert parser.position == len(said) and not parser.inside_header


def test_a_copy_goes_its_own_way(vocabulary):
    start = vocabulary.encode(PROMPT + "<|channel|>com")
    ends = [vocabulary.encode("mentary<|message|>a"), vocabulary.encode("<|channel|>x<|end|>")]
    parser = SpanParser(vocabulary)
    for token in start:
        parser.feed(token)
    twins = [parser.copy(), parser.copy()]
    for twin, end in zip(twins, ends, strict=True):
        other = SpanParser(vocabulary)
        expected = [other.feed(token) for token in start + end]
        assert [twin.feed(token) for token in end] == expected[len(start) :]
    assert parser.position == len(start)


def test_an_unfinished_header(vocabulary):
    ids = vocabulary.encode("<|start|>assistant<|channel|>comment")
    whole, going = parse(ids, vocabulary)[-1], parse(ids, vocabulary, finished=False)[-1]
    assert (whole.channel, whole.flaw) == ("comment", "the stream ends inside a header")
    assert (going.channel, going.flaw) == (None, None)
    assert parse(vocabulary.encode("<|start|>"), vocabulary)[0].flaw is None


MALFORMED = {
    "double end": (MESSAGE + "a<|end|><|end|>", [("a", *FINAL)], "<|end|> after <|end|>"),
    "text after return": (
        MESSAGE + "a<|return|>b c", [("a", *FINAL), ("b c", *NOTHING)], "no <|start|> after <|return|>"
    ),
    "no start, known channel": (
        MESSAGE + "a<|end|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>",
        [("a", *FINAL), ("{}", "assistant", "commentary", "functions.f")], "no <|start|> after <|end|>",
    ),
    "no start, role": (
        MESSAGE + "a<|end|>assistant<|channel|>final<|message|>b", [("a", *FINAL), ("b", *FINAL)],
        "no <|start|> after <|end|>",
    ),
    "no start, no role": (
        MESSAGE + "a<|end|><|channel|>final<|message|>b", [("a", *FINAL), ("b", *FINAL)],
        "no <|start|> after <|end|>",
    ),
    "no header at all": (
        MESSAGE + "a<|end|><|message|>b", [("a", *FINAL), ("b", *NOTHING)], "no <|start|> after <|end|>"
    ),
    "stray word, then recovery": (
        MESSAGE + f"a<|end|>Sure<|start|>assistant{CALL}",
        [("a", *FINAL), ("Sure", *NOTHING), ("{}", "assistant", "commentary", "functions.f")],
        "no <|start|> after <|end|>",
    ),
    "stray text with no blank": (
        MESSAGE + "a<|end|>" + "漢" * 200, [("a", *FINAL), ("漢" * 200, *NOTHING)],
        "no <|start|> after <|end|>",
    ),
    "junk channel": (
        "<|start|>assistant<|channel|>––commentary<|message|>a", [("a", "assistant", "––commentary", None)],
        "unknown channel '––commentary'",
    ),
    "no channel": (
        "<|start|>assistant<|channel|><|message|>a", [("a", "assistant", None, None)],
        "no name after <|channel|>",
    ),
    "two channels": (
        "<|start|>assistant<|channel|>commentary<|channel|>analysis<|message|>a",
        [("a", "assistant", "commentary", None)], "a second <|channel|> in a header",
    ),
    "two recipients": (
        "<|start|>assistant to=functions.f<|channel|>commentary to=functions.g<|message|>a",
        [("a", "assistant", "commentary", "functions.f")], "a second recipient",
    ),
    "empty recipient": (
        "<|start|>assistant to=<|channel|>commentary<|message|>a",
        [("a", "assistant", "commentary", None)], "no name after to=",
    ),
    "recipient without to": (
        "<|start|>assistant<|channel|>commentary functions.f json<|message|>a",
        [("a", "assistant", "commentary", "functions.f")], "a recipient without to=",
    ),
    "words too many": (
        "<|start|>assistant<|channel|>final code and more<|message|>a", [("a", *FINAL)], "'and' in a header"
    ),
    "unknown role": ("<|start|>parrot<|message|>a", [("a", *NOTHING)], "unknown role 'parrot'"),
    "longer than a role": ("<|start|>toolbox<|message|>a", [("a", *NOTHING)], "unknown role 'toolbox'"),
    "no role": (
        "<|start|><|channel|>final<|message|>a", [("a", *FINAL)], "a header without a role"
    ),
    "empty header": ("<|start|><|message|>a", [("a", *NOTHING)], "a header without a role"),
    "tool without recipient": (
        "<|start|>functions.f<|channel|>commentary<|message|>a", [("a", "tool", "commentary", None)],
        "a tool's message without to=",
    ),
    "header cut by end": (
        f"<|start|>assistant<|channel|>analysis<|end|>{MESSAGE}a", [("a", *FINAL)], "<|end|> inside a header"
    ),
    "header cut by start": (
        f"<|start|>assistant<|channel|>analysis{MESSAGE}a", [("a", *FINAL)],
        "<|start|> inside a header",
    ),
    "content cut by start": (
        f"{MESSAGE}a{MESSAGE}b", [("a", *FINAL), ("b", *FINAL)], "<|start|> inside content"
    ),
    "header cut by endoftext": (
        f"<|start|>assistant<|channel|>analysis<|endoftext|>{MESSAGE}a", [("a", *FINAL)],
        "<|endoftext|> inside a header",
    ),
    "content cut by endoftext": (
        f"{MESSAGE}a<|endoftext|>b", [("a", *FINAL), ("b", *NOTHING)], "<|endoftext|> inside a message"
    ),
    "specials in content": (
        f"{MESSAGE}a<|message|>b", [("a", *FINAL), ("<|message|>", *FINAL), ("b", *FINAL)],
        "<|message|> inside content",
    ),
    "reserved in content": (
        f"{MESSAGE}a<|reserved_200013|>", [("a", *FINAL), ("<|reserved_200013|>", *FINAL)],
        "<|reserved_200013|> inside content",
    ),
    "reserved in header": (
        "<|start|>assistant<|reserved_200013|><|channel|>final<|message|>a", [("a", *FINAL)],
        "<|reserved_200013|> inside a header",
    ),
    "reserved between messages": (
        MESSAGE + "a<|end|><|reserved_200013|>", [("a", *FINAL)], "<|reserved_200013|> after <|end|>"
    ),
    "reserved in text": (
        "a<|reserved_200013|>", [("a", *NOTHING), ("<|reserved_200013|>", *NOTHING)],
        "<|reserved_200013|> in text",
    ),
    "end from nowhere": ("a<|end|>", [("a", *NOTHING)], "<|end|> without a message"),
    "start after text": (
        f"a{MESSAGE}b", [("a", *NOTHING), ("b", *FINAL)], "<|start|> after text outside any message"
    ),
    "message from nowhere": (
        "a<|message|>b", [("a", *NOTHING), ("b", *NOTHING)], "no <|start|> before this"
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(vocabulary, name):
    text, expected, flaw = MALFORMED[name]
    found, flaws = contents(vocabulary, text)
    assert found == expected
    assert flaws == {flaw}


def test_ids_outside_the_vocabulary(vocabulary):
    ids = [*vocabulary.encode(MESSAGE), -1, 5, 2**70, 201_088]
    spans = parse(ids, vocabulary)
    assert [(s.ids, s.flaw) for s in spans[-4:]] == [
        ((-1,), "id -1 inside content"), ((5,), None), ((2**70,), f"id {2**70} inside content"),
        ((201_088,), "id 201088 inside content"),
    ]


def test_what_is_no_stream(vocabulary):
    ids = vocabulary.encode(PROMPT)
    assert parse(np.array(ids), vocabulary) == parse(tuple(ids), vocabulary) == parse(iter(ids), vocabulary)
    assert all(type(token) is int for span in parse(np.array(ids), vocabulary) for token in span.ids)
    for wrong in ("text", None, 5, [1.5], [[1, 2]]):
        with pytest.raises(PromptError, match="no token ids"):
            parse(wrong, vocabulary)  # pyright: ignore[reportArgumentType]


def test_headers_are_filled_in_backwards(vocabulary):
    found = labels(vocabulary.encode(PROMPT + CALL), vocabulary)
    assert {label.recipient for label in found if label.message == 1} == {"functions.f"}


class Counting:
    """A vocabulary that counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def token_bytes(self, token: int) -> bytes:
        self.asked += 1
        return load_vocabulary().token_bytes(token)


def calls_to_parse(ids, vocabulary) -> int:
    """How many Python and C functions are called to parse a stream."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        parse(ids, vocabulary)
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize(
    ("start", "again"),
    [
        (MESSAGE, " word"), ("<|start|>", "word"), ("<|start|>", " word"), ("", "<|end|>"), ("", " word"),
        ("<|end|>", "x"), ("", "<|start|>assistant<|channel|>"), ("", MESSAGE + "a<|end|>"),
    ],
)
def test_cost_grows_with_length_alone(vocabulary, start, again):
    first, piece = vocabulary.encode(start), vocabulary.encode(again)
    calls_to_parse(first + piece * 10, vocabulary)  # fills the vocabulary's own table
    short, long = (calls_to_parse(first + piece * count, vocabulary) for count in (250, 1000))
    assert long <= 4.2 * short


def test_only_headers_are_decoded(vocabulary):
    counting = Counting()
    parse(vocabulary.encode(PROMPT + "<|channel|>final<|message|>" + "a b c " * 100), counting)  # pyright: ignore
    assert counting.asked == 3  # user, assistant, final
