"""Means over prompts with their uncertainty: bootstrap intervals, Student's, and permutation tests."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import xarray as xr

from gptoss_workbench.errors import ExperimentError

DRAWS = 2000
LEVEL = 0.95
_AT_ONCE = 1 << 22  # draws times entries held together


def mean_interval(
    values: np.ndarray, groups: Sequence[object] | None = None, *, level: float = LEVEL, draws: int = DRAWS,
    seed: int | np.random.Generator = 0,
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
        blocks = zip(_blocks(sums.reshape(-1, count), draws), _blocks(sizes.reshape(-1, count), draws), strict=True)
        ends = [_percentiles(some, many, drawn, level) for some, many in blocks]
    low, high = np.concatenate(ends, axis=1).reshape(2, *mean.shape)
    alone = (sizes > 0).sum(-1) < 2
    return mean, np.where(alone, np.nan, low), np.where(alone, np.nan, high)


def _keys(groups: Sequence[object]) -> np.ndarray:
    return np.array([repr(group) for group in groups], dtype=object)


def _blocks(rows: np.ndarray, draws: int) -> list[np.ndarray]:
    """(entry, ...) cut so that the draws of a block stay small; one empty block where there is no entry."""
    step = max(1, _AT_ONCE // draws)
    return [rows[at:at + step] for at in range(0, max(1, len(rows)), step)]


def _percentiles(sums: np.ndarray, sizes: np.ndarray, drawn: np.ndarray, level: float) -> np.ndarray:
    """Sums and sizes (entry, group), how often each draw has each group (group, draw) -> both ends, (2, entry)."""
    means, mean = (sums @ drawn) / (sizes @ drawn), sums.sum(-1, keepdims=True) / sizes.sum(-1, keepdims=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice")  # nothing was measured there
        return np.nanquantile(np.where(np.isfinite(means), means, mean), [(1 - level) / 2, (1 + level) / 2], axis=-1)


def student_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over the first axis, with the ends of Student's 95 % interval: (n, ...) -> three of (...).

    NaN where any value is, and ends of NaN for n = 1. For a few pairs, of which a bootstrap would draw too little.
    """
    n, mean = len(values), values.mean(0)
    if n < 2:
        return mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    reach = t_quantile(n - 1) * values.std(0, ddof=1) / np.sqrt(n)
    return mean, mean - reach, mean + reach


def t_quantile(freedom: int, p: float = (1 + LEVEL) / 2) -> float:
    """Quantile of Student's distribution, by the integral of its density over t = sqrt(freedom) tan(angle)."""
    angle = np.linspace(0, np.pi / 2, 200_001)
    density = np.cos(angle) ** (freedom - 1)
    below = np.concatenate(([0.0], np.cumsum((density[1:] + density[:-1]) / 2)))
    return float(np.sqrt(freedom) * np.tan(np.interp(2 * p - 1, below / below[-1], angle)))


def summarize(
    array: xr.DataArray, dim: str = "pair", *, level: float = LEVEL, baseline: float = 0.0, draws: int = DRAWS,
    seed: int = 0,
) -> xr.Dataset:
    """Mean of each entry over prompts, a confidence interval, and how often chance alone would give as much.

    Args:
        array: an effect for each of several prompts, e.g. the normalised result of ``wb.patching`` on lists.
        dim: the dimension of the prompts.
        level: of the confidence interval.
        baseline: the value that means no effect.
        draws: bootstrap samples and permutations.
        seed: of the draws.

    Returns:
        Dataset over the other dimensions: ``mean``; ``low`` and ``high``, the percentile bootstrap interval (Efron
        1979), prompts drawn with replacement; ``p``, of the two-sided sign-flip permutation test (Fisher 1935): how
        often the mean is at least as far from the baseline when the sign of each prompt's effect is drawn anew; and
        ``p_family``, the same against the largest mean anywhere in the array (Westfall & Young 1993), which holds for
        all entries together; ``count`` of prompts. NaN where any prompt was not measured.

    Raises:
        ExperimentError: fewer than two prompts.

    Pitfalls: with n prompts no p can be below 2 / 2^n, so five prompts show nothing at 0.05. The test supposes that
    effects without a cause are symmetric about the baseline; ratios with small denominators are not.
    """
    if dim not in array.dims or array.sizes[dim] < 2:
        raise ExperimentError(f"There are no several values along {dim!r}.", expected="two or more prompts",
                              got=f"{dict(array.sizes)}", hint="Pass lists of prompts to the experiment.")
    moved = array.transpose(dim, ...)
    effects = np.asarray(moved.values, dtype=np.float64).reshape(array.sizes[dim], -1) - baseline
    count, entries = effects.shape
    known = np.isfinite(effects).all(0)
    inside, mean = effects[:, known], effects.mean(0)
    draw = np.random.default_rng(seed)
    low, high, p, p_family = (np.full(entries, np.nan) for _ in range(4))
    if known.any():
        _, low[known], high[known] = mean_interval(inside.T, level=level, draws=draws, seed=draw)
        p[known], p_family[known] = _sign_flips(inside, draws, draw)
    rest = {name: coord for name, coord in moved.coords.items() if dim not in coord.dims}
    dims, shape = moved.dims[1:], moved.shape[1:]
    parts = {"mean": mean + baseline, "low": low + baseline, "high": high + baseline, "p": p, "p_family": p_family}
    return xr.Dataset({name: (dims, values.reshape(shape)) for name, values in parts.items()} | {"count": ((), count)},
                      coords=rest, attrs={**array.attrs, "level": level, "baseline": baseline, "draws": draws})


def _sign_flips(effects: np.ndarray, draws: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """All sign patterns where there are no more than the draws, else random ones and the one that was seen."""
    count = len(effects)
    if 2**count <= draws:
        signs = 1 - 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
    else:
        signs = np.concatenate([np.ones((1, count)), draw.choice([-1, 1], size=(draws, count))])
    seen = np.abs(effects.mean(0))
    reach = seen * (1 - 1e-9)  # a pattern and its mirror tie but for rounding
    hits, family, step = np.zeros(len(seen)), np.zeros(len(seen)), max(1, _AT_ONCE // max(1, len(seen)))
    for at in range(0, len(signs), step):
        means = np.abs(signs[at:at + step] @ effects) / count
        hits += (means >= reach).sum(0)
        family += (means.max(1)[:, None] >= reach).sum(0)
    return hits / len(signs), family / len(signs)
