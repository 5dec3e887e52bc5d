"""Attribution against second sources: finite differences, a linear map walked forwards, sums that must come out."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import gptoss_workbench as wb
from gptoss_kernels.mxfp4 import dequantize
from gptoss_workbench.errors import ExperimentError, SiteError
from gptoss_workbench.experiments import attributing
from gptoss_workbench.experiments.agreement import ranking, spearman
from gptoss_workbench.experiments.uncertainty import student_interval, t_quantile
from gptoss_workbench.model.model import Model
from gptoss_workbench.model.transformer import Transformer
from tests.factories import tiny_model, write_hf
from tests.tolerances import COMPLETENESS, FINITE_DIFFERENCE, GRADIENT_F32, SITE_F32, SUM_F32

CLEAN = [5, 17, 300, 8, 90, 91, 12, 3, 44, 210]
CORRUPT = [5, 17, 301, 8, 90, 77, 12, 3, 44, 210]
METRIC = wb.logit_diff(7, 450)
NO_CHECK: dict[str, Any] = {"metric": METRIC, "top": 0, "others": 0}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    return wb.load(write_hf(tmp_path_factory.mktemp("tiny"), tiny_model(seed=21)), dtype="float32")


@pytest.fixture(scope="module")
def near(tiny):
    """The same model, whose tokens 300 and 91 are all but 301 and 77: so near that no choice of experts differs."""
    embed, draw = tiny.weights.embed.clone(), torch.Generator().manual_seed(1)
    for one, other in ((300, 301), (91, 77)):
        embed[one] = embed[other] + 0.003 * torch.randn(embed.shape[1], generator=draw)
    return Model(tiny.config, replace(tiny.weights, embed=embed), name="near", folder=tiny._folder)


def value(run) -> float:
    return float(run.logits[-1, 7] - run.logits[-1, 450])


def off(got, want) -> float:
    """Relative L2."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


# gradient times difference --------------------------------------------------------------------------------------


@pytest.mark.parametrize("site, by", [("embed", None), ("resid_pre", None), ("attn.q", None), ("attn.z", None),
                                      ("attn.scores", None), ("router.weights", None), ("expert.act", None),
                                      ("mlp.out", "expert")])
def test_the_gradient_is_exact_in_the_limit_of_small_differences(near, site, by) -> None:
    """The whole call against exact patching of every place, where clean and corrupt all but agree."""
    routes = [near.run(ids, capture="router").tensor("router.experts") for ids in (CLEAN, CORRUPT)]
    assert torch.equal(*routes)
    found = wb.attribution(near, CLEAN, CORRUPT, metric=METRIC, site=site, by=by, top=60, others=0)
    places = wb.checked(found)
    assert places["top"].all() and len(places["place"]) > (0 if site == "embed" else 20)
    assert off(places["estimate"], places["exact"]) < 2 * FINITE_DIFFERENCE
    assert found.attrs["sign_agreement"] > 0.8 and found.attrs["complete"]


def test_a_frozen_router_leaves_out_what_goes_through_it(near) -> None:
    live, frozen = (wb.attribution(near, CLEAN, CORRUPT, router=router, **NO_CHECK)["estimate"]
                    for router in ("live", "frozen"))
    assert off(frozen, live) > 5 * FINITE_DIFFERENCE
    clean, corrupt = (near.run(ids, capture=["resid_pre", "router"]) for ids in (CLEAN, CORRUPT))
    step = (clean.tensor("resid_pre", 0)[2] - corrupt.tensor("resid_pre", 0)[2])[None]
    held = [wb.replay_routes(corrupt), wb.patch("router.weights", corrupt)]
    for estimate, edits in ((live, []), (frozen, held)):
        ends = [value(near.run(CORRUPT, edits=[*edits, wb.add("resid_pre", size * step, layer=0, tokens=2)]))
                for size in (-3.0, 3.0)]
        assert (ends[1] - ends[0]) / 6 == pytest.approx(float(estimate.sel(layer=0, token=2)), rel=FINITE_DIFFERENCE)
    last = [wb.attribution(near, CLEAN, CORRUPT, site="mlp.out", layers=3, router=router, **NO_CHECK)["estimate"].values
            for router in ("live", "frozen")]
    np.testing.assert_array_equal(*last)  # nothing is routed after it


