"""Models whose circuits are known because they were put there, to find out what a method finds.

    planted = wb.planted.induction(seed=3)
    planted.truth                      # which head, at which token
    wb.patching(planted.model, planted.pairs[0].clean, planted.pairs[0].corrupt, metric=planted.pairs[0].metric)
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
