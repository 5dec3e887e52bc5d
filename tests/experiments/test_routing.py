"""Routing experiments by counting, by enumeration, and with planted routers whose rule is known."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, product
from math import exp, log, log2
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gptoss_workbench as wb
from gptoss_workbench.errors import ExperimentError, SiteError
from gptoss_workbench.experiments.expert_profile import _shuffled
from gptoss_workbench.experiments.routing import expected_together
from gptoss_workbench.model.run import Run
from gptoss_workbench.nano.behaviour import completion_losses
from gptoss_workbench.nano.measures import mutual_information
from gptoss_workbench.nano.problems import draw_problem
from tests.factories import tiny_model, write_hf
from tests.tolerances import EMBEDDED_LOSS_F32, FITTED, SUM_F32

ONE, TWO = [5, 17, 300, 8, 90, 91, 12, 3, 44, 210], [5, 17, 301, 8, 8]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    return wb.load(write_hf(tmp_path_factory.mktemp("tiny"), tiny_model(seed=21)), dtype="float32")


@pytest.fixture(scope="module")
def runs(tiny):
    return tiny.run([ONE, TWO], capture=["router", "resid_post"])


def routed(model, ids, rows) -> Run:
    """A run whose routes are given: rows (token, slot), the same in every layer, weights 0.4, 0.3, 0.2, 0.1."""
    kept = {}
    for layer in range(model.config.num_hidden_layers):
        kept["router.experts", layer] = torch.tensor(rows)
        kept["router.weights", layer] = torch.tensor([[0.4, 0.3, 0.2, 0.1]] * len(rows))
    return Run(model, ids, torch.zeros(len(ids), 64), kept, range(len(ids)))


def test_stats_by_counting(tiny, runs) -> None:
    found = wb.routing_stats(runs)
    for layer in range(4):
        served, weight = Counter(), Counter()
        for run in runs:
            slots = zip(run.tensor("router.experts", layer).flatten().tolist(),
                        run.tensor("router.weights", layer).flatten().tolist(), strict=True)
            for expert, share in slots:
                served[expert] += 1
                weight[expert] += share
        for expert in range(8):
            assert float(found["usage"][layer, expert]) == pytest.approx(served[expert] / 15, abs=SUM_F32)
            assert float(found["load"][layer, expert]) == pytest.approx(weight[expert] / 15, abs=SUM_F32)
        mixed = exp(-sum(n / 60 * log(n / 60) for n in served.values())) / 8
        assert float(found["balance"][layer]) == pytest.approx(mixed, abs=SUM_F32)
        for column in (0, 9, 12):
            run, token = (runs[0], column) if column < 10 else (runs[1], column - 10)
            p = run.tensor("router.logits", layer)[token].double().softmax(-1).tolist()
            assert float(found["entropy"][layer, column]) == pytest.approx(-sum(x * log2(x) for x in p), abs=SUM_F32)
            ordered = sorted(run.tensor("router.logits", layer)[token].tolist())
            assert float(found["margin"][layer, column]) == pytest.approx(ordered[4] - ordered[3], abs=SUM_F32)
            assert float(found["decisiveness"][layer, column]) == float(run.tensor("router.weights", layer)[token][0])
    assert found["prompt"].values.tolist() == [0] * 10 + [1] * 5 and found["id"].values.tolist() == ONE + TWO
    np.testing.assert_allclose(wb.routing_stats(runs[0])["load"], wb.expert_usage(runs[0]), atol=SUM_F32)


def test_a_banned_expert_has_no_load_and_no_entropy_of_its_own(tiny) -> None:
    run = tiny.run(ONE, capture="router", edits=[wb.ban_experts(layer=1, experts=[2, 5])])
    found = wb.routing_stats(run)
    assert float(found["usage"][1, [2, 5]].sum()) == 0 and np.isfinite(found["entropy"]).all()


@given(st.lists(st.floats(0.05, 4.0), min_size=4, max_size=6), st.integers(1, 3))
def test_expected_pairs_are_those_of_the_fitted_random_sets(odds, slots) -> None:
    """Enumerate every set with the chance that its odds give; from the usages alone the pairs come back."""
    sets = list(combinations(range(len(odds)), slots))
    chance = np.array([np.prod([odds[i] for i in one]) for one in sets])
    chance /= chance.sum()
    together = np.zeros((len(odds), len(odds)))
    for one, p in zip(sets, chance, strict=True):
        for i, j in product(one, one):
            together[i, j] += p
    found = expected_together(np.diagonal(together).copy(), slots)
    away = ~np.eye(len(odds), dtype=bool)
    np.testing.assert_allclose(found[away], together[away], atol=FITTED)


def test_coactivation_by_counting(tiny) -> None:
    rows = [[0, 1, 2, 3], [0, 1, 4, 5], [0, 1, 6, 7], [2, 3, 6, 0]]
    found = wb.expert_coactivation(routed(tiny, ONE[:4], rows))
    for i, j in product(range(8), range(8)):
        assert float(found["together"][2, i, j]) == sum({i, j} <= set(row) for row in rows) / 4
    assert float(found["lift"][0, 4, 5]) > 1 > float(found["lift"][0, 4, 7])
    assert float(found["lift"][0, 0, 1]) == pytest.approx(1)  # 0 serves always: with it, nothing is surprising
    assert np.isnan(float(found["lift"][0, 3, 3]))


def planted(tiny, beyond: bool):
    """40 runs of 30 tokens out of 12 ids, of two kinds that favour other ids. Expert id % 4 serves each id, and
    experts 4 to 6 besides; under ``beyond`` expert 7 instead of 6 for even ids of kind b, whatever the id."""
    rng, runs, labels = np.random.default_rng(7), [], []
    for number in range(40):
        kind = "ab"[number % 2]
        odds = np.where(np.arange(12) % 4 == (0 if kind == "a" else 1), 5.0, 1.0)
        ids = rng.choice(12, 30, p=odds / odds.sum()).tolist()
        last = [7 if beyond and kind == "b" and one % 2 == 0 else 6 for one in ids]
        runs.append(routed(tiny, ids, [[one % 4, 4, 5, end] for one, end in zip(ids, last, strict=True)]))
        labels.append(kind)
    return runs, labels


def test_identity_alone_is_seen_through(tiny) -> None:
    runs, labels = planted(tiny, beyond=False)
    found = wb.expert_profile(tiny, runs, "task", labels=labels, shuffles=100).sel(layer=0)
    a = found.sel(label="a")
    assert float(a["lift"].sel(expert=0)) > 1.5 and float(a["p_shuffled"].sel(expert=0)) < 0.01  # a "specialist" ...
    np.testing.assert_allclose(found["beyond"].sel(expert=[0, 1, 2, 3]), 1, atol=SUM_F32)  # ... of its ids alone
    assert float(found["explained"]) == pytest.approx(1) and (found["p_beyond"] == 1).all()
    assert float(found["bits"]) > 5 * float(found["bits_shuffled"])
    np.testing.assert_allclose(found["shared"], 1)


def test_what_goes_beyond_identity_is_found(tiny) -> None:
    runs, labels = planted(tiny, beyond=True)
    found = wb.expert_profile(tiny, runs, "task", labels=labels, shuffles=100).sel(layer=0)
    p = found["p_beyond"].sel(label="b")
    assert (p.sel(expert=[6, 7]) < 0.01).all() and (p.sel(expert=[0, 1, 2, 3, 4, 5]) == 1).all()
    assert float(found["explained"]) < 0.8 < float(found["explained_shuffled"])


def test_shares_by_counting(tiny, runs) -> None:
    found = wb.expert_profile(tiny, runs, "task", labels=["x", "y"], shuffles=3)
    for layer, expert in ((0, 1), (3, 6)):
        served = {name: [expert in row for row in run.tensor("router.experts", layer).tolist()]
                  for name, run in zip("xy", runs, strict=True)}
        share = {name: sum(some) / len(some) for name, some in served.items()}
        overall = sum(map(sum, served.values())) / 15
        of_id = {one: [s for name, ids in (("x", ONE), ("y", TWO))
                       for i, s in zip(ids, served[name], strict=True) if i == one] for one in ONE + TWO}
        for name, ids in (("x", ONE), ("y", TWO)):
            cell = found.sel(layer=layer, expert=expert, label=name)
            expected = sum(sum(of_id[one]) / len(of_id[one]) for one in ids) / len(ids)
            assert float(cell["share"]) == pytest.approx(share[name], abs=SUM_F32)
            assert float(cell["expected"]) == pytest.approx(expected, abs=SUM_F32)
            if overall:
                assert float(cell["lift"]) == pytest.approx(share[name] / overall, abs=SUM_F32)
    slots = [(name, expert) for name, run in zip("xy", runs, strict=True)
             for expert in run.tensor("router.experts", 2).flatten().tolist()]
    assert float(found["bits"].sel(layer=2)) == pytest.approx(mutual_information(*zip(*slots, strict=True)), abs=1e-5)
    assert found["count"].values.tolist() == [10, 5]
    np.testing.assert_allclose(found["shared"], [3 / 10, 4 / 5])  # 5, 17 and 8 stand in both


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=20), st.integers(0, 99))
def test_shuffling_keeps_units_whole_and_groups_apart(drawn, seed) -> None:
    unit = np.array([place for place, _ in drawn])
    group, label = unit % 2, np.array([3 * place + 1 for place, _ in drawn])
    found = _shuffled(np.random.default_rng(seed), label, unit, group)
    for one in np.unique(unit):
        assert len(set(found[unit == one])) == 1
    for one in (0, 1):
        own = [(u, x) for u, x in zip(unit[group == one], found[group == one], strict=True)]
        assert sorted({x for _, x in own}) == sorted({3 * u + 1 for u, _ in own})


def test_profiles_by_labels_of_tokens_and_by_effort(model) -> None:
    chats = [wb.chat(f"What is {n} + 58?", effort=effort) for n in (21, 34) for effort in ("low", "high")]
    runs = model.run(chats, capture="router")
    efforts = wb.expert_profile(model, runs, "effort", shuffles=5, tokens=wb.where(role="user"))
    assert sorted(efforts["label"].values) == ["high", "low"]
    roles = wb.expert_profile(model, runs, "role", shuffles=5)
    assert {"system", "user"} <= set(roles["label"].values)
    texts = wb.expert_profile(model, runs, "text", shuffles=5, most=3)
    assert texts.sizes["label"] == 3 and (texts["count"].diff("label") <= 0).all()
    shown = texts["beyond"].values
    np.testing.assert_allclose(shown[np.isfinite(shown)], 1, atol=1e-5)  # a text is its own identity


@pytest.mark.parametrize("mode, edit", [("silence", wb.silence_experts), ("route_around", wb.route_around)])
def test_importance_equals_one_run_after_the_other(tiny, runs, mode, edit) -> None:
    metric = wb.logit_diff(7, 450)
    costs, seen = [], []
    found = wb.expert_importance(tiny, [ONE, TWO], metric, mode, layers=[1, 3], labels=["x", "y"],
                                 on_plan=costs.append, on_progress=lambda *at: seen.append(at))
    tried = 0
    for number, (ids, run) in enumerate(zip((ONE, TWO), runs, strict=True)):
        base = float(run.logits[-1, 7] - run.logits[-1, 450])
        assert float(found["value"][number]) == pytest.approx(base, abs=SUM_F32)
        for layer, expert in product((1, 3), range(8)):
            cell = found.sel(layer=layer, expert=expert, prompt=number)
            if expert not in run.tensor("router.experts", layer):
                assert float(cell["harm"]) == 0 and float(cell["use"]) == 0
                continue
            tried += 1
            other = tiny.run(ids, edits=[edit(layer=layer, experts=expert)]).logits[-1]
            assert float(cell["harm"]) == pytest.approx(base - float(other[7] - other[450]), abs=SUM_F32)
        used = wb.expert_usage(run).sel(layer=[1, 3])
        np.testing.assert_allclose(found["use"].sel(prompt=number), used, atol=SUM_F32)
    assert costs[0].at_most and tried + 2 <= costs[0].passes <= 2 * 2 * 8 + 2 and seen[-1] == (tried + 2, tried + 2)
    assert found["label"].values.tolist() == ["x", "y"]
    assert np.isfinite(found["agreement"]).all() and (abs(found["agreement"]) <= 1).all()


@pytest.mark.parametrize("tokens", [slice(0, 4), slice(3, 8), [7, 8]])
def test_importance_of_a_loss_at_some_tokens(tiny, tokens) -> None:
    """Taken away before the completion, across its beginning, and within it."""
    found = wb.expert_importance(tiny, [ONE[:6]], "loss", completions=[ONE[6:]], layers=2, tokens=tokens)
    run = tiny.run(ONE, capture="router")

    def loss(run) -> float:
        log_p = run.logits[5:9].log_softmax(-1)
        return -float(log_p.gather(1, torch.tensor(ONE[6:])[:, None]).mean())

    assert float(found["value"][0]) == pytest.approx(loss(run), abs=SUM_F32)
    for expert in set(run.tensor("router.experts", 2)[tokens].flatten().tolist()):
        other = loss(tiny.run(ONE, edits=[wb.silence_experts(layer=2, experts=expert, tokens=tokens)]))
        assert float(found["harm"].sel(layer=2, expert=expert)[0]) == pytest.approx(other - loss(run), abs=SUM_F32)


def test_a_selective_knock_out_of_the_embedded_model(model) -> None:
    """As the model's own evaluation measures it: what sums can't do without, a capital hardly needs."""
    said = wb.where(role="assistant")
    problems = [draw_problem(Random(f"{cell}/0"), cell, "medium") for cell in ("addition, 3 digits", "capital")]
    found = wb.expert_importance(model, [one.ids for one in problems], "loss", layers=5, experts=13, tokens=said,
                                 completions=[one.turn.completion for one in problems])
    edits = [wb.silence_experts(layer=5, experts=13, tokens=said)]
    harm = completion_losses(model, problems, edits) - completion_losses(model, problems)
    np.testing.assert_allclose(found["harm"].values.ravel(), harm, atol=EMBEDDED_LOSS_F32)
    assert harm[0] > 0.3 and abs(harm[1]) < 0.05


def test_importance_stops_and_goes_on(tiny, monkeypatch) -> None:
    monkeypatch.setattr("gptoss_workbench.experiments.importance.TOKENS_PER_BATCH", 40)
    metric, asked = wb.logit_diff(7, 450), iter([False] * 4 + [True])  # two prompts, two batches
    whole = wb.expert_importance(tiny, [ONE, TWO], metric)
    part = wb.expert_importance(tiny, [ONE, TWO], metric, should_stop=lambda: next(asked))
    assert np.isnan(part["harm"]).any() and (part["harm"] > 0).any()
    left = []
    done = wb.expert_importance(tiny, [ONE, TWO], metric, resume=part, on_plan=left.append)
    np.testing.assert_allclose(done["harm"], whole["harm"], atol=SUM_F32)
    assert left[0].passes == int(np.isnan(part["harm"]).sum()) + 2 and not left[0].at_most
    with pytest.raises(ExperimentError, match="asked something else"):
        wb.expert_importance(tiny, [ONE, TWO], metric, "route_around", resume=part)


def test_the_same_run_differs_nowhere_and_an_edit_only_later(tiny, runs) -> None:
    same = wb.compare_runs(runs[0], tiny.run(ONE, capture=["router", "resid_post"]))
    assert (same["overlap"] == 1).all() and same.attrs["only_a"] == same.attrs["only_b"] == 0
    assert max(float(abs(same[name]).max()) for name in ("moved", "kl", "distance", "load_change")) < SUM_F32
    banned = int(runs[0].tensor("router.experts", 1)[4, 0])
    edited = tiny.run(ONE, capture=["router", "resid_post"], edits=[wb.ban_experts(layer=1, experts=banned, tokens=4)])
    found = wb.compare_runs(runs[0], edited)
    assert (found["overlap"].sel(layer=0) == 1).all() and (found["overlap"].sel(layer=1).drop_sel(token=4) == 1).all()
    assert float(found["overlap"].sel(layer=1, token=4)) == 0.75
    want = np.zeros(8)
    for run, sign in ((runs[0], -0.5), (edited, 0.5)):
        slots = zip(run.tensor("router.experts", 1)[4].tolist(), run.tensor("router.weights", 1)[4], strict=True)
        for expert, weight in slots:
            want[expert] += sign * float(weight)
    assert float(found["moved"].sel(layer=1, token=4)) == pytest.approx(abs(want).sum(), abs=SUM_F32)
    p, q = (run.logits[4].log_softmax(-1) for run in (runs[0], edited))
    assert float(found["kl"][4]) == pytest.approx(float((p.exp() * (p - q)).sum()), abs=SUM_F32)
    assert (found["kl"][:4] < SUM_F32).all() and float(found["distance"].sel(layer=1, token=4)) > 0.01


def test_chats_of_two_efforts_face_each_other_by_their_spans(model) -> None:
    low, high = (model.run(wb.chat("What is 27 + 58?", effort=effort), capture="router") for effort in ("low", "high"))
    found = wb.compare_runs(low, high)
    differs = [(a, b) for a, b in zip(found["text"].values, found["text_b"].values, strict=True) if a != b]
    assert differs == [(" low", " high")] and found.attrs["only_a"] == found.attrs["only_b"] == 0
    longer = model.run(wb.chat("What is 27 + 58 now?", effort="low"), capture="router")
    found = wb.compare_runs(low, longer)
    assert found.attrs["only_a"] == 0 and found.attrs["only_b"] == 1
    assert found["text"].values.tolist() == found["text_b"].values.tolist()
    before = found["token_b"] <= list(longer.tokens).index("58")
    assert (found["overlap"].where(before, drop=True) == 1).all()


def test_replayed_routes_leave_no_difference_in_routes(tiny, runs) -> None:
    """Other words, the routes of the first run: the same experts everywhere, with weights of their own."""
    other = [*ONE[:2], 301, *ONE[3:]]
    free = tiny.run(other, capture=["router", "resid_post"])
    bound = tiny.run(other, capture=["router", "resid_post"], edits=[wb.replay_routes(runs[0])])
    assert (wb.compare_runs(runs[0], free)["overlap"] < 1).any()
    found = wb.compare_runs(runs[0], bound)
    assert (found["overlap"] == 1).all() and float(found["moved"].max()) > 0


def test_mistakes(tiny, model, runs) -> None:
    bare = tiny.run(ONE)
    for wrong in (lambda: wb.routing_stats(bare), lambda: wb.expert_coactivation(bare),
                  lambda: wb.compare_runs(runs[0], bare), lambda: wb.expert_profile(tiny, [bare], "text")):
        with pytest.raises(SiteError, match="router"):
            wrong()
    for wrong, words in (
        (lambda: wb.routing_stats([]), "no run"), (lambda: wb.routing_stats([1]), "no run"),
        (lambda: wb.expert_profile(tiny, runs, "task"), "told apart"),
        (lambda: wb.expert_profile(tiny, runs, "task", labels=["x"]), "one for each run"),
        (lambda: wb.expert_profile(tiny, runs, "task", labels=["x", "x"]), "only one kind"),
        (lambda: wb.expert_profile(tiny, runs, "effort"), "states no effort"),
        (lambda: wb.expert_importance(tiny, [ONE], "loss"), "can't be measured"),
        (lambda: wb.expert_importance(tiny, [ONE], wb.logit_diff(1, 2), "ablate"), "no such way"),
        (lambda: wb.expert_importance(tiny, [ONE], wb.logit_diff(1, 2), labels=[]), "labels= needs"),
        (lambda: wb.compare_runs(runs[0], model.run([5, 6], capture="router")), "two models"),
    ):
        with pytest.raises(ExperimentError, match=words) as caught:
            wrong()
        assert str(caught.value).count("\n") < 6