def test_estimates_by_hand(tiny) -> None:
    clean, corrupt = (tiny.run(ids, capture=["attn.z", "expert.out"]) for ids in (CLEAN, CORRUPT))
    for site in ("attn.z", "expert.out"):
        found = wb.attribution(tiny, CLEAN, CORRUPT, site=site, **NO_CHECK)
        slope = wb.gradients(tiny, CORRUPT, METRIC, site).tensor(site)
        change = clean.tensor(site) - corrupt.tensor(site)
        np.testing.assert_allclose(found["estimate"], (slope * change).sum(-1), atol=SUM_F32)
        np.testing.assert_allclose(found["difference"], change.norm(dim=-1), rtol=1e-5, atol=SUM_F32)
    assert found["estimate"].dims == ("layer", "token", "slot")


def test_experts_sum_to_their_layer(tiny) -> None:
    """What the experts add is mlp.out without remainder, so their attributions sum to its own."""
    for method in ("gradient", "relp"):
        of = [wb.attribution(tiny, CLEAN, CORRUPT, site="mlp.out", by=by, method=method, **NO_CHECK)["estimate"]
              for by in ("expert", None)]
        assert of[0].dims == ("layer", "token", "expert")
        assert off(of[0].sum("expert"), of[1]) < GRADIENT_F32


# the exact check ------------------------------------------------------------------------------------------------


def test_the_check_is_exact_patching(tiny) -> None:
    found = wb.attribution(tiny, CLEAN, CORRUPT, metric=METRIC, top=20, others=10)
    want = wb.patching(tiny, CLEAN, CORRUPT, metric=METRIC, normalize=False) - found["corrupt"]
    seen = np.isfinite(found["exact"].values)
    assert seen.sum() == 2 + 3 * 8, "two embeddings differ, and all from the first of them on in later layers"
    np.testing.assert_allclose(found["exact"].values[seen], want.values[seen], atol=SITE_F32)
    assert abs(want.values[~seen]).max() < SITE_F32
    places = wb.checked(found)
    assert (np.diff(abs(places["estimate"])) <= 0).all() and places["top"].sum() == 20
    top = places.isel(place=slice(20))
    ranks = [np.argsort(np.argsort(top[name])) for name in ("estimate", "exact")]
    by_hand = np.corrcoef(ranks[0], ranks[1])[0, 1]
    assert found.attrs["rank_correlation"] == pytest.approx(by_hand)
    assert found.attrs["sign_agreement"] == pytest.approx(float((np.sign(top.estimate) == np.sign(top.exact)).mean()))
    assert found.attrs["largest_other"] == pytest.approx(float(abs(places["exact"][20:]).max()))
    assert found["clean"] == pytest.approx(value(tiny.run(CLEAN)), abs=SUM_F32)


def test_the_check_of_one_head_slot_expert_and_entry(tiny) -> None:
    sites = ["attn.z", "attn.v", "expert.out", "mlp.out", "router", "attn.pattern", "router.logits"]
    clean, corrupt = (tiny.run(ids, capture=sites) for ids in (CLEAN, CORRUPT))
    base = value(corrupt)

    def edit(site: str, place, change):
        def put(x):
            x = x.clone()
            change(x)
            return x
        return value(tiny.run(CORRUPT, edits=[wb.apply(site, put, layer=int(place.layer))])) - base

    for site, dim in (("attn.z", "head"), ("attn.v", "kv_head"), ("expert.out", "slot"), ("router.logits", "expert")):
        place = wb.checked(wb.attribution(tiny, CLEAN, CORRUPT, metric=METRIC, site=site, top=1, others=0))
        place, at = place.isel(place=0), (int(place["token"][0]), int(place[dim][0]))
        want = edit(site, place, lambda x: x.__setitem__(at, clean.tensor(site, int(place.layer))[at]))  # noqa: B023
        assert float(place["exact"]) == pytest.approx(want, abs=SITE_F32), site

    place = wb.checked(wb.attribution(tiny, CLEAN, CORRUPT, metric=METRIC, site="mlp.out", by="expert", top=1,
                                      others=0)).isel(place=0)
    token, layer, change = int(place.token), int(place.layer), torch.zeros(64)
    for run, sign in ((clean, 1), (corrupt, -1)):
        for slot in range(4):
            if run.tensor("router.experts", layer)[token, slot] == int(place.expert):
                change += sign * run.tensor("router.weights", layer)[token, slot] * \
                    run.tensor("expert.out", layer)[token, slot]
    assert float(place["exact"]) == pytest.approx(edit("mlp.out", place, lambda x: x[token].add_(change)), abs=SITE_F32)

    found = wb.attribution(tiny, CLEAN, CORRUPT, metric=METRIC, site="attn.pattern", top=1, others=0)
    assert found["estimate"].dims == ("layer", "head", "query", "key") and found["key"].values[-1] == "sink"
    place = wb.checked(found).isel(place=0)
    at = int(place["head"]), int(place["query"]), int(place["key"])  # apply sees (query, head, key)
    want = edit("attn.pattern", place, lambda x: x.__setitem__(
        (at[1], at[0], at[2]), clean.tensor("attn.pattern", int(place.layer))[at]))
    assert float(place["exact"]) == pytest.approx(want, abs=SITE_F32)


