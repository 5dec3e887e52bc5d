"""Experiments against hand-made ones: plain loops, plain softmax, plain counting."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import gptoss_workbench as wb
from gptoss_workbench.errors import ExperimentError, SiteError
from tests.factories import tiny_model, write_compact, write_hf
from tests.tolerances import PROBABILITY, SITE_F32, SUM_F32

CLEAN = [5, 17, 300, 8, 90, 91, 12, 3, 44, 210]
CORRUPT = [5, 17, 301, 8, 90, 77, 12, 3, 44, 210]
METRIC = wb.logit_diff(7, 450)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory):
    base, values = tmp_path_factory.mktemp("tiny"), tiny_model(seed=21)
    return write_hf(base / "full", values), write_compact(base / "compact", values)


@pytest.fixture(scope="module")
def tiny(folders):
    return wb.load(folders[0], dtype="float32")


@pytest.mark.parametrize("site", ["resid_pre", "attn.out", "mlp.out"])
def test_patching_equals_the_naive_loop(tiny, site: str) -> None:
    result = wb.patching(tiny, CLEAN, CORRUPT, site=site, metric=METRIC, normalize=False)
    clean = tiny.run(CLEAN, capture=site)
    def value(run):
        return float(run.logits[-1, 7] - run.logits[-1, 450])
    for layer in range(4):
        for token in (0, 2, 5, 9):
            run = tiny.run(CORRUPT, edits=[wb.patch(site, clean, layer=layer, tokens=token)])
            assert float(result.sel(layer=layer, token=token)) == pytest.approx(value(run), abs=SITE_F32)
    assert result.attrs["clean"] == pytest.approx(value(clean), abs=SUM_F32)
    assert result.attrs["corrupt"] == pytest.approx(value(tiny.run(CORRUPT)), abs=SUM_F32)
    normal = wb.patching(tiny, CLEAN, CORRUPT, site=site, metric=METRIC)
    want = (result - result.attrs["corrupt"]) / (result.attrs["clean"] - result.attrs["corrupt"])
    np.testing.assert_allclose(normal.values, want.values, atol=1e-4)


def test_patching_what_is_equal_changes_nothing_and_the_last_place_everything(tiny) -> None:
    result = wb.patching(tiny, CLEAN, CORRUPT, metric=METRIC)
    assert abs(float(result.sel(layer=0, token=0))) < 1e-3  # the same token in both
    assert result.dims == ("layer", "token")
    assert result["corrupt_text"].values.tolist() != result["text"].values.tolist()
    last = wb.patching(tiny, CLEAN, CORRUPT, site="resid_post", metric=METRIC)
    assert float(last.sel(layer=3, token=9)) == pytest.approx(1, abs=1e-3)


def test_patching_reports_and_stops(tiny) -> None:
    seen, plans = [], []
    part = wb.patching(tiny, CLEAN, CORRUPT, metric=METRIC, memory=1 << 20, on_plan=plans.append,
                       on_progress=lambda done, total: seen.append((done, total)), should_stop=lambda: len(seen) >= 2)
    assert plans[0].cases == 32 and plans[0].waves > 2  # two tokens come before the first that differs
    done, total = seen[-1]
    assert len(seen) == 2 and 0 < done < total == 32 and int(np.isfinite(part).sum()) == done + 8
    assert (part.values[:, :2] == 0).all()
    whole = wb.patching(tiny, CLEAN, CORRUPT, metric=METRIC, resume=part)
    np.testing.assert_allclose(whole, wb.patching(tiny, CLEAN, CORRUPT, metric=METRIC), atol=1e-4)
    assert part.attrs["missing"] == f"{32 - done} of 40 places" and whole.attrs["complete"]


@pytest.mark.parametrize("clean, corrupt, site, words", [
    (CLEAN, CORRUPT[:-1], "resid_pre", "different lengths"),
    (CLEAN, CLEAN, "resid_pre", "same for both prompts"),
    (CLEAN, CORRUPT, "attn.pattern", "layer by token"),
    (CLEAN, CORRUPT, "embed", "layer by token"),
])
def test_patching_mistakes(tiny, clean, corrupt, site, words) -> None:
    with pytest.raises(ExperimentError, match=words) as caught:
        wb.patching(tiny, clean, corrupt, site=site, metric=METRIC)
    assert str(caught.value).count("\n") < 6


def test_answers_must_be_one_token(model) -> None:
    with pytest.raises(ExperimentError, match="not one token"):
        wb.patching(model, "The capital of France is", "The capital of Italy is",
                    metric=wb.logit_diff("Paris in spring", " Rome"))


def test_lens_at_the_last_layer_is_the_model(tiny) -> None:
    run = tiny.run(CLEAN, capture="resid_post")
    lens, said = wb.logit_lens(tiny, run, top=6), wb.next_tokens(tiny, run, top=6)
    p = torch.softmax(run.logits[-1], -1)
    want = p.topk(6)
    assert lens["id"].values[-1].tolist() == said["id"].values.tolist() == want.indices.tolist()
    np.testing.assert_allclose(lens["prob"].values[-1], want.values, atol=PROBABILITY)
    np.testing.assert_allclose(said["logit"].values, run.logits[-1][want.indices], atol=SUM_F32)


def test_lens_at_an_earlier_layer_by_hand(tiny) -> None:
    run = tiny.run(CLEAN, capture="resid_post")
    x = run.tensor("resid_post", 1)[4]
    normed = x / (x.pow(2).mean() + 1e-5).sqrt() * tiny.weights.final_norm
    want = torch.softmax(tiny.weights.unembed @ normed, 0).topk(3)
    lens = wb.logit_lens(tiny, run, token=4, top=3).sel(layer=1)
    assert lens["id"].values.tolist() == want.indices.tolist()
    np.testing.assert_allclose(lens["prob"].values, want.values, atol=PROBABILITY)
    with pytest.raises(SiteError, match="resid_post"):
        wb.logit_lens(tiny, tiny.run(CLEAN))


def test_shared_rows_count_as_all_their_ids(folders, tiny) -> None:
    """The compact form of the same model: the shared row stands there once, with the mass of all its ids."""
    compact = wb.load(folders[1], dtype="float32")
    shared = [id for id, row in enumerate(compact.weights.row_of_token.tolist())
              if (compact.weights.row_of_token == row).sum() > 1]
    one, two = tiny.run(CLEAN, capture="resid_post"), compact.run(CLEAN, capture="resid_post")
    p = torch.softmax(one.logits[-1], -1)
    said = wb.next_tokens(compact, two, top=600)
    by_id = dict(zip(said["id"].values.tolist(), said["prob"].values.tolist(), strict=True))
    assert by_id.pop(-1) == pytest.approx(float(p[shared].sum()), abs=PROBABILITY)
    assert set(by_id) == set(range(512)) - set(shared)
    assert all(value == pytest.approx(float(p[id]), abs=PROBABILITY) for id, value in by_id.items())
    assert f"{len(shared):,} unused" in said["text"].values[said["id"].values.tolist().index(-1)]
    for name in ("surprisal", "entropy"):
        full, short = wb.token_quantity(tiny, one, name), wb.token_quantity(compact, two, name)
        np.testing.assert_allclose(full, short, atol=SUM_F32)


def test_token_quantities_by_hand(tiny) -> None:
    run = tiny.run(CLEAN, capture=["router", "attn.pattern", "resid_post"])
    log_p = run.logits.log_softmax(-1)
    def value(name):
        return wb.token_quantity(tiny, run, name).values
    assert math.isnan(value("surprisal")[0])
    np.testing.assert_allclose(value("surprisal")[1:], [-log_p[i, CLEAN[i + 1]] for i in range(9)], atol=SUM_F32)
    np.testing.assert_allclose(value("entropy"), -(log_p.exp() * log_p).sum(-1), atol=SUM_F32)
    p = torch.softmax(run.tensor("router.logits"), -1)
    np.testing.assert_allclose(value("router_entropy"), -(p * p.log2()).sum(-1).mean(0), atol=SUM_F32)
    ordered = run.tensor("router.logits").sort(-1, descending=True).values
    np.testing.assert_allclose(value("router_margin"), (ordered[..., 3] - ordered[..., 4]).mean(0), atol=SUM_F32)
    on_text = run.tensor("attn.pattern")[..., :-1].sum(-1).mean((0, 1))
    np.testing.assert_allclose(value("sink"), 1 - on_text, atol=SUM_F32)
    np.testing.assert_allclose(value("resid_norm"), run.tensor("resid_post", 3).pow(2).sum(-1).sqrt(), rtol=1e-6)
    assert set(wb.TOKEN_QUANTITIES) == {"surprisal", "entropy", "router_entropy", "router_margin", "sink", "resid_norm"}
    with pytest.raises(ExperimentError, match="surprisal"):
        value("surprise")


@pytest.mark.parametrize("tokens", [None, 3, -1, [0, 4, 5], slice(2, 6)])
def test_expert_usage_by_counting(tiny, tokens) -> None:
    run = tiny.run(CLEAN, capture="router")
    chosen = range(10) if tokens is None else [tokens] if isinstance(tokens, int) else \
        tokens if isinstance(tokens, list) else range(10)[tokens]
    want = np.zeros((4, 8))
    for layer in range(4):
        for token in chosen:
            for slot in range(4):
                expert = int(run.tensor("router.experts", layer)[token, slot])
                want[layer, expert] += float(run.tensor("router.weights", layer)[token, slot]) / len(chosen)
    usage = wb.expert_usage(run, tokens)
    np.testing.assert_allclose(usage.values, want, atol=SUM_F32)
    np.testing.assert_allclose(usage.sum("expert"), 1, atol=10 * PROBABILITY)
    assert usage["band"].values.tolist() == ["sliding", "full"] * 2


def test_usage_of_selected_captures(tiny) -> None:
    part = tiny.run(CLEAN, capture=wb.capture("router", layers=[1, 2], tokens=[3, 4]))
    whole = tiny.run(CLEAN, capture="router")
    np.testing.assert_allclose(wb.expert_usage(part).values, wb.expert_usage(whole, [3, 4]).sel(layer=[1, 2]).values)
    with pytest.raises(SiteError):
        wb.expert_usage(part, 0)
