"""The public calls that are scored, against taps and arithmetic of the tests' own."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import gptoss_workbench as wb
from gptoss_workbench.model.transformer import Transformer
from gptoss_workbench.planted import Place
from tests.tolerances import SITE_F32
from tests.truth import calls, methods, score
from tests.truth.base import both, metric_of, whole_effect

NAMED = {method.name: method for method in methods.METHODS}


@pytest.fixture(scope="module")
def route():
    return wb.planted.route(11, pairs=2)


@pytest.fixture(scope="module")
def induction():
    return wb.planted.induction(4, pairs=2)


@torch.no_grad()
def metric_with(model: Any, ids: Any, pair: Any, change: Any) -> float:
    """The metric of one prompt run through a bare transformer with ``change(site, layer, x)`` as its only tap."""
    batch, positions = model.pad_left([list(ids)])
    plain = Transformer(model.config, model.weights, model.transformer.kernels, scores_at_once=None)
    hidden = plain(batch, positions, model.new_cache(1), lambda site, layer, x, start=0: change(site, layer, x))[:, -1]
    return float(pair.metric.of(model, plain.unembed(hidden))[0])


@pytest.mark.parametrize("circuit", ["route", "induction"])
def test_fast_patching_equals_the_exact_rows(circuit: str, request: pytest.FixtureRequest) -> None:
    """So the rows of exact patching are those of ``wb.patching``."""
    planted = request.getfixturevalue(circuit)
    model = planted.model
    for pair in planted.pairs:
        ends = [metric_of(run, pair) for run in both(model, pair)]
        for own, site, dims, direction in (
            (methods.patch_residual, "resid_pre", ("layer", "token"), "denoise"),
            (methods.patch_router, "router.logits", ("layer", "token"), "denoise"),
            (methods.patch_heads, "attn.z", ("layer", "head", "token"), "denoise"),
            (methods.patch_experts, "expert.out", ("layer", "expert", "token"), "denoise"),
            (partial(methods.patch_heads, noising=True), "attn.z", ("layer", "head", "token"), "noise"),
            (partial(methods.patch_experts, noising=True), "expert.out", ("layer", "expert", "token"), "noise"),
        ):
            found = wb.patching(model, list(pair.clean), list(pair.corrupt), site, metric=pair.metric, normalize=False,
                                by=dims, direction=direction).values  # type: ignore[arg-type]
            gain = found - ends[1] if direction == "denoise" else ends[0] - found
            want = own(model, pair)
            np.testing.assert_allclose(gain.reshape(want.shape), want, atol=SITE_F32, err_msg=f"{site} {direction}")
            assert np.abs(want).max() > 1 or (circuit == "induction" and site in ("router.logits", "expert.out"))


def test_attribution_equals_slope_times_difference(route, induction) -> None:
    """The public call against the rows of own arithmetic, and RelP against its slopes from ``wb.gradients``."""
    for planted in (route, induction):
        model, pair = planted.model, planted.pairs[0]
        for kind, own in (("residual", methods.attribute_residual), ("head", methods.attribute_heads),
                          ("expert", methods.attribute_experts)):
            want = own(model, pair, router="live")
            np.testing.assert_allclose(calls.estimated(model, pair, kind, "gradient"), want, atol=SITE_F32)
            found = calls.attributed(model, pair, kind, method="gradient", router="frozen", top=0, others=0)["estimate"]
            np.testing.assert_allclose(calls.laid_out(found, kind), own(model, pair), atol=SITE_F32)
        np.testing.assert_allclose(calls.estimated(model, pair, "router", "gradient"),
                                   methods.attribute_router(model, pair), atol=SITE_F32)
        slope = wb.gradients(model, list(pair.corrupt), pair.metric, ["resid_pre", "attn.z", "mlp.out"], rules="relp")
        for kind, site in (("residual", "resid_pre"), ("head", "attn.z"), ("expert", "mlp.out")):
            if kind == "expert":
                want = (slope.tensor(site).numpy()[:, None] * methods.expert_change(model, pair)).sum(-1)
            else:
                want = (slope.tensor(site) * methods.change(model, pair, site)).sum(-1).numpy()
                want = want[:, None] if kind == "residual" else want.swapaxes(1, 2)
            np.testing.assert_allclose(calls.estimated(model, pair, kind, "relp"), want, atol=SITE_F32)


def test_what_was_checked_is_exact_and_the_rest_is_nothing(route) -> None:
    model, pair = route.model, route.pairs[0]
    for kind, own in (("residual", methods.patch_residual), ("head", methods.patch_heads),
                      ("expert", methods.patch_experts)):
        found, want = calls.patched_top(model, pair, kind), own(model, pair)
        asked = found != 0
        assert 1 <= asked.sum() <= 10
        np.testing.assert_allclose(found[asked], want[asked], atol=SITE_F32)


@pytest.mark.parametrize("site", ["resid_pre", "attn.out", "mlp.out"])
def test_tracing_equals_a_blurred_run_by_hand(route, site: str) -> None:
    """Blurred embeddings and restored values set by a tap, for every place of one draw."""
    model, pair = route.model, route.pairs[1]
    at = pair.roles["subject"]
    found = calls.traced(model, pair, site)
    clean = model.run(list(pair.clean), capture=["embed", site])
    strength = 3 * float(clean.tensor("embed", None).std())
    noisy = model.run(list(pair.clean), edits=wb.noise("embed", strength, seed=1, tokens=[at]), capture="embed")
    blurred = noisy.tensor("embed", None)
    assert (blurred != clean.tensor("embed", None)).any(-1).nonzero().flatten().tolist() == [at]

    def restoring(place: tuple[int, int] | None) -> float:
        def change(name: str, layer: int | None, x: torch.Tensor) -> torch.Tensor:
            if name == "embed":
                return blurred[None]
            if place is not None and name == site and layer == place[0]:
                x = x.clone()
                x[0, place[1]] = clean.tensor(site)[place]
            return x

        return metric_with(model, pair.clean, pair, change)

    assert float(found["blurred"][1]) == pytest.approx(restoring(None), abs=SITE_F32)
    for layer in range(4):
        for token in (at - 1, at, len(pair.clean) - 1):
            assert float(found[1, layer, token]) == pytest.approx(restoring((layer, token)), abs=SITE_F32)
    whole = calls.lost_to_noise(model, pair, site)
    assert whole == pytest.approx(metric_of(both(model, pair)[0], pair) - float(found["blurred"].mean()), abs=SITE_F32)


@pytest.mark.parametrize("mode", ["silence", "route_around"])
def test_importance_equals_experts_taken_away_by_hand(route, mode: str) -> None:
    model, pair = route.model, route.pairs[0]
    chosen = both(model, pair)[0].tensor("router.experts")
    found = calls.importance(model, pair, mode)  # type: ignore[arg-type]
    assert found.shape == (4, 8, 1)

    def without(place: tuple[int, int]) -> float:
        def change(name: str, layer: int | None, x: torch.Tensor) -> torch.Tensor:
            if layer == place[0] and mode == "silence" and name == "router.weights":
                return x * (chosen[layer] != place[1])
            if layer == place[0] and mode == "route_around" and name == "router.logits":
                return x.index_fill(-1, torch.tensor(place[1]), -torch.inf)
            return x

        return metric_with(model, pair.clean, pair, change)

    plain = metric_of(both(model, pair)[0], pair)
    for place in np.ndindex(4, 8):
        assert found[place][0] == pytest.approx(plain - without(place), abs=SITE_F32), place
    assert max(found[place.layer, place.index, 0] for place in route.truth if place.kind == "expert") > 1


def test_a_method_without_tokens_and_a_sublayer_have_truths_of_their_own(route) -> None:
    experts = {place for place in route.truth if place.kind == "expert"}
    assert len(experts) == 2
    found = score.effects(NAMED["expert importance, silenced"], route)
    assert found.roles == (score.ANYWHERE,) and found.values.shape == (2, 4, 8, 1)
    assert score.true_places("expert", route, found.roles) == \
        {Place("expert", place.layer, place.index, score.ANYWHERE) for place in experts}
    assert score.hits(NAMED["expert importance, silenced"], route, found) == {"layer": 1.0, "expert": 1.0}
    (layer,) = {place.layer for place in experts}
    assert score.true_places("mlp", route) == {Place("mlp", layer, -1, "subject")}
    assert {place.role for place in score.true_places("attention", route)} == {"last"}


def test_relp_misses_what_acts_through_keys(induction) -> None:
    """The first head of induction speaks to keys, which RelP holds constant; the plain gradient sees it."""
    first = min(place for place in induction.truth)
    by_name = {name: score.effects(NAMED[name], induction).mean[first.layer, first.index, 1]
               for name in ("RelP, heads", "gradient x difference, heads", "exact patching, heads")}
    assert by_name["exact patching, heads"] > 5
    assert abs(by_name["RelP, heads"]) < 0.1 * by_name["gradient x difference, heads"]


def test_noise_leaves_a_gate_open() -> None:
    """Why causal tracing finds nothing in the sink gate: the usual noise takes next to nothing away, more does."""
    planted = wb.planted.sink_gate(0, pairs=2)
    for pair in planted.pairs:
        whole = whole_effect(planted.model, pair)
        assert abs(calls.lost_to_noise(planted.model, pair, "resid_pre")) < 0.1 * whole
        found = wb.causal_tracing(planted.model, list(pair.clean), [pair.roles["switch"]], metric=pair.metric,
                                  scale=10)
        assert found.attrs["clean"] - float(found["blurred"].mean()) > 0.25 * whole