# integrated gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site, by", [("resid_pre", None), ("attn.z", None), ("mlp.out", "expert"), ("embed", None),
                                      ("attn.scores", None)])
def test_integrated_gradients_are_complete(tiny, site, by) -> None:
    """The estimates of a layer sum to what the whole layer does, with the router held."""
    found = wb.attribution(tiny, CLEAN, CORRUPT, site=site, by=by, method="integrated", router="frozen", steps=48,
                           **NO_CHECK)
    whole = found["estimate"].sum([dim for dim in found["estimate"].dims if dim != "layer"])
    parts = abs(found["estimate"]).sum([dim for dim in found["estimate"].dims if dim != "layer"])
    assert (abs(whole.values - found["total"].values) < COMPLETENESS * parts.values).all()
    if site == "resid_pre":
        clean, corrupt = tiny.run(CLEAN, capture=site), tiny.run(CORRUPT, capture="router")
        held = [wb.replay_routes(corrupt), wb.patch("router.weights", corrupt), wb.patch(site, clean, layer=2)]
        assert found["total"][2] == pytest.approx(value(tiny.run(CORRUPT, edits=held)) - value(corrupt), abs=SITE_F32)
        first = wb.attribution(tiny, CLEAN, CORRUPT, site=site, router="frozen", **NO_CHECK)["estimate"].sum("token")
        assert (abs(first - found["total"]) > 5 * COMPLETENESS * parts).all(), "a single slope must not be enough"


def test_integrated_gradients_with_a_live_router_are_complete_where_no_choice_jumps(near) -> None:
    found = wb.attribution(near, CLEAN, CORRUPT, method="integrated", steps=4, **NO_CHECK)
    assert off(found["estimate"].sum("token"), found["total"]) < FINITE_DIFFERENCE
    want = found["clean"] - found["corrupt"]
    assert found["total"].values == pytest.approx(np.full(4, want), abs=SITE_F32), "all of a layer is the clean prompt"


# RelP -----------------------------------------------------------------------------------------------------------


def walked(model, run, layer: int, delta: np.ndarray) -> float:
    """A change of resid_pre walked forwards to the metric in float64, by RelP's rules written out: every norm, pattern,
    activation and routing weight is the run's own constant. The opposite direction of the backward pass."""
    config = model.config

    def get(site, number):
        return run.tensor(site, number).double().numpy()

    def normed(site, number, scale, change):
        x = get(site, number)
        return change * scale.double().numpy() / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps)

    groups = config.num_attention_heads // config.num_key_value_heads
    for number in range(layer, config.num_hidden_layers):
        w = model.weights.layers[number]
        v = normed("resid_pre", number, w.attn_norm, delta) @ w.v_weight.double().numpy().T
        v = v.reshape(len(delta), config.num_key_value_heads, -1).repeat(groups, axis=1)
        z = np.einsum("hqk,khd->qhd", get("attn.pattern", number)[..., :-1], v)
        delta = delta + z.reshape(len(delta), -1) @ w.o_weight.double().numpy().T
        x = normed("resid_mid", number, w.mlp_norm, delta)
        gate, up = get("expert.gate", number), get("expert.up", number)
        gate_up, down = (dequantize(matrix, torch.float32).double().numpy() for matrix in (w.gate_up, w.down))
        chosen, weights = run.tensor("router.experts", number).numpy(), get("router.weights", number)
        limit = config.swiglu_limit
        cut_gate, cut_up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        share = 1 / (1 + np.exp(-config.swiglu_alpha * cut_gate))
        moved = np.zeros_like(delta)
        for token in range(len(delta)):
            for slot, expert in enumerate(chosen[token]):
                both = gate_up[expert] @ x[token]
                change = share[token, slot] * 0.5 * (
                    both[::2] * (gate[token, slot] <= limit) * (cut_up[token, slot] + 1)
                    + cut_gate[token, slot] * both[1::2] * (abs(up[token, slot]) <= limit))
                moved[token] += weights[token, slot] * (down[expert] @ change)
        delta = delta + moved
    last = config.num_hidden_layers - 1
    out = normed("resid_post", last, model.weights.final_norm, delta)[-1]
    return float(out @ (model.weights.unembed[7] - model.weights.unembed[450]).double().numpy())


