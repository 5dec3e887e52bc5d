"""Token labels: whatever the bytes, something is seen, two tokens differ, and plotly reads it literally."""

from __future__ import annotations

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss_workbench.plots.labels import escape, pieces, plain, visible

SHOWN = [
    (" a", "·a"), ("a ", "a·"), ("\n", "↵"), ("\r\n", "␍↵"), ("\t", "→"), ("\u200b", "U+200B"), ("\u202e", "U+202E"),
    ("\u00a0", "U+00A0"), ("\x1b[2J", "U+001B[2J"), ("\ufe0f", "U+FE0F"), ("\u2800", "U+2800"), ("\u3164", "U+3164"),
    ("\U000e0041", "U+E0041"), ("\ud83d", "U+D83D"), (b"\xf0\x9f", "\\xF0\\x9F"), (b" \xe2\x86", "·\\xE2\\x86"),
    ("\u0301", "◌\u0301"), ("e\u0301", "e\u0301"), ("😀", "😀"), ("שלום", "שלום"), ("·", "U+00B7"), ("↵", "U+21B5"),
    (b"\xed\xa0\xbd", "\\xED\\xA0\\xBD"), ("\x00", "U+0000"), ("\u2028", "U+2028"),
]
HOSTILE = ["<b>x</b>", "</script>", "&lt;", "&amp;lt;", '<a href="javascript:x">', "$x^2$", "$\\href{a}{b}$", "%{x}",
           "<span style='background:url(http://a/)'>", "<br>", "{{7*7}}"]


@pytest.mark.parametrize(("token", "shown"), SHOWN, ids=[ascii(token) for token, _ in SHOWN])
def test_odd_tokens_are_visible(token, shown):
    assert visible(token) == shown


def test_special_stand_ins_are_told_from_the_same_text():
    assert pieces("\u200b") == [("mark", "U+200B")]
    assert pieces("U+200B") == [("text", "U+200B")]
    assert pieces(b"\\xF0") == [("text", "\\xF0")]
    assert pieces(b"\xf0") == [("mark", "\\xF0")]


def test_running_text_keeps_its_whitespace():
    assert pieces("a b\n\u202e·", spaces=False) == [("text", "a b\n"), ("mark", "U+202E"), ("text", "·")]


@given(st.binary(max_size=12), st.binary(max_size=12))
def test_different_tokens_look_different(one, other):
    assert (pieces(one) == pieces(other)) == (one == other)


@given(st.text(max_size=20))
def test_nothing_invisible_is_left(token):
    for char in visible(token):
        assert char.isprintable() and not char.isspace()
        assert not 0x202A <= ord(char) <= 0x202E and not 0x2066 <= ord(char) <= 0x2069


@pytest.mark.parametrize("token", HOSTILE)
def test_plotly_labels_are_literal(token):
    label = plain(token, limit=None)
    assert html.unescape(label) == visible(token)
    assert "<" not in label and ">" not in label and "$" not in label
    assert not re.search(r"&(?!amp;|lt;|gt;|#36;)", label)


def test_long_labels_end_in_an_ellipsis_and_never_inside_an_entity():
    assert visible("a" * 100, 10) == "a" * 9 + "…"
    assert plain("<" * 100, 10) == "&lt;" * 9 + "…"
    assert escape("&<>$") == "&amp;&lt;&gt;&#36;"
