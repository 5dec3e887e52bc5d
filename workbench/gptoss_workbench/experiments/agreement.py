"""How well estimates agree with what they estimate."""

from __future__ import annotations

import numpy as np
import xarray as xr

from gptoss_workbench.errors import ExperimentError


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two lists, ties at their mean rank; NaN for fewer than three, or where all are equal."""
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[index]


def ranking(estimate: np.ndarray, top: int, others: int, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flat indices of the places to check: the largest estimates, and some of the rest, drawn with seed 0.

    Args:
        estimate: any shape; the size counts, not the sign.
        candidates: of the same shape, False for places that can have no effect.
    """
    size = np.where(candidates, np.abs(estimate), -1.0).ravel()
    order = np.argsort(-size, kind="stable")[:int(candidates.sum())]
    rest = np.sort(order[top:])
    drawn = np.random.default_rng(0).choice(rest, min(others, len(rest)), replace=False) if len(rest) else rest
    return order[:top], drawn


def agreement(estimate: np.ndarray, exact: np.ndarray, top: np.ndarray, others: np.ndarray) -> dict[str, float]:
    """What the checks say of the estimates, as attributes of a result; a number that does not exist is left out.

    Args:
        estimate, exact: means over pairs, flat.
        top, others: flat indices of what was checked.
    """
    one, two = estimate[top], exact[top]
    found = {"rank_correlation": spearman(one, two)}
    found |= {"sign_agreement": float((np.sign(one) == np.sign(two)).mean())} if len(top) else {}
    found |= {"largest_other": float(np.abs(exact[others]).max())} if len(others) else {}
    return {name: value for name, value in found.items() if np.isfinite(value)}


def checked(result: xr.Dataset) -> xr.Dataset:
    """The places of a ``wb.attribution`` that were patched exactly, largest estimates first.

    Returns:
        Dataset over ``place``: ``estimate`` and ``exact`` (means over pairs), ``top`` (False for places drawn from the
        rest), and the labels of each place: layer, token, text, head, ... ``.to_dataframe()`` prints well.

    Raises:
        ExperimentError: nothing was checked, or it is another result.
    """
    if "exact" not in result or "estimate" not in result:
        raise ExperimentError("This is no attribution.", expected="the result of wb.attribution",
                              got=", ".join(map(str, result.data_vars)))
    several = "pair" in result["estimate"].dims
    estimate, exact = (result[name].mean("pair", skipna=False) if several else result[name]
                       for name in ("estimate", "exact"))
    values = exact.values.ravel()
    found = np.flatnonzero(np.isfinite(values))
    if not len(found):
        raise ExperimentError("No place of this attribution was checked.", expected="a result that ran to its end",
                              got=f"complete: {result.attrs.get('complete')}", hint="Pass it on as resume=.")
    best, _ = ranking(estimate.values, result.attrs["top"], 0, result_candidates(result))
    found = found[np.argsort(-np.abs(estimate.values.ravel()[found]), kind="stable")]
    at = dict(zip(estimate.dims, np.unravel_index(found, estimate.shape), strict=True))
    coords: dict[str, tuple[str, np.ndarray]] = {}
    for name, coord in estimate.coords.items():
        if len(coord.dims) == 1 and coord.dims[0] in at:
            coords[str(name)] = ("place", coord.values[at[coord.dims[0]]])
    return xr.Dataset(
        {"estimate": ("place", estimate.values.ravel()[found]), "exact": ("place", values[found]),
         "top": ("place", np.isin(found, best))},
        coords=coords, attrs=dict(result.attrs))


ROUNDING = 1e-5
"""A difference of two runs below this part of the largest one is rounding, not content."""


def result_candidates(result: xr.Dataset) -> np.ndarray:
    """Which places differ between clean and corrupt in some pair, in the shape of one pair's places."""
    gap = result["difference"]
    return candidates(gap.values if "pair" in gap.dims else gap.values[None])


def candidates(difference: np.ndarray) -> np.ndarray:
    """(pair, place...) sizes of differences -> (place...) bool."""
    largest = difference.max(initial=0.0)
    return difference.max(0) > ROUNDING * largest