@pytest.mark.parametrize("limit", [7.0, 0.5])
def test_relp_is_its_rules_walked_the_other_way(tmp_path, limit) -> None:
    model = wb.load(write_hf(tmp_path / "hf", tiny_model(seed=3, swiglu_limit=limit)), dtype="float32")
    sites = ["resid", "attn.pattern", "expert.gate", "expert.up", "router"]
    clean, corrupt = (model.run(ids, capture=sites) for ids in (CLEAN, CORRUPT))
    found = wb.attribution(model, CLEAN, CORRUPT, method="relp", router="frozen", **NO_CHECK)
    want = np.zeros((4, 10))
    for layer in range(4):
        change = (clean.tensor("resid_pre", layer) - corrupt.tensor("resid_pre", layer)).double().numpy()
        for token in range(2, 10):
            want[layer, token] = walked(model, corrupt, layer, change * (np.arange(10) == token)[:, None])
    assert off(found["estimate"], want) < GRADIENT_F32
    plain = wb.attribution(model, CLEAN, CORRUPT, router="frozen", **NO_CHECK)
    assert off(plain["estimate"], want) > 0.1, "the rules must matter"
    if limit < 1:
        assert float((corrupt.tensor("expert.up").abs() > limit).float().mean()) > 0.1


def test_relp_computes_the_models_own_values(tiny) -> None:
    sites = [site for site in wb.SITES if site not in ("router.experts", "attn.q", "attn.k", "attn.scores")]
    found = wb.gradients(tiny, CLEAN, METRIC, sites, rules="relp")
    for some in (sites, ["resid_post"]):  # with the parts in view, and with them computed in one go
        plain, seen = tiny.run(CLEAN, capture=some), wb.gradients(tiny, CLEAN, METRIC, some, rules="relp")
        assert torch.equal(seen.run.logits, plain.logits)
        for site in some:
            assert torch.equal(seen.run.tensor(site), plain.tensor(site)), site
        torch.testing.assert_close(seen.tensor("resid_post"), found.tensor("resid_post"))
    conserved = (found.tensor("final_norm")[-1] * found.run.tensor("final_norm")[-1]).sum()
    through = (found.tensor("resid_post", 3)[-1] * found.run.tensor("resid_post", 3)[-1]).sum()
    assert float(conserved) == pytest.approx(found.value, abs=SITE_F32)  # the norm passes relevance on whole
    assert float(through) == pytest.approx(found.value, abs=SITE_F32)
    assert json.loads(found.data.attrs["provenance"])["method"]["arguments"]["rules"] == "relp"


# cost, progress, stop, resume -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [{}, {"method": "relp", "site": "attn.z"},
                                   {"method": "integrated", "router": "frozen", "steps": 3, "layers": [0, 2]}], ids=str)
