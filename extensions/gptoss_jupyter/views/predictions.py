"""Views of what comes next: the logit lens over the layers and the final distribution."""

from __future__ import annotations

import traitlets

from gptoss_jupyter.views.base import View, module, style


class LensView(View):
    """Per layer the likeliest next tokens: [[layer, [{"pieces", "prob", "id"}, ...]], ...]."""

    _esm = module("lens")
    _css = style("lens")
    rows = traitlets.List().tag(sync=True)
    hint = traitlets.Unicode("").tag(sync=True)
    row_height = traitlets.Int(24).tag(sync=True)


class NextView(View):
    """The next-token distribution: [{"pieces", "id", "prob", "clean"}]; None stands for less than ``below``."""

    _esm = module("next")
    _css = style("next")
    rows = traitlets.List().tag(sync=True)
    edited = traitlets.Bool(False).tag(sync=True)
    below = traitlets.Float(0.0).tag(sync=True)
    hint = traitlets.Unicode("").tag(sync=True)
