"""Spans against openai-harmony: its renderer, its streaming parser, and streams of anything at all."""

from __future__ import annotations

from itertools import groupby

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai_harmony import (
    Author,
    Conversation,
    DeveloperContent,
    Message,
    RenderConversationConfig,
    Role,
    StreamableParser,
    SystemContent,
    TextContent,
    ToolDescription,
)

from gptoss_workbench.harmony import SpanParser, labels, load_vocabulary, parse, tokens

# No deadline: the machine may be busy. No database: nothing is written beside the code.
relaxed = settings(
    deadline=None, database=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow]
)

PIECES = [
    "<|end|>", "<|start|>", "<|message|>", "<|channel|>final", "assistant", "commentary",
    " to=functions.f", "\n", " ", "naïve 漢字 👩‍👩‍👧", "{}",
]
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    st.lists(st.sampled_from(PIECES), max_size=6).map("".join),
)
words = st.from_regex(r"[a-z][a-z0-9_-]{0,9}", fullmatch=True)
channels = st.sampled_from(["analysis", "commentary", "final"])
functions = words.map("functions.{}".format)
tools = st.one_of(functions, st.sampled_from(["python", "browser.search", "browser.open"]))
formats = st.sampled_from([None, "json", "code", "<|constrain|>json", "<|constrain|>code"])


@st.composite
def messages(draw) -> Message:
    kind = draw(st.sampled_from(["system", "developer", "user", "assistant", "call", "tool"]))
    text = draw(texts)
    if kind == "system":
        return Message.from_role_and_content(Role.SYSTEM, SystemContent.new().with_model_identity(text))
    if kind == "developer":
        content = DeveloperContent.new().with_instructions(text)
        if draw(st.booleans()):
            content = content.with_function_tools([ToolDescription.new(draw(words), text)])
        return Message.from_role_and_content(Role.DEVELOPER, content)
    if kind == "user":
        return Message.from_author_and_content(Author(role=Role.USER, name=draw(st.none() | words)), text)
    if kind == "tool":
        message = Message.from_author_and_content(Author.new(Role.TOOL, draw(tools)), text)
        return message.with_recipient("assistant").with_channel(draw(channels))
    message = Message.from_role_and_content(Role.ASSISTANT, text)
    message.channel = draw(st.none() | channels)
    message.content_type = draw(formats)
    if kind == "call":
        message = message.with_recipient(draw(tools))
    return message


@relaxed
@given(st.lists(messages(), max_size=6))
def test_rendered_conversations(made):
    vocabulary = load_vocabulary()
    conversation = Conversation.from_messages(made)
    ids = vocabulary.encoding.render_conversation_for_completion(
        conversation, Role.ASSISTANT, RenderConversationConfig(auto_drop_analysis=False)
    )
    spans = parse(ids, vocabulary)
    assert [token for span in spans for token in span.ids] == ids
    assert all(span.flaw is None for span in spans)
    groups = [list(group) for _, group in groupby(spans, key=lambda span: span.message)]
    assert len(groups) == len(made) + 1
    for index, (group, message) in enumerate(zip(groups, made, strict=False)):
        assert {span.message for span in group} == {index}
        assert {(s.role, s.author, s.channel, s.recipient, s.content_type) for s in group} == {
            (
                message.author.role.value, message.author.name, message.channel, message.recipient,
                message.content_type,
            )
        }
        said = vocabulary.decode(token for span in group if span.field == "content" for token in span.ids)
        first = message.content[0]
        if isinstance(first, TextContent):
            assert said == first.text
        else:
            assert (getattr(first, "model_identity", None) or getattr(first, "instructions", "")) in said
    assert [span.field for span in groups[-1]] == ["control", "header"]
    assert {span.role for span in groups[-1]} == {"assistant"}


@st.composite
def completions(draw) -> list[int]:
    """What a model writes after `<|start|>assistant`: well-formed messages, headers in both orders."""
    encode = load_vocabulary().encode
    ids: list[int] = []
    for number in range(draw(st.integers(1, 4))):
        ids += encode("<|start|>assistant") if number else []
        recipient = draw(st.none() | tools)
        kind = draw(formats) if recipient else None
        target, kind = f" to={recipient}" if recipient else "", f" {kind}" if kind else ""
        if number and draw(st.booleans()):
            ids += encode(f"{target}<|channel|>{draw(channels)}{kind}<|message|>")
        else:
            ids += encode(f"<|channel|>{draw(channels)}{target}{kind}<|message|>")
        ids += load_vocabulary().encoding.encode(draw(texts), disallowed_special=())
        ids.append(draw(st.sampled_from(sorted(tokens.STOPS))))
    return ids


