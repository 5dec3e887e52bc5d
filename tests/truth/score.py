"""From scores to verdicts: which places a method names, and whether they are the true ones.

Two questions, kept apart.

- *Rank*: told how many true places there are, are they the ones that the method puts first? That is the hit rate.
- *Threshold*: told nothing, which places does it name? A place is named when over the pairs its mean effect is at least
  ``SHARE`` of the whole effect (the root mean square over pairs of clean minus corrupt) and no more than a share of
  ``CHANCE`` of the assignments of "answer" and "other" to the pairs' two tokens gives any place of the model as large a
  mean effect: with 12 pairs the true one alone, the strictest that they allow. It is a sign-flip permutation test that
  holds for all places together (Westfall & Young 1993).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gptoss_workbench.planted import Pair, Place, Planted
from tests.truth.base import Method

SHARE, CHANCE = 0.25, 1 / 4096
ELSEWHERE = "elsewhere"  # the role of every token without one
ANYWHERE = "any token"  # the only role of a method that asks about the prompt as a whole
SUBLAYERS = {"attention": "head", "mlp": "expert"}  # a sublayer is true where something true is inside it


@dataclass(frozen=True, eq=False)
class Effects:
    """Scores of one method on one model, by the tokens' roles.

    Attributes:
        values: (pair, layer, index, role); NaN where the method says nothing.
        roles: names along the last dimension; the last one is ELSEWHERE, the largest of all tokens without a role.
            ANYWHERE alone for a method that does not tell tokens apart.
        whole: (pair,), the metric of the clean prompt less that of the corrupt (or blurred) one.
    """

    values: np.ndarray
    roles: tuple[str, ...]
    whole: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """(layer, index, role)."""
        return self.values.mean(0)

    def place(self, kind: str, at: Sequence[int]) -> Place:
        layer, index, role = (int(i) for i in at)
        return Place(kind, layer, index if self.values.shape[2] > 1 else -1, self.roles[role])


def effects(method: Method, planted: Planted) -> Effects:
    """Run a method on every pair of a planted model."""
    scores = [method.scores(planted.model, pair) for pair in planted.pairs]
    whole = np.array([method.whole(planted.model, pair) for pair in planted.pairs])
    if all(one.shape[-1] == 1 for one in scores):
        return Effects(np.stack(scores), (ANYWHERE,), whole)
    values = [_by_role(one, pair) for one, pair in zip(scores, planted.pairs, strict=True)]
    return Effects(np.stack(values), (*planted.pairs[0].roles, ELSEWHERE), whole)


def _by_role(scores: np.ndarray, pair: Pair) -> np.ndarray:
    """(layer, index, token) -> (layer, index, role)."""
    at = list(pair.roles.values())
    rest = np.delete(scores, at, axis=-1)
    said = np.nan_to_num(np.abs(rest), nan=-1.0)
    largest = np.take_along_axis(rest, said.argmax(-1)[..., None], -1)  # with its sign
    return np.concatenate([scores[..., at], largest], -1)


# by rank ------------------------------------------------------------------------------------------------------------


def top(found: Effects, kind: str, count: int) -> list[Place]:
    """The places with the largest mean scores, best first."""
    order = np.argsort(-np.nan_to_num(found.mean, nan=-np.inf), axis=None, kind="stable")[:count]
    return [found.place(kind, np.unravel_index(i, found.mean.shape)) for i in order]


def hits(method: Method, planted: Planted, found: Effects) -> dict[str, float] | None:
    """The share of the truth that the method names, for each of what it tells; None where there is no truth of its
    kind in this model."""
    if method.kind == "residual":
        return _path_hits(planted, found)
    if method.kind == "lens":
        writer = max(place.layer for place in planted.truth if place.role == "last")
        return {"layer": float(top(found, "lens", 1)[0].layer == writer)}
    true = true_places(method.kind, planted)
    if not true:
        return None
    named = top(found, method.kind, len(true))
    keys = {"layer": lambda p: p.layer, "token": lambda p: (p.layer, p.role), method.kind: lambda p: (p.layer, p.index),
            "head": lambda p: (p.layer, p.index)}
    return {what: _shared(map(keys[what], named), map(keys[what], true)) for what in method.tells}


def true_places(kind: str, planted: Planted, roles: Sequence[str] = ()) -> set[Place]:
    """The truth as far as it is of one kind; at ANYWHERE where that is the only role."""
    if tuple(roles) == (ANYWHERE,):
        return {replace(place, role=ANYWHERE) for place in true_places(kind, planted)}
    if kind == "residual":
        return {Place(kind, layer, -1, role) for layer, role in enumerate(planted.path)}
    if kind == "sink":
        return {Place(kind, *planted.sink, "last")} if planted.sink is not None else set()
    if kind in SUBLAYERS:
        return {Place(kind, place.layer, -1, place.role) for place in planted.truth if place.kind == SUBLAYERS[kind]}
    return {place for place in planted.truth if place.kind == kind}


def _shared(named: Iterable[object], true: Iterable[object]) -> float:
    wanted = Counter(true)
    return (wanted & Counter(named)).total() / wanted.total()


def _moves(path: Sequence[str]) -> list[int]:
    """Layers in which the difference changes its token; after the last layer it is at the last token."""
    return [layer for layer, (now, then) in enumerate(zip(path, [*path[1:], "last"])) if now != then]


def _path_hits(planted: Planted, found: Effects) -> dict[str, float]:
    """Token: at how many layers' inputs the strongest token is the true one. Layer: whether it moves in the right ones.
    """
    strongest = [found.roles[i] for i in found.mean[:, 0].argmax(-1)]
    right = np.mean([a == b for a, b in zip(strongest, planted.path)])
    return {"layer": float(_moves(strongest) == _moves(planted.path)), "token": float(right)}


# by threshold -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What a method says at the threshold.

    Attributes:
        named: the places that pass.
        chance: the smallest family-wise p of any place.
        share: the largest mean effect of any place, as a share of the whole effect.
    """

    named: frozenset[Place]
    chance: float
    share: float


