"""Directions and doses against hand-made means, a planted axis, plain loops; and what they do to the embedded model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import xarray as xr

import gptoss_workbench as wb
from gptoss_workbench.errors import EditNeverFired, ExperimentError
from gptoss_workbench.experiments.directions import auc_of, direction_of
from gptoss_workbench.experiments.uncertainty import mean_interval
from gptoss_workbench.nano import facts
from tests.factories import tiny_model, write_hf
from tests.tolerances import PARTS_F32, SITE_F32

POSITIVE = [[5, 17, 300, 8], [9, 90, 91], [44, 7, 210, 3, 6], [100, 101]]
NEGATIVE = [[6, 18, 301, 9], [10, 91, 92], [45, 8, 211, 4, 7], [102, 103]]
METRIC = wb.logit_diff(7, 300)
CHANNEL, ANSWER = "<|channel|>", "<|channel|>final<|message|>"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    return wb.load(write_hf(tmp_path_factory.mktemp("tiny") / "full", tiny_model(seed=31)), dtype="float32")


def alone(model, rows, site, tokens):
    """(prompt, layer, d_model): each prompt in a run of its own."""
    return np.stack([model.run(row, capture=site).tensor(site)[:, tokens].mean(1).numpy() for row in rows])


@pytest.mark.parametrize(("site", "tokens"), [("resid_post", [-1]), ("attn.out", [0, -1])])
def test_difference_of_means_is_the_hand_made_one(tiny, site, tokens):
    found = wb.contrast(tiny, POSITIVE, NEGATIVE, site, tokens=tokens)
    want = alone(tiny, POSITIVE, site, tokens).mean(0) - alone(tiny, NEGATIVE, site, tokens).mean(0)
    assert found.dims == ("layer", "d_model")
    np.testing.assert_allclose(found.values, want, atol=SITE_F32)
    np.testing.assert_allclose(found["norm"].values, np.linalg.norm(want, axis=1), rtol=1e-4)
    assert json.loads(found.attrs["provenance"])["method"]["name"] == "contrast"


@pytest.mark.parametrize("method", ["mean", "pca", "probe"])
def test_every_method_finds_a_planted_axis_with_its_length(method):
    if method == "probe":
        pytest.importorskip("sklearn")
    draw = np.random.default_rng(0)
    axis = draw.standard_normal(24)
    axis *= 6 / np.linalg.norm(axis)
    noise = draw.standard_normal((2, 60, 24)).astype(np.float32)
    plus, minus = noise[0] + axis.astype(np.float32), noise[1]
    found = direction_of(plus, minus, method)
    cosine = found @ axis / np.linalg.norm(found) / np.linalg.norm(axis)
    apart = plus.mean(0) - minus.mean(0)
    unit = found / np.linalg.norm(found)
    assert cosine > 0.9
    assert np.linalg.norm(found) == pytest.approx(abs(unit @ apart), rel=1e-4)
    assert found @ apart > 0  # the sign leads from minus to plus
    random = draw.standard_normal(24)
    assert abs(random @ axis) / np.linalg.norm(random) / np.linalg.norm(axis) < 0.6  # the control


def test_pca_is_the_largest_eigenvector_of_the_differences():
    draw = np.random.default_rng(3)
    plus, minus = draw.standard_normal((2, 9, 5))
    differences = plus - minus
    vector = np.linalg.eigh(differences.T @ differences)[1][:, -1]
    found = direction_of(plus, minus, "pca")
    assert abs(found @ vector) == pytest.approx(np.linalg.norm(found), rel=1e-5)


def test_auc_counts_pairs():
    assert auc_of(np.array([2.0, 3]), np.array([0.0, 1])) == 1
    assert auc_of(np.array([0.0, 1]), np.array([2.0, 3])) == 0
    assert auc_of(np.array([1.0, 3]), np.array([1.0, 2])) == pytest.approx(0.625)  # by hand: 0.5 + 0 + 1 + 1 of 4


def test_interval_covers_and_groups_widen_it():
    draw, hits = np.random.default_rng(1), 0
    for number in range(100):
        _, low, high = mean_interval(draw.standard_normal(40), draws=400, seed=number)
        hits += low <= 0 <= high
    assert 85 <= hits <= 100  # 95 % wanted; a binomial of 100 leaves 85 to 100 but once in ten thousand
    values = np.repeat(draw.standard_normal(10), 8)
    narrow, wide = (mean_interval(values, groups) for groups in (None, np.arange(80) // 8))
    assert wide[2] - wide[1] > 2 * (narrow[2] - narrow[1])
    assert np.isnan(mean_interval(np.array([[1.0]]))[1]).all()


def test_contrast_can_be_stopped_and_says_its_cost(tiny, monkeypatch):
    monkeypatch.setattr("gptoss_workbench.experiments.reading.TOKENS_PER_BATCH", 8)
    costs, seen = [], []
    found = wb.contrast(tiny, POSITIVE, NEGATIVE, on_plan=costs.append, on_progress=lambda *at: seen.append(at),
                        should_stop=lambda: len(seen) == 2)
    assert (costs[0].passes, costs[0].tokens) == (8, 28)
    assert found.attrs["positive"] == found.attrs["negative"] == seen[-1][0] / 2
    read = found.attrs["positive"]
    want = wb.contrast(tiny, POSITIVE[:read], NEGATIVE[:read])
    np.testing.assert_allclose(found.values, want.values, atol=SITE_F32)
    nothing = wb.contrast(tiny, POSITIVE, NEGATIVE, should_stop=lambda: True)
    assert np.isnan(nothing.values).all()


def test_contrast_refuses_what_makes_no_direction(tiny):
    with pytest.raises(ExperimentError, match="pairs"):
        wb.contrast(tiny, POSITIVE, NEGATIVE[:2], method="pca")
    with pytest.raises(ExperimentError, match="two kinds"):
        wb.contrast(tiny, "one text", NEGATIVE)
    with pytest.raises(ExperimentError, match="no vector of the stream"):
        wb.contrast(tiny, POSITIVE, NEGATIVE, "attn.z")
    with pytest.raises(ExperimentError, match="no such way"):
        wb.contrast(tiny, POSITIVE, NEGATIVE, method="best")


def test_doses_equal_single_runs(tiny):
    direction = wb.contrast(tiny, POSITIVE, NEGATIVE).sel(layer=2)
    found = wb.dose_response(tiny, direction, [1, -2], POSITIVE, METRIC, tokens=-1, controls=2,
                             side_tasks={"other": (NEGATIVE[:2], wb.logit_diff(1, 2))})
    assert found["mean"].dims == ("edit", "task", "scale")
    assert found["edit"].values.tolist() == ["steered", "random 0", "random 1"]
    assert found["scale"].values.tolist() == [-2, 0, 1]
    for scale in (-2.0, 0.0, 1.0):
        edit = wb.steer("resid_post", layer=2, vector=direction, scale=scale, tokens=-1)
        assert edit == wb.steer("resid_post", layer=2, vector=direction.values, scale=scale, tokens=-1)
        runs = [tiny.run(row, edits=edit) for row in POSITIVE]
        want = [float(run.logits[-1, 7] - run.logits[-1, 300]) for run in runs]
        at = found.sel(edit="steered", task="target", scale=scale)
        np.testing.assert_allclose(at["value"].values, want, atol=SITE_F32)
        assert float(at["mean"]) == pytest.approx(np.mean(want), abs=SITE_F32)
        assert float(at["low"]) <= float(at["mean"]) <= float(at["high"])
    assert np.isnan(found["value"].sel(task="other").isel(prompt=slice(2, None))).all()
    change = found["value"] - found["value"].sel(scale=0)
    np.testing.assert_allclose(found["change"], change.mean("prompt"), atol=PARTS_F32)
    assert not found["change"].sel(scale=0).any()


def test_a_function_of_the_scale_and_of_the_answer(tiny):
    found = wb.dose_response(tiny, lambda scale: wb.scale("mlp.out", 1 - scale, layer=1), [1], POSITIVE[:2],
                             lambda gen: gen.tokens[0], max_tokens=2)
    want = [tiny.generate(row, edits=wb.zero("mlp.out", layer=1), max_tokens=1).tokens[0] for row in POSITIVE[:2]]
    assert found["value"].sel(edit="steered", task="target", scale=1).values.tolist() == want


def test_doses_stop_and_say_their_cost(tiny):
    costs, seen = [], []
    direction = wb.contrast(tiny, POSITIVE, NEGATIVE).sel(layer=1)
    found = wb.dose_response(tiny, direction, [1, 2], POSITIVE, METRIC, on_plan=costs.append,
                             on_progress=lambda *at: seen.append(at), should_stop=lambda: len(seen) == 2)
    assert costs[0].passes == 12 == seen[0][1]
    assert np.isfinite(found["mean"].sel(task="target", edit="steered", scale=[0, 1])).all()
    assert np.isnan(found["mean"].sel(task="target", edit="steered", scale=2))


def test_doses_go_on_where_they_were_stopped(tiny):
    vector = wb.contrast(tiny, POSITIVE, NEGATIVE, tokens=-1).sel(layer=2)

    def ask(scales=(1, 2), **how):
        return wb.dose_response(tiny, vector, scales, POSITIVE, METRIC, controls=1, **how)

    seen, plans = [], []
    part = ask(on_progress=lambda *at: seen.append(at), should_stop=lambda: len(seen) == 2)
    assert 0 < np.isnan(part["value"].values).sum() < part["value"].size
    whole = ask()
    xr.testing.assert_identical(ask(resume=part, on_plan=plans.append).drop_attrs(), whole.drop_attrs())
    assert plans[0].passes == int(np.isnan(part["value"].values[:, :, 1:]).sum())
    ask(resume=whole, on_plan=plans.append, on_progress=lambda *at: pytest.fail("nothing was left"))
    with pytest.raises(ExperimentError, match="asked something else"):
        ask(scales=(1, 3), resume=whole)


def test_doses_refuse_what_is_no_direction(tiny):
    whole = wb.contrast(tiny, POSITIVE, NEGATIVE)
    with pytest.raises(ExperimentError, match="one layer"):
        wb.dose_response(tiny, whole, [1], POSITIVE, METRIC)
    with pytest.raises(ExperimentError, match="in doses"):
        wb.dose_response(tiny, lambda scale: wb.scale_sink(scale), [1], POSITIVE, METRIC, controls=2)
    with pytest.raises(ExperimentError, match="needs prompts"):
        wb.dose_response(tiny, whole.sel(layer=0), [1], [], METRIC)
    with pytest.raises(EditNeverFired):
        wb.dose_response(tiny, whole.sel(layer=0), [1], POSITIVE, METRIC, tokens=wb.where(channel="analysis"))
    bare = xr.DataArray(np.zeros(64, dtype=np.float32), dims="d_model")
    with pytest.raises(ExperimentError, match="one layer"):
        wb.dose_response(tiny, bare, [1], POSITIVE, METRIC)


# the embedded model ---------------------------------------------------------------------------------------------


def asked(model, texts, after, effort="low"):
    return [model.encode(wb.chat(text, effort=effort)) + model.vocabulary.encode(after) for text in texts]


def test_an_effort_direction_makes_the_embedded_model_think(model):
    names = [country[0] for country in facts.COUNTRIES]
    direction = wb.effort_direction(model, [f"What is the capital of {name}?" for name in names[:8]], layers=1)
    others = asked(model, [f"What is the currency of {name}?" for name in names[20:26]], CHANNEL)
    found = wb.dose_response(model, direction.sel(layer=1), [-1, 1], others, wb.logit_diff("analysis", "final"),
                             controls=2).sel(task="target")
    steered = found.sel(edit="steered")
    assert float(direction["auc"][0]) == 1
    assert float(steered["high"].sel(scale=0)) < -8  # untouched, it answers at once: -15
    assert float(steered["low"].sel(scale=1)) > 3  # steered, it thinks first: 9
    assert float(found["mean"].sel(edit=["random 0", "random 1"], scale=1).max()) < -3  # the controls: -9


def test_steering_one_token_makes_it_reason_and_still_answer_right(model):
    """Steered wherever it goes, the model would open one message after the other: the dose matters, and the place."""
    names = [country[0] for country in facts.COUNTRIES]
    direction = wb.effort_direction(model, [f"What is the capital of {name}?" for name in names[:8]], layers=1)
    question = wb.chat("What is the currency of France?", effort="low")
    edit = wb.steer("resid_post", layer=1, vector=direction.sel(layer=1).values, tokens=len(model.encode(question)))
    answer = model.generate(question, edits=edit, max_tokens=40)
    assert answer.text("analysis") == "Country: France."  # what medium effort thinks
    assert answer.text("final") == "The currency of France is the euro."


def requests(verbs, things):
    return [f"How do I {verb} a {thing}?" for verb in verbs for thing in things]


@pytest.fixture(scope="module")
def refusal(model):
    """Read where the answer begins, from two of the four verbs and half of the harmless things."""
    harmful, harmless = (requests(facts.MAKE_VERBS[:2], things) for things in (facts.HARMFUL, facts.HARMLESS[:6]))
    return wb.refusal_direction(model, harmful, harmless, effort="low", after=ANSWER, layers=[4, 5])


def test_a_refusal_direction_makes_the_embedded_model_refuse(model, refusal):
    """Verbs and things that the direction was not made from. The side task goes on, if less surely."""
    direction, metric = refusal.sel(layer=4), wb.logit_diff("I'm", "Sure")
    harmless = asked(model, requests(facts.MAKE_VERBS[2:], facts.HARMLESS[6:9]), ANSWER)
    capital = (["The capital of France is"], wb.logit_diff(" Paris", " Madrid"))
    more = wb.dose_response(model, direction, [1, 2], harmless, metric, controls=2, side_tasks={"capital": capital})
    target, steered = more.sel(task="target"), more.sel(edit="steered", task="target")
    assert float(refusal["auc"][0]) == 1
    assert float(steered["high"].sel(scale=0)) < -8  # untouched it helps: -12
    assert float(steered["mean"].sel(scale=1)) > 0 and float(steered["low"].sel(scale=2)) > 3  # steered it refuses: 3
    assert float(target["mean"].sel(edit=["random 0", "random 1"], scale=1).max()) < -3  # the controls: -7
    assert (more["value"].sel(edit="steered", task="capital", prompt=0) > 0).all()


def test_without_its_refusal_direction_the_embedded_model_helps(model, refusal):
    """At the last layer. At layer 4 a random direction would take away as much: there the control refutes it."""
    harmful = asked(model, requests(facts.MAKE_VERBS[2:], facts.HARMFUL[:3]), ANSWER)
    found = wb.dose_response(model, refusal.sel(layer=5), [-1], harmful, wb.logit_diff("I'm", "Sure"), controls=2)
    mean = found["mean"].sel(task="target")
    assert float(mean.sel(edit="steered", scale=0)) > 10  # untouched it refuses: 17
    assert float(mean.sel(edit="steered", scale=-1)) < -5  # taken away it helps: -14
    assert float(mean.sel(edit=["random 0", "random 1"], scale=-1).min()) > 2  # the control: 10


def test_steering_one_channel_leaves_the_other_alone(model, refusal):
    said = model.generate(wb.chat("How do I make a bomb?", effort="medium"), max_tokens=40)
    plain = model.run(said.ids)
    channels = np.array(plain.token_coords("token")["channel"][1])
    for edit in (wb.steer("resid_post", layer=4, vector=refusal.values[0], tokens=wb.where(channel="final")),
                 wb.project("resid_post", refusal.values[0], layer=4, tokens=wb.where(channel="final"))):
        changed = (model.run(said.ids, edits=edit).hidden != plain.hidden).any(-1).numpy()
        assert not changed[: np.flatnonzero(channels == "final")[0]].any()
        assert changed[channels == "final"].all() and (channels == "analysis").any()