@relaxed
@given(completions())
def test_openai_harmonys_streaming_parser_agrees(ids):
    vocabulary = load_vocabulary()
    theirs = StreamableParser(vocabulary.encoding, Role.ASSISTANT)
    ours = SpanParser(vocabulary)
    for token in vocabulary.encode("<|start|>assistant"):
        ours.feed(token)
    said: dict[int, list[int]] = {}
    facts: dict[int, tuple] = {}
    for token in ids:
        theirs.process(token)
        label = ours.feed(token)
        assert label.flaw is None
        if label.field == "content":
            said.setdefault(label.message, []).append(token)
            assert theirs.current_role is not None
            assert (label.role, label.channel, label.recipient, label.content_type) == (
                theirs.current_role.value, theirs.current_channel, theirs.current_recipient,
                theirs.current_content_type,
            )
        facts[label.message] = (label.role, label.channel, label.recipient, label.content_type)
    found = theirs.messages
    assert sorted(facts) == list(range(len(found)))
    for index, message in enumerate(found):
        assert facts[index][0] == message.author.role.value
        assert facts[index][1:] == (message.channel, message.recipient, message.content_type)
        first = message.content[0]
        assert isinstance(first, TextContent) and vocabulary.decode(said.get(index, [])) == first.text


def ids_of(text: str) -> list[int]:
    return load_vocabulary().encode(text)


structure = st.sampled_from(sorted(tokens.NAMES))
fuzz = st.lists(
    st.one_of(
        structure.map(lambda token: [token]),
        structure.map(lambda token: [token]),
        st.sampled_from([*PIECES, "user", "final", "analysis", "tool:x", "python", "to=", "\xa0", "a b"]).map(
            lambda text: ids_of(text)
        ),
        st.integers(-2, 201_100).map(lambda token: [token]),
        st.integers().map(lambda token: [token]),
    ),
    max_size=25,
).map(lambda parts: [token for part in parts for token in part])


@settings(relaxed, max_examples=500)
@given(fuzz)
def test_streams_of_anything(ids):
    vocabulary = load_vocabulary()
    spans = parse(ids, vocabulary)
    assert [token for span in spans for token in span.ids] == ids
    edges = [0, *(span.stop for span in spans)]
    assert [span.start for span in spans] == edges[:-1] and edges[-1] == len(ids)
    assert all(span.start < span.stop for span in spans)
    assert {span.field for span in spans} <= {"header", "content", "control"}
    numbers = [span.message for span in spans]
    assert numbers == sorted(numbers) and set(numbers) == set(range(max(numbers, default=-1) + 1))


@settings(relaxed, max_examples=500)
@given(fuzz)
def test_streaming_labels_are_the_final_ones_but_for_headers(ids):
    vocabulary = load_vocabulary()
    parser = SpanParser(vocabulary)
    streamed = [parser.feed(token) for token in ids]
    final = labels(ids, vocabulary)
    for index, (early, late) in enumerate(zip(streamed, final, strict=True)):
        assert early.message == late.message
        if early == late:
            continue
        begin = next(at for at, label in enumerate(final) if label.message == late.message)
        assert tokens.MESSAGE not in ids[begin : index + 1], "only what stands before <|message|> may change"
        assert early.field == late.field or (early.field, late.field) == ("header", "content")
        assert early.flaw is None or early.flaw == late.flaw


@relaxed
@given(fuzz, fuzz)
def test_a_stream_in_two_parts(before, rest):
    vocabulary = load_vocabulary()
    assert labels(rest, vocabulary, after=before) == labels(before + rest, vocabulary)[len(before) :]
    parser = SpanParser(vocabulary)
    for token in before:
        parser.feed(token)
    twin = parser.copy()
    assert [parser.feed(token) for token in rest] == [twin.feed(token) for token in rest]
