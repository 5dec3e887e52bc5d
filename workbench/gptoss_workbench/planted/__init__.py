"""Models whose circuits are known because they were put there, to find out what a method finds.

    planted = wb.planted.induction(seed=3)
    planted.truth                      # which head, at which token
    pair = planted.pairs[0]
    wb.patching(planted.model, pair.clean, pair.corrupt, metric=pair.metric)

Each maker takes a ``seed``, from which places, tables, prompts and background are drawn; ``pairs``, how many prompt
pairs to write; and ``background``, the size of the random weights around the circuit: every matrix has Gaussian entries
of that size / sqrt(its inputs) on top of what the circuit puts there, every bias and sink of a tenth of it, every
embedding a random vector of that length beside features of length 1. At 0.1, the default, every circuit works on every
prompt; at 0.2 some begin to fail. Places can be given too, as (layer, head) or (layer, expert).

Raises:
    ExperimentError: a place that does not exist, or an order of layers in which the circuit could not work.
"""

from __future__ import annotations

from gptoss_workbench.planted.circuits import (
    BACKGROUND,
    MAKERS,
    band,
    fact,
    induction,
    no_circuit,
    reasoning,
    route,
    sink_gate,
)
from gptoss_workbench.planted.value import Pair, Place, Planted

__all__ = ["BACKGROUND", "MAKERS", "Pair", "Place", "Planted", "band", "fact", "induction",
           "no_circuit", "reasoning", "route",
           "sink_gate"]
