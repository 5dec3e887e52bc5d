"""Views of the routers: the expert grid and one token's routes."""

from __future__ import annotations

import traitlets

from gptoss_jupyter.views.base import View, module, style


class GridView(View):
    """Layers by experts on a canvas; a click bans an expert or lets it back in.

    weights: float32 bytes, layer-major, in ``measure``; chosen: per layer the selected token's experts
    (outlined); bands: per layer "sliding" or "full"; banned: [[layer, expert], ...], set from both sides.
    """

    _esm = module("grid")
    _css = style("grid")
    weights = traitlets.Bytes(b"").tag(sync=True)
    layers = traitlets.Int(0).tag(sync=True)
    experts = traitlets.Int(0).tag(sync=True)
    bands = traitlets.List().tag(sync=True)
    chosen = traitlets.List().tag(sync=True)
    banned = traitlets.List().tag(sync=True)
    high = traitlets.Float(1.0).tag(sync=True)
    measure = traitlets.Unicode("router weight").tag(sync=True)
    row_height = traitlets.Int(24).tag(sync=True)
    hint = traitlets.Unicode("").tag(sync=True)


class RoutesView(View):
    """Per layer the experts one token went to: [[layer, [[expert, weight], ...]], ...]."""

    _esm = module("routes")
    _css = style("routes")
    rows = traitlets.List().tag(sync=True)
    note = traitlets.Unicode("").tag(sync=True)
    hint = traitlets.Unicode("").tag(sync=True)
    row_height = traitlets.Int(24).tag(sync=True)
