"""The views around the pictures: the headline with its status, and the list of active edits."""

from __future__ import annotations

import traitlets

from gptoss_jupyter.views.base import View, module, style


class StatusView(View):
    """Name and facts of the model, what is going on, and errors in plain words.

    level: "quiet", "busy" or "error"; progress: 0..1, or -1 for none.
    """

    _esm = module("status")
    _css = style("status", "dashboard")
    name = traitlets.Unicode("").tag(sync=True)
    facts = traitlets.Unicode("").tag(sync=True)
    pulse = traitlets.Unicode("").tag(sync=True)
    message = traitlets.Unicode("").tag(sync=True)
    level = traitlets.Unicode("quiet").tag(sync=True)
    progress = traitlets.Float(-1.0).tag(sync=True)


class EditsView(View):
    """The banned experts as chips: banned is [[layer, expert], ...], set from both sides."""

    _esm = module("edits")
    _css = style("edits")
    banned = traitlets.List().tag(sync=True)
    hint = traitlets.Unicode("").tag(sync=True)
