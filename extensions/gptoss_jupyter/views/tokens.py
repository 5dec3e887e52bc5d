"""Views of text: the token strip and the running answer."""

from __future__ import annotations

import traitlets

from gptoss_jupyter.views.base import View, module, style


class StripView(View):
    """Every token, grouped by message, coloured by one quantity; a click or the arrow keys select one.

    tokens: [{"pieces": [[kind, text], ...], "id", "hex", "field", "special", "breaks"}];
    groups: [{"label", "kind", "start", "stop"}], contiguous; values: float32 bytes, one a token, NaN where
    not measured; low and high are the ends of the colour scale in ``unit``.
    """

    _esm = module("strip")
    _css = style("strip")
    tokens = traitlets.List().tag(sync=True)
    groups = traitlets.List().tag(sync=True)
    values = traitlets.Bytes(b"").tag(sync=True)
    quantity = traitlets.Unicode("").tag(sync=True)
    unit = traitlets.Unicode("").tag(sync=True)
    about = traitlets.Unicode("").tag(sync=True)
    low = traitlets.Float(0.0).tag(sync=True)
    high = traitlets.Float(1.0).tag(sync=True)
    selected = traitlets.Int(-1).tag(sync=True)


class AnswerView(View):
    """What the model says, message by message: [{"label", "kind", "pieces"}]."""

    _esm = module("answer")
    _css = style("answer")
    messages = traitlets.List().tag(sync=True)
    running = traitlets.Bool(False).tag(sync=True)
    note = traitlets.Unicode("").tag(sync=True)
    hint = traitlets.Unicode("").tag(sync=True)
