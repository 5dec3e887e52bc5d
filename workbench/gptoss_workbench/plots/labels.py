"""Token text made visible: whitespace, control, bidi, zero-width and broken UTF-8 all show, and differ.

A token is untrusted text. ``pieces`` tells what is plain and what is a stand-in, for views that can style
the two apart; ``visible`` is the same as one string; ``plain`` is safe inside a plotly label.
"""

from __future__ import annotations

import unicodedata

Piece = tuple[str, str]  # ("text", shown as it is) or ("mark", a stand-in for something invisible)

SPACES = {" ": "·", "\n": "↵", "\t": "→", "\r": "␍"}
_STANDINS = frozenset(SPACES.values())
_INVISIBLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"})


def _is_hidden(char: str) -> bool:
    code = ord(char)
    return (
        unicodedata.category(char) in _HIDDEN or char in _INVISIBLE
        or 0x180B <= code <= 0x180F or 0xFE00 <= code <= 0xFE0F or 0xE0100 <= code <= 0xE01EF
    )


def _characters(source: str | bytes) -> list[tuple[str, bool]]:
    """The characters, each with whether it is a byte that belongs to no character (as a code < 256)."""
    if isinstance(source, str):
        return [(char, False) for char in source]
    decoded = source.decode("utf-8", errors="surrogateescape")
    return [(chr(ord(c) - 0xDC00), True) if 0xDC80 <= ord(c) <= 0xDCFF else (c, False) for c in decoded]


def pieces(source: str | bytes, spaces: bool = True) -> list[Piece]:
    """Split a token into text to show and stand-ins for what could not be seen.

    Args:
        source: the token's text, or better its bytes: only bytes tell half a character from ``\\xNN`` typed.
        spaces: whether space, newline, tab and carriage return get stand-ins too (False for running text).

    Returns: pieces in order; the same pieces never come from two different byte strings.
    """
    found: list[list[str]] = []

    def put(kind: str, shown: str) -> None:
        if found and found[-1][0] == kind == "text":
            found[-1][1] += shown
        else:
            found.append([kind, shown])

    for char, is_byte in _characters(source):
        if is_byte:
            put("mark", f"\\x{ord(char):02X}")
        elif spaces and char in _STANDINS:
            put("mark", f"U+{ord(char):04X}")  # a middle dot that is there must not pass for a space
        elif char in SPACES:
            put("mark" if spaces else "text", SPACES[char] if spaces else char)
        elif _is_hidden(char):
            put("mark", f"U+{ord(char):04X}")
        elif unicodedata.combining(char) and not (found and found[-1][0] == "text"):
            put("text", "\u25cc" + char)  # a dotted circle carries an accent that came without its letter
        else:
            put("text", char)
    return [(kind, shown) for kind, shown in found]


def visible(source: str | bytes, limit: int | None = None) -> str:
    """A token as one visible string.

    Args:
        source: text or bytes.
        limit: longest result in characters; the rest becomes an ellipsis.
    """
    shown = "".join(part for _, part in pieces(source))
    return shown if limit is None or len(shown) <= limit else shown[: limit - 1] + "…"


def escape(text: str) -> str:
    """Escape for a plotly label, which reads a few HTML tags, entities and ``$``-delimited TeX."""
    for char, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("$", "&#36;")):
        text = text.replace(char, entity)
    return text


def plain(source: str | bytes, limit: int | None = 24) -> str:
    """A token as a plotly label: visible, of bounded length, and read literally by plotly."""
    return escape(visible(source, limit))
