"""Whom an expert serves, and how much of that is the tokens' own doing.

Counting which experts serve which domain finds "experts of arithmetic" in any mixture of experts, because routers go by
the token and digits are frequent in arithmetic. So every share here stands beside what the same tokens would have given
under another label, and beside shuffled labels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import xarray as xr

from gptoss_workbench.errors import ExperimentError
from gptoss_workbench.experiments.routes import Routes, routes_of
from gptoss_workbench.experiments.routing import layer_coords, method_of
from gptoss_workbench.hooks.selection import Indices
from gptoss_workbench.model.model import Model
from gptoss_workbench.model.run import Run

BY_TOKEN = ("text", "id", "role", "channel", "recipient", "field")
_EFFORT = re.compile(r"Reasoning: (low|medium|high)")


def expert_profile(
    model: Model, runs: Run | Sequence[Run], by: str = "text", *, labels: Sequence[str] | None = None,
    tokens: Indices = None, shuffles: int = 200, seed: int = 0, most: int = 40,
) -> xr.Dataset:
    """How often each expert serves the tokens of each kind, beside what token identity and chance would give.

    Args:
        runs: several runs that captured ``router``; more prompts of each kind make better controls.
        by: a label of tokens (``text``, ``channel``, ``role``, ``field``, ...); "effort", read from the system
            message; or a name of your own, such as "task", with ``labels``.
        labels: one for each run.
        tokens: the positions that count; None for all captured. A system message that all prompts share only blurs.
        shuffles: how often labels are shuffled, for each of the two controls.
        seed: of the shuffling.
        most: at most this many kinds are shown, the most frequent ones. All count for the baselines.

    Returns:
        Dataset over (layer, expert, label), float32:

        - ``share``: the part of a label's tokens that the expert serves; ``lift``: share / its share of all tokens.
        - ``expected``: the share if the router saw nothing but the token's id: mean over the label's tokens of how
          often the expert serves that id under any label; ``beyond``: share / expected.
        - ``p_shuffled``: the part of the shuffles of labels between prompts (between stretches of equal label, where a
          prompt has several) in which share is as far from the average as it is. ``p_beyond``: the same for share -
          expected, labels shuffled between occurrences of the same id in different prompts, so that the tokens stay.

        over ``label``: ``count``, its tokens, and ``shared``, the part of them whose id occurs under another label too.
        Only these can show something beyond identity: where it is 0, ``beyond`` is 1 by construction.

        over ``layer``: ``bits``, the information between the label and the expert of a random slot, and
        ``bits_shuffled``, its mean over the shuffles (the estimate's bias); ``explained``, the part of the experts'
        differences between labels that token identity accounts for, 1 - sum(count (share - expected)^2) /
        sum(count (share - usage)^2), and ``explained_shuffled``, what that would be if it accounted for all, noise
        left.

    Raises:
        ExperimentError: labels that do not fit the runs, fewer than two kinds, or an effort that is not stated.
        SiteError: a run lacks the router or a token.

    Sources: differences of shares between kinds of prompts as in SteerMoE (Fayyaz et al. 2025, arXiv 2509.09660); that
    routing goes by the token, Xue et al. 2024 (OpenMoE, arXiv 2402.01739). Permutation tests: Good 2005.

    Pitfalls: a share is use, not importance (``wb.expert_importance``). With n kinds and m experts look at the smallest
    p as one of n m layers tests. Identity is only the nearest neighbour of an explanation: what precedes a token may
    explain the rest.
    """
    routes = routes_of(runs, tokens)
    of_token, prompts = _labels(routes, by, labels), routes.prompt
    keep = np.array([label is not None for label in of_token])
    names, label = np.unique(of_token[keep].astype(str), return_inverse=True)
    if len(names) < 2:
        raise ExperimentError("There is only one kind of tokens, so nothing can differ.", expected="two labels or more",
                              got=f"by={by!r}: {', '.join(names) or 'none'}")
    if shuffles < 1 or most < 1:
        raise ExperimentError("shuffles= and most= count.", expected="1 or more", got=f"{shuffles} and {most}")
    _, token = np.unique(routes.labels["id"][keep].astype(np.int64), return_inverse=True)
    prompt, experts = prompts[keep], model.config.num_local_experts
    # (token, layer * expert), so that counting by label is one product
    served = np.moveaxis(routes.served(experts)[:, keep], 0, 1).reshape(len(label), -1).astype(np.float32)

    count = np.bincount(label, minlength=len(names)).astype(np.float64)
    usage, share = served.mean(0, dtype=np.float64), _mean(served, label, count)
    of_id = _mean(served, token, np.bincount(token).astype(np.float64))
    expected = _by_identity(of_id, label, token, count)
    rng = np.random.default_rng(seed)
    plain, blocks = _stretches(prompt, label), _occurrences(token, prompt, label)
    far, further = np.zeros_like(share), np.zeros_like(share)
    bits, left = [], []
    for _ in range(shuffles):
        other = _shuffled(rng, label, plain, np.zeros_like(label))
        amount = np.bincount(other, minlength=len(names)).astype(np.float64)
        drawn = _mean(served, other, amount)
        far += np.abs(drawn - usage) >= np.abs(share - usage) - 1e-9
        bits.append(_bits(drawn * amount[:, None], experts))
        other = _shuffled(rng, label, blocks, token)
        amount = np.bincount(other, minlength=len(names)).astype(np.float64)
        drawn = _mean(served, other, amount)
        by_identity = _by_identity(of_id, other, token, amount)
        further += np.abs(drawn - by_identity) >= np.abs(share - expected) - 1e-9
        left.append(_explained(amount, drawn, by_identity, usage, experts))
    shown = np.argsort(-count, kind="stable")[:most]

    def cells(values: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
        return ("layer", "expert", "label"), np.moveaxis(
            values[shown].reshape(len(shown), -1, experts), 0, -1).astype(np.float32)

    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = share / usage, share / expected
    several = np.array([len(set(label[token == one])) > 1 for one in range(token.max() + 1)])[token]
    per_layer = {"bits": _bits(share * count[:, None], experts), "bits_shuffled": np.mean(bits, 0),
                 "explained": _explained(count, share, expected, usage, experts),
                 "explained_shuffled": np.mean(left, 0)}
    return xr.Dataset(
        {"share": cells(share), "lift": cells(ratios[0]), "expected": cells(expected), "beyond": cells(ratios[1]),
         "p_shuffled": cells((far + 1) / (shuffles + 1)), "p_beyond": cells((further + 1) / (shuffles + 1)),
         "count": ("label", count[shown].astype(np.int64)),
         "shared": ("label", _mean(several[:, None], label, count)[shown, 0].astype(np.float32)),
         **{name: ("layer", values.astype(np.float32)) for name, values in per_layer.items()}},
        coords={**layer_coords(model, routes), "expert": range(experts), "label": names[shown].astype(object)},
        attrs={"model": model.name, "by": by, "tokens": len(label), "shuffles": shuffles,
               "provenance": method_of(routes, "expert_profile", by=by, labels=list(labels) if labels else None,
                                       tokens=repr(tokens), shuffles=shuffles, seed=seed)},
    )


def _labels(routes: Routes, by: str, labels: Sequence[str] | None) -> np.ndarray:
    """What each token is, None where it is nothing: (token,) object."""
    if labels is not None:
        if len(labels) != len(routes.runs):
            raise ExperimentError("labels= needs one for each run.", expected=f"{len(routes.runs)} labels",
                                  got=len(labels))
        return np.array(list(labels), dtype=object)[routes.prompt]
    if by == "effort":
        return np.array([_effort(run) for run in routes.runs], dtype=object)[routes.prompt]
    if by not in BY_TOKEN:
        raise ExperimentError(f"Tokens can't be told apart by {by!r}.", expected="effort, " + ", ".join(BY_TOKEN),
                              got=repr(by), hint="For a kind of your own give labels=, one for each run.")
    return routes.labels[by].astype(object)


def _effort(run: Run) -> str:
    said = "".join("".join(run.tokens[span.start:span.stop]) for span in run.spans if span.role == "system")
    found = _EFFORT.search(said)
    if found is None:
        raise ExperimentError("A run states no effort.", expected='"Reasoning: high" or so in its system message',
                              got=repr(said[:60]), hint="Give labels=, one for each run.")
    return found[1]


def _mean(values: np.ndarray, group: np.ndarray, count: np.ndarray) -> np.ndarray:
    """values (token, ...) -> their mean in each group, (group, ...); 0 where a group is empty."""
    sums = np.zeros((len(count), values.shape[1]))
    order = np.argsort(group, kind="stable")
    present, starts = np.unique(group[order], return_index=True)
    sums[present] = np.add.reduceat(values[order], starts, axis=0, dtype=np.float64)
    return sums / np.maximum(count, 1)[:, None]


def _by_identity(of_id: np.ndarray, label: np.ndarray, token: np.ndarray, count: np.ndarray) -> np.ndarray:
    """of_id (id, ...), what is usual for each id -> its mean over the tokens of each label, (label, ...)."""
    ids = len(of_id)
    table = np.bincount(label * ids + token, minlength=len(count) * ids).reshape(len(count), ids)
    return table @ of_id / np.maximum(count, 1)[:, None]


def _stretches(prompt: np.ndarray, label: np.ndarray) -> np.ndarray:
    """The number of the stretch of equal label in a prompt that each token stands in."""
    new = np.ones(len(label), dtype=bool)
    new[1:] = (prompt[1:] != prompt[:-1]) | (label[1:] != label[:-1])
    return np.cumsum(new) - 1


def _occurrences(token: np.ndarray, prompt: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Occurrences of an id under one label of one prompt go together: they are no independent samples."""
    return np.unique(np.stack([token, prompt, label]), axis=1, return_inverse=True)[1].reshape(-1)


def _shuffled(rng: np.random.Generator, label: np.ndarray, unit: np.ndarray, within: np.ndarray) -> np.ndarray:
    """Labels exchanged between units, all tokens of a unit together, only between units of the same ``within``."""
    _, first, unit = np.unique(unit, return_index=True, return_inverse=True)
    of_unit, group = label[first], within[first]
    target = np.argsort(group, kind="stable")
    source = np.lexsort((rng.random(len(first)), group))
    drawn = np.empty_like(of_unit)
    drawn[target] = of_unit[source]
    return drawn[unit]


def _bits(counts: np.ndarray, experts: int) -> np.ndarray:
    """counts (label, layer * expert) of slots -> information between label and expert in bits, (layer,)."""
    joint = np.moveaxis(counts.reshape(len(counts), -1, experts), 1, 0)
    joint = joint / joint.sum((1, 2), keepdims=True)
    alone = joint.sum(1, keepdims=True) * joint.sum(2, keepdims=True)
    seen = joint > 0
    return (joint * np.log2(np.where(seen, joint, 1) / np.where(seen, alone, 1))).sum((1, 2))


def _explained(
    count: np.ndarray, share: np.ndarray, expected: np.ndarray, usage: np.ndarray, experts: int,
) -> np.ndarray:
    """The part of the differences between labels that the expectation accounts for, (layer,)."""
    def size(difference: np.ndarray) -> np.ndarray:
        return (count[:, None] * difference**2).sum(0).reshape(-1, experts).sum(1)

    whole = size(share - usage)
    return 1 - size(share - expected) / np.where(whole > 0, whole, np.nan)