@pytest.mark.parametrize("pairs", [1, 2])
def test_the_cost_is_said_before_and_is_what_is_spent(tiny, kinds, pairs, monkeypatch) -> None:
    spent, plans, seen, call = [0], [], [], Transformer.__call__

    def counted(self, ids, *arguments):
        spent[0] += len(ids)
        return call(self, ids, *arguments)

    monkeypatch.setattr(Transformer, "__call__", counted)
    clean, corrupt = ([CLEAN] * 2, [CORRUPT] * 2) if pairs == 2 else (CLEAN, CORRUPT)
    wb.attribution(tiny, clean, corrupt, metric=METRIC, top=3, others=2, **kinds, on_plan=plans.append,
                   on_progress=lambda done, total: seen.append((done, total)))
    (plan,) = plans
    assert spent == [plan.passes] and seen[-1] == (plan.passes, plan.passes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert f"{plan.backward} forward and backward passes" in str(plan) and plan.pairs == pairs


@pytest.mark.parametrize("after", [0, 1, 3, 5, 8])
def test_stopped_and_resumed_is_as_if_never_stopped(tiny, after, monkeypatch) -> None:
    monkeypatch.setattr(attributing, "TOKENS_BACKWARD", 20)
    monkeypatch.setattr(attributing, "TOKENS_FORWARD", 20)
    arguments: dict[str, Any] = dict(metric=METRIC, method="integrated", steps=3, layers=[1, 3], top=3, others=2)
    whole = wb.attribution(tiny, CLEAN, CORRUPT, **arguments)
    asked = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > after

    part = wb.attribution(tiny, CLEAN, CORRUPT, **arguments, should_stop=stop)
    assert not part.attrs["complete"] and "rank_correlation" not in part.attrs
    known = np.isfinite(part["estimate"].values)
    np.testing.assert_array_equal(part["estimate"].values[known], whole["estimate"].values[known])
    if after < 8:
        with pytest.raises(ExperimentError, match="checked"):
            wb.checked(part)
    plans = []
    again = wb.attribution(tiny, CLEAN, CORRUPT, **arguments, resume=part, on_plan=plans.append)
    for name in whole.data_vars:
        np.testing.assert_allclose(again[name], whole[name], atol=SITE_F32, err_msg=name)
    assert again.attrs["complete"] and again.attrs["question"] == whole.attrs["question"]
    assert plans[0].backward == 6 - 3 * int(known.all(1).sum())
    more = wb.attribution(tiny, CLEAN, CORRUPT, **{**arguments, "top": 6, "others": 0}, resume=again,
                          on_plan=plans.append)
    assert plans[-1].backward == 0 and plans[-1].forward <= 5, "both prompts and what was not checked yet"
    assert int(wb.checked(more)["top"].sum()) == 6


def test_a_result_of_another_question_is_not_resumed(tiny) -> None:
    first = wb.attribution(tiny, CLEAN, CORRUPT, **NO_CHECK)
    for other in ({"router": "frozen"}, {"site": "resid_mid"}, {"layers": 1}, {"method": "relp"}):
        with pytest.raises(ExperimentError, match="asked something else"):
            wb.attribution(tiny, CLEAN, CORRUPT, **NO_CHECK, **other, resume=first)


# several pairs --------------------------------------------------------------------------------------------------


def test_several_pairs_with_mean_and_interval(tiny) -> None:
    cleans = [CLEAN, [9, *CLEAN[1:]], [9, 9, *CLEAN[2:]]]
    corrupts = [CORRUPT, [9, *CORRUPT[1:]], [9, 9, *CORRUPT[2:]]]
    metrics = [METRIC, wb.logit_diff(7, 450), wb.logit_diff(8, 451)]
    found = wb.attribution(tiny, cleans, corrupts, metric=metrics, top=4, others=3)
    assert found["estimate"].dims == ("pair", "layer", "token") and found["clean"].dims == ("pair",)
    alone = [wb.attribution(tiny, *pair, **{**NO_CHECK, "metric": metric})
             for *pair, metric in zip(cleans, corrupts, metrics, strict=True)]
    estimates = np.stack([one["estimate"].values for one in alone])
    np.testing.assert_allclose(found["estimate"], estimates, atol=SITE_F32)
    np.testing.assert_allclose(found["estimate_mean"], estimates.mean(0), atol=SITE_F32)
    half = 4.302653 * estimates.std(0, ddof=1) / 3**0.5  # Student's 0.975 quantile of two degrees, from a table
    np.testing.assert_allclose(found["estimate_high"] - found["estimate_mean"], half, rtol=1e-3, atol=SITE_F32)
    seen = np.isfinite(found["exact"].values)
    assert (seen.sum((1, 2)) == 7).all() and (seen == seen[0]).all()
    exact = found["exact"].values[:, seen[0]].mean(0)
    np.testing.assert_allclose(found["exact_mean"].values[seen[0]], exact, atol=SITE_F32)
    best = wb.checked(found).isel(place=0)
    want = wb.patching(tiny, cleans[2], corrupts[2], metric=metrics[2], normalize=False) - float(found["corrupt"][2])
    at = {"layer": int(best.layer), "token": int(best.token)}
    assert float(found["exact"].sel(pair=2, **at)) == pytest.approx(float(want.sel(at)), abs=SITE_F32)


def test_small_statistics_by_hand() -> None:
    assert [t_quantile(n) for n in (1, 4, 30)] == pytest.approx([12.7062, 2.7764, 2.0423], rel=1e-4)  # from a table
    mean, low, high = student_interval(np.array([[1.0], [3.0]]))
    assert (mean[0], low[0], high[0]) == pytest.approx((2, 2 - 12.7062, 2 + 12.7062), rel=1e-4)
    assert spearman(np.array([1.0, 2.0, 3.0, 9.0]), np.array([1.0, 4.0, 9.0, 10.0])) == pytest.approx(1)
    assert spearman(np.array([1.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0])) == pytest.approx(3**0.5 / 2)
    assert np.isnan(spearman(np.array([1.0, 2.0]), np.array([1.0, 2.0])))
    top, others = ranking(np.array([[0.0, -5.0], [3.0, 4.0]]), 2, 9, np.array([[True, True], [True, False]]))
    assert (top.tolist(), others.tolist()) == ([1, 2], [0])


# mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, error, words", [
    ({"corrupt": CORRUPT[:-1]}, ExperimentError, "different lengths"),
    ({"corrupt": [CORRUPT, CORRUPT]}, ExperimentError, "come in pairs"),
    ({"metric": [METRIC, METRIC]}, ExperimentError, "fit the pairs"),
    ({"metric": "m"}, ExperimentError, "one metric"),
    ({"metric": wb.Metric("m", lambda model, logits: logits[:, 0].detach())}, ExperimentError, "differentiated"),
    ({"method": "atp"}, ExperimentError, "gradient, relp, integrated"),
    ({"router": "fixed"}, ExperimentError, "live"),
    ({"steps": 0}, ExperimentError, "steps from 1"),
    ({"by": "expert"}, ExperimentError, "mlp.out"),
    ({"by": "head", "site": "attn.out"}, ExperimentError, "attn.z"),
    ({"site": "embed", "layers": 1}, ExperimentError, "no layers"),
    ({"layers": 4}, SiteError, "layer 0 to 3"),
    ({"site": "resid_pst"}, SiteError, "resid_post"),
    ({"site": "router.experts"}, ExperimentError, "choices"),
    ({"site": "router.logits", "router": "frozen"}, SiteError, "frozen"),
    ({"site": "attn.q", "method": "relp"}, SiteError, "RelP"),
    ({"site": "attn.scores", "method": "relp"}, SiteError, "attn.pattern"),
])
def test_mistakes(tiny, arguments, error, words) -> None:
    arguments = {"clean": CLEAN, "corrupt": CORRUPT, "metric": METRIC, **arguments}
    with pytest.raises(error, match=words) as caught:
        wb.attribution(tiny, **arguments)
    assert str(caught.value).count("\n") < 6


