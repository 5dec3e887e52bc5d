"""The dashboard as a still picture: what a notebook shows without a kernel, on a web page or in an export.

Made of markupsafe templates, so every text from the model or the person is escaped. It loads nothing.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from markupsafe import Markup

from gptoss_jupyter.markup import as_html
from gptoss_jupyter.present import shown_pieces
from gptoss_workbench.plots import colour

_MONO = "ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace"
_PAGE = Markup(
    '<div class="gptoss-snapshot" style="font:13px/1.5 system-ui,sans-serif;max-width:1180px">'
    '<p style="margin:0 0 8px"><b>{name}</b> <span style="opacity:.8">{note}</span></p>{body}</div>'
)
_PART = Markup('<div style="margin:0 0 12px"><p style="margin:0 0 4px;font-weight:600">{title}</p>{body}</div>')
_MESSAGE = Markup('<div style="margin:2px 0"><span style="opacity:.8;font-size:11px">{label}</span> '
                  f'<span style="font-family:{_MONO};overflow-wrap:anywhere">' '{tokens}</span></div>')
_TOKEN = Markup('<span title="{tip}" style="background:{back};color:{ink};padding:0 1px;margin-right:1px;'
                'border-radius:2px;white-space:pre;unicode-bidi:isolate{extra}">{text}</span>')
_PLAIN = Markup('<span title="{tip}" style="border:1px dotted currentColor;padding:0 1px;margin-right:1px;'
                'white-space:pre;unicode-bidi:isolate{extra}">{text}</span>')
_TABLE = Markup('<table style="border-collapse:collapse;font-size:12px"><tr>{head}</tr>{rows}</table>')
_ROW, _HEAD = Markup("<tr>{}</tr>"), Markup('<th scope="col" style="text-align:left;padding:1px 10px 1px 0">{}</th>')
_SIDE = Markup('<th scope="row" style="text-align:left;font-weight:400;padding:1px 10px 1px 0">{}</th>')
_CELL = Markup('<td style="text-align:left;padding:1px 10px 1px 0;white-space:pre-wrap">{}</td>')


def snapshot(name: str, state: dict[str, Any]) -> str:
    """``Explorer.state`` as static HTML: the coloured tokens, the selected token's routes, lens and next tokens.

    Args:
        name: the model's name.
        state: see ``Explorer.state``; an empty one gives the headline alone.
    """
    if not state.get("tokens"):
        return str(_PAGE.format(name=_line(name), note=state.get("status", ""), body=""))
    selected = state["selected"]
    token = _shown(state["tokens"][selected])
    parts = [_PART.format(title=f"Tokens, coloured by {state['quantity'].replace('_', ' ')} ({state['unit']})",
                          body=_strip(state))]
    if state["answer"]:
        parts.append(_PART.format(title="Answer", body=Markup(as_html(state["messages"], state["answer_note"]))))
    parts.append(_PART.format(title=f"Token {selected}, {token}: experts and guesses layer by layer",
                              body=_layers(state)))
    parts.append(_PART.format(title=f"What comes after {token}", body=_next(state)))
    if state["banned"]:
        bans = ", ".join(f"layer {layer} without expert {expert}" for layer, expert in state["banned"])
        parts.append(_PART.format(title="Edits in force", body=Markup("<p>{}</p>").format(bans)))
    if state["patch"]:
        parts.append(_PART.format(title="Patch experiment: share of the clean answer recovered",
                                  body=_patch(state["patch"])))
    note = "Still picture; run the cell for the live one."
    return str(_PAGE.format(name=_line(name), note=note, body=Markup("").join(parts)))


def _joined(parts: list[list[str]]) -> str:
    return "".join(text for _, text in parts)


def _line(text: str) -> str:
    return _joined(shown_pieces(text, spaces=False))


def _shown(text: str) -> str:
    return _joined(shown_pieces(text))


def _strip(state: dict[str, Any]) -> Markup:
    table = colour.table("light")
    rows = []
    for group in state["groups"]:
        tokens = []
        for i in range(group["start"], group["stop"]):
            value, shown = state["values"][i], _shown(state["tokens"][i])
            extra = ";outline:2px solid currentColor" if i == state["selected"] else ""
            if math.isfinite(value):
                rgb = table[int(np.clip(value / state["high"], 0, 1) * 255)]
                tokens.append(_TOKEN.format(tip=f"token {i}: {value:z.3g} {state['unit']}", text=shown, extra=extra,
                                            back="rgb({},{},{})".format(*map(int, rgb)), ink=colour.ink(rgb)))
            else:
                tokens.append(_PLAIN.format(tip=f"token {i}: not measured", text=shown, extra=extra))
        rows.append(_MESSAGE.format(label=group["label"], tokens=Markup("").join(tokens)))
    return Markup("").join(rows)


def _layers(state: dict[str, Any]) -> Markup:
    rows = []
    for (layer, slots), (_, guesses) in zip(state["routes"], state["lens"], strict=True):
        experts = ", ".join(f"E{expert} {weight:.2f}" for expert, weight in slots)
        said = ", ".join(f"{_joined(guess['pieces'])} {guess['prob']:.2f}" for guess in guesses[:3])
        rows.append(_ROW.format(_SIDE.format(layer) + _CELL.format(experts) + _CELL.format(said)))
    head = Markup("").join(_HEAD.format(text) for text in ("layer", "experts, router weight", "would say, probability"))
    return _TABLE.format(head=head, rows=Markup("").join(rows))


def _next(state: dict[str, Any]) -> Markup:
    edited = bool(state["banned"])

    def prob(value: float | None) -> str:
        return "–" if value is None else f"{value:.4f}"

    rows = Markup("").join(
        _ROW.format(_SIDE.format(_joined(row["pieces"])) + _CELL.format(prob(row["prob"]))
                    + (_CELL.format(prob(row["clean"])) if edited else ""))
        for row in state["next"])
    names = ("token", "probability", "without edits") if edited else ("token", "probability")
    return _TABLE.format(head=Markup("").join(_HEAD.format(text) for text in names), rows=rows)


def _patch(patch: dict[str, Any]) -> Markup:
    head = Markup("").join(_HEAD.format(text) for text in ("layer", *(_shown(text) for text in patch["text"])))
    rows = Markup("").join(
        _ROW.format(_SIDE.format(layer) + Markup("").join(
            _CELL.format("–" if not math.isfinite(value) else f"{value:.2f}") for value in values))
        for layer, values in zip(patch["layers"], patch["values"], strict=True))
    return _TABLE.format(head=head, rows=rows)
