"""One comparison of the parity report, and the metrics that it is made in.

A metric takes ours and theirs, of equal shape, and computes in float64, so that measuring adds no error of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests import tolerances

BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.uint8: torch.uint8, torch.int64: torch.int64}


@dataclass(frozen=True)
class Row:
    """What was compared with what, by which metric, and how it came out.

    Attributes:
        group: the part of the page it belongs to.
        case: the model, shape or setting.
        what: a site, or the thing compared.
        against: the second source.
        dtype: that ours computed in.
        metric: one of the functions below, or a share.
        value: the worst over layers and prompts.
        by_layer: the worst over prompts of each layer, for what has layers.
        tolerance: the name of a constant of ``tests.tolerances``; None for what is told and not judged.
        at_least: the value must reach the tolerance instead of staying below it.
        count: how many values, tokens or prompts were compared.
        line: the line of the short table it belongs to; the group's own by default, "" for none.
    """

    group: str
    case: str
    what: str
    against: str
    dtype: str
    metric: str
    value: float
    tolerance: str | None = None
    by_layer: tuple[float, ...] = ()
    at_least: bool = False
    count: int | None = None
    line: str | None = None

    @property
    def limit(self) -> float | None:
        return None if self.tolerance is None else float(getattr(tolerances, self.tolerance))

    @property
    def passed(self) -> bool | None:
        """None when there is no tolerance. NaN never passes."""
        if self.limit is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def as_json(self) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "group": self.group, "line": self.group if self.line is None else self.line, "case": self.case,
            "what": self.what, "against": self.against, "dtype": self.dtype, "metric": self.metric,
            "value": _plain(self.value), "tolerance": self.tolerance, "limit": self.limit, "passed": self.passed,
        }
        if self.by_layer:
            fields["by_layer"] = [_plain(value) for value in self.by_layer]
        if self.at_least:
            fields["at_least"] = True
        if self.count is not None:
            fields["count"] = self.count
        return fields


def _plain(value: float) -> float | str:
    """Three significant digits; JSON has no NaN and no infinity."""
    return float(f"{value:.3g}") if math.isfinite(value) else str(value)


def worst(values: Sequence[float]) -> float:
    """The largest, and NaN when there is one."""
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def _both(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    if ours.shape != theirs.shape:
        raise ValueError(f"ours has shape {tuple(ours.shape)}, theirs {tuple(theirs.shape)}")
    return ours.double(), theirs.double()


def max_abs(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference."""
    ours, theirs = _both(ours, theirs)
    return float((ours - theirs).abs().max())


def max_of_largest(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a part of the largest value: it sees one wrong entry among many."""
    ours, theirs = _both(ours, theirs)
    return float((ours - theirs).abs().max() / theirs.abs().max())


def rel_l2(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference as a part of the norm of theirs: it sees a small error everywhere."""
    ours, theirs = _both(ours, theirs)
    return float((ours - theirs).norm() / theirs.norm())


def bits_differ(ours: Tensor, theirs: Tensor) -> int:
    """How many values differ in any bit: -0.0 is not 0.0, and a NaN equals itself."""
    if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
        raise ValueError(f"ours is {ours.dtype} {tuple(ours.shape)}, theirs {theirs.dtype} {tuple(theirs.shape)}")
    kind = BITS[ours.dtype]
    return int((ours.contiguous().view(kind) != theirs.contiguous().view(kind)).sum())