# the embedded model ---------------------------------------------------------------------------------------------

COUNTRIES = [("France", "Paris", "Italy", "Rome"), ("Peru", "Lima", "Japan", "Tokyo")]


def capitals() -> dict[str, Any]:
    return {"clean": [f"The capital of {country} is" for country, *_ in COUNTRIES],
            "corrupt": [f"The capital of {other} is" for _, _, other, _ in COUNTRIES],
            "metric": [wb.logit_diff(f" {answer}", f" {wrong}") for _, answer, _, wrong in COUNTRIES]}


def test_the_capital_is_looked_up_at_the_country_and_moved_by_one_head(model) -> None:
    """The known mechanism, in one call a question: the answer sits on the country and is moved to the end late."""
    resid = wb.checked(wb.attribution(model, **capitals(), method="relp")).isel(place=0)
    assert (int(resid.token), resid.top.item()) == (3, True) and resid.exact > 20
    heads = wb.checked(wb.attribution(model, **capitals(), method="relp", site="attn.z"))
    mover = heads.isel(place=int(np.abs(heads["exact"].values).argmax()))
    assert (int(mover.layer), int(mover.token)) == (5, 4) and mover.top and mover.exact > 4
    assert bool(heads["top"].values[:5].all())


def test_relp_is_nearer_to_exact_patching_than_the_gradient(model) -> None:
    for number in range(len(COUNTRIES)):
        pair = {name: values[number] for name, values in capitals().items()}
        exact = wb.patching(model, **pair, normalize=False)
        effect = (exact - exact.attrs["corrupt"]).values.ravel()
        near = {}
        for method in ("gradient", "relp", "integrated"):
            found = wb.attribution(model, **pair, method=method, top=0, others=0)
            near[method] = np.corrcoef(found["estimate"].values.ravel(), effect)[0, 1]
        assert near["integrated"] > near["relp"] > near["gradient"] + 0.05, near
