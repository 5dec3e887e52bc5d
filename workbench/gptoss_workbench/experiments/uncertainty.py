"""Means over prompts with their uncertainty."""

from __future__ import annotations

import numpy as np
import xarray as xr

from gptoss_workbench.errors import ExperimentError

_AT_ONCE = 1 << 22  # draws times entries held together


def summarize(
    array: xr.DataArray, dim: str = "pair", *, level: float = 0.95, baseline: float = 0.0, draws: int = 2000,
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
        chosen = draw.multinomial(count, np.full(count, 1 / count), size=draws) / count  # how often each was drawn
        tails = [(1 - level) / 2, (1 + level) / 2]
        step = max(1, _AT_ONCE // draws)
        low[known], high[known] = np.concatenate(
            [np.quantile(chosen @ inside[:, at:at + step], tails, axis=0) for at in range(0, inside.shape[1], step)], 1)
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
