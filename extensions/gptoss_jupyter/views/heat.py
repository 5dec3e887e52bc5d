"""The view of a patch experiment."""

from __future__ import annotations

import traitlets

from gptoss_jupyter.views.base import View, module, style


class HeatView(View):
    """A signed heatmap, tokens down and layers across; not measured cells are empty.

    values: float32 bytes (layer, token); layers: their numbers; labels: a token each, {"pieces", "other"}, where
    ``other`` holds the pieces of the token it is compared with, or None where that is the same; high: the end of
    the scale, which runs from -high over 0 to high.
    """

    _esm = module("heat")
    _css = style("heat")
    values = traitlets.Bytes(b"").tag(sync=True)
    layers = traitlets.List().tag(sync=True)
    labels = traitlets.List().tag(sync=True)
    high = traitlets.Float(1.0).tag(sync=True)
    unit = traitlets.Unicode("").tag(sync=True)
    hint = traitlets.Unicode("").tag(sync=True)
