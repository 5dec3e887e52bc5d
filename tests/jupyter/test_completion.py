"""Completion after ``%gptoss``, asked for in the way JupyterLab does."""

from __future__ import annotations

import pytest
from IPython.core.completer import provisionalcompleter


def completed(shell, text: str) -> list[str]:
    """The completions of the text up to its end; each is the whole text with the completion put in."""
    with provisionalcompleter():
        found = list(shell.Completer.completions(text, len(text)))
    return [text[: one.start] + one.text + text[one.end:] for one in found]


@pytest.mark.parametrize(("text", "expected"), [
    ("%gptoss ", ["load", "ask", "explore", "doctor", "help"]),
    ("%gptoss e", ["explore"]),
    ("answer = %gptoss do", ["doctor"]),
    ("x = 1\n%gptoss he", ["help"]),
    ("%gptoss help a", ["ask"]),
    ("%gptoss load op", ["openai/gpt-oss-20b", "openai/gpt-oss-120b"]),
    ("%gptoss load --dtype ", ["float32", "bfloat16"]),
    ("%gptoss load x --r", ["--revision"]),
    ("%gptoss ask --effort ", ["low", "medium", "high"]),
    ("%gptoss ask --effort m", ["medium"]),
    ("%gptoss ask hi --s", ["--system", "--seed"]),
    ("%gptoss ask --seed 1 --s", ["--system"]),
    ("%%gptoss --ma", ["--max-tokens"]),
    ("%%gptoss --effort h", ["high"]),
    ("%%gptoss a", ["ask"]),
    ("%%gptoss ask --d", ["--developer"]),
])
def test_words_come_from_the_parsers(shell, text, expected):
    stem = text[: len(text) - len(text.split(" ")[-1])]
    assert completed(shell, text) == [stem + word for word in expected]


@pytest.mark.parametrize("text", ["%gptoss nope ", "%gptossy ", "gptoss ", "%%gptoss\n--ef", "%gptoss ask --seed "])
def test_elsewhere_it_keeps_out(shell, text):
    assert not {"load", "ask", "--effort", "--system"} & {word.split()[-1] for word in completed(shell, text)}