def verdict(method: Method, found: Effects) -> Verdict:
    """Hold a method's effects against the threshold."""
    passed, chance, share = threshold(found.values, found.whole)
    return Verdict(frozenset(found.place(method.kind, at) for at in np.argwhere(passed)), float(chance.min()),
                   float(np.nanmax(share)))


def threshold(values: np.ndarray, whole: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which places pass, their chance, and their share of the whole effect.

    Args:
        values: (pair, ...).
        whole: (pair,).

    Returns:
        three of (...).
    """
    chance, share = family_wise_p(values), values.mean(0) / np.sqrt((whole**2).mean())
    return (share >= SHARE) & (chance <= CHANCE), chance, share


def family_wise_p(values: np.ndarray) -> np.ndarray:
    """(pair, ...) -> (...): how often random signs of the pairs give any place so large a mean. All sign patterns are
    tried, so with n pairs the smallest p is 2 ** -n. NaN places get 1."""
    pairs = values.shape[0]
    flat = values.reshape(pairs, -1)
    said = np.isfinite(flat).all(0)
    signs = 1 - 2 * ((np.arange(2**pairs)[:, None] >> np.arange(pairs)) & 1).astype(np.float32)
    largest = np.concatenate([(part @ flat[:, said].astype(np.float32)).max(-1) for part in np.array_split(signs, 16)])
    observed = flat[:, said].astype(np.float32).sum(0)
    slack = 1e-5 * np.abs(flat[:, said]).sum(0).max(initial=0.0)  # the same sum in another order
    p = np.ones(flat.shape[1])
    p[said] = 1 - np.searchsorted(np.sort(largest), observed - slack) / len(largest)
    return p.reshape(values.shape[1:])
