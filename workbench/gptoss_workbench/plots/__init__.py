"""Labelled arrays to plotly figures: heatmaps of layers, tokens, experts and places, lines, lens, agreement, doses."""

from __future__ import annotations

from gptoss_workbench.plots.curves import dose_curves, probe_curves
from gptoss_workbench.plots.figures import (
    agreement_scatter,
    layer_expert_heatmap,
    layer_token_heatmap,
    lens_table,
    token_lines,
)
from gptoss_workbench.plots.labels import plain, visible
from gptoss_workbench.plots.places import place_heatmap
from gptoss_workbench.plots.routing import expert_label_heatmap, step_token_heatmap, use_harm_scatter

__all__ = [
    "agreement_scatter", "dose_curves", "expert_label_heatmap", "layer_expert_heatmap", "layer_token_heatmap",
    "lens_table", "place_heatmap", "plain", "probe_curves", "step_token_heatmap", "token_lines", "use_harm_scatter",
    "visible",
]
