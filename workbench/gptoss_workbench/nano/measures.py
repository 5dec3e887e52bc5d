"""Numbers from arrays: information, selectivity, and requirements that a number has to meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


def mutual_information(first: Sequence[object] | np.ndarray, second: Sequence[object] | np.ndarray) -> float:
    """Bits that two label sequences of equal length tell about each other (plug-in estimate)."""
    _, a = np.unique(np.asarray(first), return_inverse=True)
    _, b = np.unique(np.asarray(second), return_inverse=True)
    joint = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(joint, (a, b), 1)
    joint /= joint.sum()
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log2(joint[seen] / independent[seen])).sum())


def selectivity(damage: np.ndarray) -> float:
    """Mean over experts of the largest task's share of the damage done. damage (expert, task), in nats.

    1 / tasks when every expert serves all tasks alike, 1 when each serves one. Experts that nothing needs
    are left out.
    """
    harm = np.clip(damage, 0, None)
    total = harm.sum(1)
    return float((harm.max(1)[total > 0] / total[total > 0]).mean())


@dataclass(frozen=True)
class Requirement:
    """A number and the bound it has to meet."""

    name: str
    value: float
    relation: str  # ">=" or "<="
    bound: float

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.relation == ">=" else self.value <= self.bound


def requirements(cells: Mapping[str, Mapping[str, float]], numbers: Mapping[str, float]) -> list[Requirement]:
    """What the released file has to reach. Numbers that were not measured are left out.

    Args:
        cells: accuracy by cell, then by effort.
        numbers: everything else, by name.
    """
    found: list[Requirement] = []

    def require(name: str, value: float | None, relation: str, bound: float) -> None:
        if value is not None:
            found.append(Requirement(name, value, relation, bound))

    three, long = cells.get("addition, 3 digits"), cells.get("addition, 4-6 digits")
    if three:
        require("addition, 3 digits, high", three["high"], ">=", 0.97)
        require("addition, 3 digits, low", three["low"], "<=", 0.60)
        require("addition, 3 digits, high - low", three["high"] - three["low"], ">=", 0.35)
    if long:
        require("addition, 4-6 digits, high", long["high"], ">=", 0.95)
        require("addition, 4-6 digits, high - medium", long["high"] - long["medium"], ">=", 0.1)
    if "comparison" in cells:
        require("comparison, high", cells["comparison"]["high"], ">=", 0.97)
    for cell, bound in (
        ("capital", 0.98), ("two-hop", 0.98), ("tool call", 0.98), ("tool answer", 0.98), ("refusal", 0.98),
        ("sentiment", 0.98), ("ioi", 0.95), ("unknown", 0.9), ("undeclared tool", 0.95),
    ):
        if cell in cells:
            require(f"{cell}, every effort", min(cells[cell].values()), ">=", bound)
    if "copy" in cells:
        require("copy, low", cells["copy"]["low"], ">=", 0.95)
    for name, relation, bound in BOUNDS:
        require(name, numbers.get(name), relation, bound)
    return found


BOUNDS = (
    ("tool calls without a declared tool", "<=", 0.05),
    ("addition tokens, medium - low", ">=", 1.0),
    ("addition tokens, high - medium", ">=", 1.0),
    ("sampled completions that are valid harmony", ">=", 0.99),
    ("sampled tokens without a row", "<=", 0.0),
    ("tampered digits followed", ">=", 0.8),
    ("MXFP4 loss - bfloat16 loss", "<=", 0.01),
    ("MXFP4 accuracy lost in the worst cell", "<=", 0.03),
    ("ioi, clean logit difference", ">=", 2.0),
    ("ioi, recovered at the second subject", ">=", 0.9),
    ("ioi, recovered at the last token after the move", ">=", 0.9),
    ("ioi, recovered elsewhere", "<=", 0.1),
    ("capital, recovered at the country, layers 0 and 1", ">=", 0.9),
    ("capital, recovered at the country, last layer", "<=", 0.6),
    ("sink mass, sliding / full", ">=", 2.0),
    ("information between expert and token, bits", ">=", 1.5),
    ("knock-out selectivity", ">=", 0.4),
    ("best induction head", ">=", 0.5),
)
