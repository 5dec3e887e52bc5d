"""Bootstrap intervals of means, whole groups drawn together."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

DRAWS = 2000
LEVEL = 0.95


def mean_interval(
    values: np.ndarray, groups: Sequence[object] | None = None, *, level: float = LEVEL, draws: int = DRAWS,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over the last axis with its percentile bootstrap interval (Efron 1979).

    Args:
        values: (..., sample), one or more samples; NaN ones are left out.
        groups: what each sample belongs to. Samples of one group are drawn together, since they are no independent
            evidence (cluster bootstrap, Cameron, Gelbach & Miller 2008); None takes each for itself.

    Returns:
        mean, low, high, each (...) float64; NaN where nothing was measured, no interval where one group was.
    """
    values = np.asarray(values, dtype=np.float64)
    labels = np.arange(values.shape[-1]) if groups is None else np.unique(_keys(groups), return_inverse=True)[1]
    count = int(labels.max()) + 1
    known = np.isfinite(values)
    member = (labels[:, None] == np.arange(count)).astype(np.float64)  # (sample, group)
    sums, sizes = np.where(known, values, 0.0) @ member, known.astype(np.float64) @ member  # (..., group)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws).T  # (group, draw)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = sums.sum(-1) / sizes.sum(-1)
        means = (sums @ drawn) / (sizes @ drawn)  # (..., draw)
    tails = [(1 - level) / 2, (1 + level) / 2]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice")  # nothing was measured there
        low, high = np.nanquantile(np.where(np.isfinite(means), means, mean[..., None]), tails, axis=-1)
    alone = (sizes > 0).sum(-1) < 2
    return mean, np.where(alone, np.nan, low), np.where(alone, np.nan, high)


def _keys(groups: Sequence[object]) -> np.ndarray:
    return np.array([repr(group) for group in groups], dtype=object)
