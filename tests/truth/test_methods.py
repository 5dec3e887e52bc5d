"""A small share of ``make truth``: exact methods are right, the threshold is honest, the numbers are the model's."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

import gptoss_workbench as wb
from gptoss_workbench.planted import Place
from tests.tolerances import SITE_F32
from tests.truth import methods, report, score, table
from tests.truth.base import metric_of, whole_effect

NAMED = {method.name: method for method in methods.METHODS}
EXACT = [method for method in methods.METHODS if method.name.startswith("exact") and "noising" not in method.name]


@pytest.fixture(scope="module")
def route():
    return wb.planted.route(11, pairs=12)


@pytest.mark.parametrize("name", ["induction", "route", "sink gate", "unfaithful reasoning"])
def test_exact_patching_names_the_truth_by_rank_and_by_threshold(name: str) -> None:
    planted = wb.planted.MAKERS[name](11, pairs=12)
    for method in EXACT:
        found = score.effects(method, planted)
        right = score.hits(method, planted, found)
        assert right is None or set(right.values()) == {1.0}, (method.name, right)
        assert score.verdict(method, found).named == score.true_places(method.kind, planted)


def test_looking_is_fooled_where_patching_is_not(route) -> None:
    """Direct attribution can't see an expert whose output is fetched later, and usage can't tell it from its decoy."""
    for name in ("direct logit attribution, experts", "expert usage"):
        method = NAMED[name]
        right = score.hits(method, route, score.effects(method, route))
        assert right is not None and right["expert"] < 1


def test_own_taps_equal_the_workbench_edits(route) -> None:
    model, pair = route.model, route.pairs[0]
    clean, corrupt = list(pair.clean), list(pair.corrupt)
    base = metric_of(model.run(corrupt), pair)
    run = model.run(clean, capture=["attn.z", "router.logits"])
    heads, router = methods.patch_heads(model, pair), methods.patch_router(model, pair)
    residual = wb.patching(model, clean, corrupt, metric=pair.metric, normalize=False)
    np.testing.assert_allclose(methods.patch_residual(model, pair)[:, 0], residual - base, atol=SITE_F32)
    experts, change = methods.patch_experts(model, pair), methods.expert_change(model, pair)
    mover = next(place for place in route.truth if place.kind == "head")
    expert = next(place for place in route.truth if place.kind == "expert")
    at, last = pair.roles["subject"], len(clean) - 1
    for edit, value in (
        (wb.patch("attn.z", run, layer=mover.layer, head=mover.index, tokens=last),
         heads[mover.layer, mover.index, last]),
        (wb.patch("router.logits", run, layer=expert.layer, tokens=at), router[expert.layer, 0, at]),
        (wb.add("mlp.out", change[expert.layer, expert.index, at].tolist(), layer=expert.layer, tokens=at),
         experts[expert.layer, expert.index, at]),
    ):
        assert metric_of(model.run(corrupt, edits=edit), pair) - base == pytest.approx(value, abs=SITE_F32)
        assert abs(value) > 1


def test_integrated_gradients_add_up_at_the_embedding() -> None:
    """At the input the attributions sum to the whole effect where nothing discrete changes on the way."""
    planted = wb.planted.band(3, pairs=1)
    (pair,) = planted.pairs
    parts = methods.attribute_residual(planted.model, pair, integrated=True)[0]
    assert parts.sum() == pytest.approx(whole_effect(planted.model, pair), rel=0.1)


@pytest.mark.parametrize("number", [0, 2])
def test_nothing_is_named_where_there_is_nothing(number: int) -> None:
    like = list(wb.planted.MAKERS)[number]
    blank = wb.planted.no_circuit(number, like=like, pairs=12)
    rows = report.ask(blank, [*EXACT, NAMED["gradient x difference, heads"]])
    assert [row["false"] for row in rows] == [[]] * len(rows)


# the arithmetic of the verdict --------------------------------------------------------------------------------------


def test_the_permutation_test_counts_what_it_says() -> None:
    """Against a plain loop over all sign patterns, with places that say nothing."""
    values = np.random.default_rng(0).normal(0.5, 1, (6, 2, 3))
    values[:, 1, 2] = np.nan
    signs = np.array(np.meshgrid(*[[1, -1]] * 6)).reshape(6, -1)
    largest = np.array([np.nanmax((values * sign[:, None, None]).sum(0)) for sign in signs.T])
    want = np.array([[np.mean(largest >= total - 1e-6) for total in row] for row in values.sum(0)])
    want[1, 2] = 1
    np.testing.assert_allclose(score.family_wise_p(values), want, atol=1e-9)


def test_the_permutation_test_is_honest() -> None:
    """On pure noise one family in twenty passes 0.05: 400 families, bounds at four standard deviations."""
    draw = np.random.default_rng(1)
    low = [score.family_wise_p(draw.normal(size=(8, 4, 4, 3))).min() <= 0.05 for _ in range(400)]
    assert abs(np.mean(low) - 0.05) < 4 * (0.05 * 0.95 / 400) ** 0.5


def test_places_elsewhere_keep_the_largest() -> None:
    pair = wb.planted.Pair((1, 2, 3, 4), (1, 2, 3, 5), 0, 1, {"last": 3})
    by_role = score._by_role(np.array([[[0.1, -2.0, 1.0, 0.5]]]), pair)
    assert by_role.tolist() == [[[0.5, -2.0]]]


def test_hits_count_each_place_once() -> None:
    planted = replace(wb.planted.fact(0, expert=(0, 2), mover=(2, 1), pairs=1),
                      truth=frozenset({Place("head", 0, 1, "subject"), Place("head", 2, 1, "last")}))
    values = np.zeros((1, 4, 4, 3))
    values[0, 0, 1, 0], values[0, 2, 3, 1] = 2.0, 1.0  # the first place right, the second in another head
    found = score.Effects(values, ("subject", "last", score.ELSEWHERE), np.ones(1))
    assert score.hits(NAMED["exact patching, heads"], planted, found) == {"layer": 1.0, "token": 1.0, "head": 0.5}


def test_the_published_results_meet_the_goals(repository) -> None:
    results = json.loads(report.RESULTS.read_text(encoding="utf-8"))
    assert len(results["blank"]) >= 50 and {one["circuit"] for one in results["planted"]} == set(report.CIRCUITS)
    assert table.missed(results) == []
    assert report.PAGE.read_text(encoding="utf-8") == table.page(results)


def results_with(blank: list[dict]) -> dict:
    return {"planted": [], "blank": [{"seed": 0, "asked": "fact", "rows": blank}], "cut": []}


def test_a_false_alarm_is_a_missed_goal() -> None:
    fine = {"method": "RelP, heads", "chance": 0.4, "share": 0.1, "false": []}
    wrong = {"method": "RelP, heads", "chance": 0.0002, "share": 0.3, "false": ["head 2 of layer 0 at last"]}
    assert (table.CHANCE, table.SHARE) == (score.CHANCE, score.SHARE)
    assert table.missed(results_with([fine] * 9)) == []
    (said,) = table.missed(results_with([fine, wrong]))
    assert "RelP, heads, the random model of seed 0" in said and "head 2 of layer 0" in said
