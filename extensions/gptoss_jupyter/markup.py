"""A model's answer as HTML and as plain text for a cell's output. Model text is untrusted: it is escaped here.

Messages are those of ``present.messages``: [{"label", "kind", "pieces"}].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

_QUIET = "color:var(--jp-ui-font-color2,GrayText);font-size:smaller"
_BOX = Markup(
    '<div class="gptoss-said" style="display:grid;grid-template-columns:max-content minmax(0,1fr);'
    'gap:4px 12px;line-height:1.5">{}</div>{}'
)
_ROW = Markup(
    f'<div style="{_QUIET}">{{}}</div>'
    '<div style="white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate{}">{}</div>'
)
_MARK = Markup(f'<span style="{_QUIET}">{{}}</span>')
_NOTE = Markup(f'<div style="{_QUIET};margin-top:4px">{{}}</div>')
_TEXT = Markup("{}")
# The label says the channel too: the look alone is for those who see it.
_LOOK = {"analysis": Markup(";font-style:italic"), "final": Markup(";font-weight:600")}


def as_html(messages: Sequence[dict[str, Any]], note: str = "") -> str:
    """Each message beside its label, then the note; a stand-in shows what could not be seen."""
    rows = Markup().join(
        _ROW.format(
            message["label"], _LOOK.get(message["kind"], ""),
            Markup().join((_MARK if kind == "mark" else _TEXT).format(text) for kind, text in message["pieces"]),
        )
        for message in messages
    )
    return str(_BOX.format(rows, _NOTE.format(note) if note else ""))


def as_text(messages: Sequence[dict[str, Any]], note: str = "") -> str:
    """The same for a front end without HTML."""
    rows = [f"{message['label']}: {''.join(text for _, text in message['pieces'])}" for message in messages]
    return "\n".join([*rows, note] if note else rows)
