"""Direct logit attribution: shares that sum to the logit, each by hand what the frozen norm says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gptoss_workbench as wb
from gptoss_workbench.errors import ExperimentError, SiteError
from tests.factories import tiny_model, write_compact, write_hf
from tests.oracle import transformers_model
from tests.tolerances import EMBEDDED_LOGITS_F32, ROUNDING_BF16, SITE_F32, SUM_F32, TINY_LOGITS_F32

IDS = torch.randint(300, (17,), generator=torch.Generator().manual_seed(4)).tolist()
SITES = wb.COMPONENT_SITES
ONE, OTHER = 7, 450  # 450 stands in the shared row of the compact layout


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory):
    base, values = tmp_path_factory.mktemp("tiny"), tiny_model(seed=31)
    return write_hf(base / "full", values), write_compact(base / "compact", values)


@pytest.fixture(scope="module")
def tiny(folders):
    return wb.load(folders[0], dtype="float32")


@pytest.fixture(scope="module")
def run(tiny):
    return tiny.run(IDS, capture=SITES)


@pytest.mark.parametrize("other", [None, OTHER])
@pytest.mark.parametrize("layout", [0, 1], ids=["full", "compact"])
def test_the_shares_sum_to_the_logits_of_every_token(folders, layout: int, other: int | None) -> None:
    model = wb.load(folders[layout], dtype="float32")
    run = model.run(IDS, capture=SITES)
    shares = wb.direct_logit_attribution(model, run, ONE, other, tokens=None)
    want = run.logits[:, ONE] - (0 if other is None else run.logits[:, other])
    assert shares.dims == ("component", "token")
    np.testing.assert_allclose(shares.sum("component"), want, rtol=0, atol=SUM_F32)
    np.testing.assert_allclose(shares.drop_sel(component="rest").sum("component"), want, rtol=0, atol=SUM_F32)


def test_the_shares_sum_to_transformers_logits(tiny, run, folders) -> None:
    with torch.no_grad():
        logits = transformers_model(folders[0])(torch.tensor([IDS])).logits[0, -1]
    shares = wb.direct_logit_attribution(tiny, run, ONE, OTHER)
    assert float(shares.drop_sel(component="rest").sum()) == pytest.approx(
        float(logits[ONE] - logits[OTHER]), abs=2 * TINY_LOGITS_F32)


def test_the_shares_sum_in_the_embedded_model(model) -> None:
    run = model.run("The capital of France is", capture=SITES)
    shares = wb.direct_logit_attribution(model, run, " Paris", " Rome")
    paris, rome = (model.encode(text)[0] for text in (" Paris", " Rome"))
    want = float(run.logits[-1, paris] - run.logits[-1, rome])
    assert shares.dims == ("component",) and shares.name == "logit(' Paris') - logit(' Rome')"
    assert float(shares.drop_sel(component="rest").sum()) == pytest.approx(want, abs=EMBEDDED_LOGITS_F32)


def test_in_bfloat16_rounding_is_the_rest(folders) -> None:
    """Of the stream (8 sublayers), the final norm and the logit: each 2 ** -8 of what it rounds, and signs differ."""
    model = wb.load(folders[0])
    run = model.run(IDS, capture=SITES)
    shares = wb.direct_logit_attribution(model, run, ONE, tokens=None)
    want = run.logits[:, ONE].float()
    np.testing.assert_allclose(shares.sum("component"), want, rtol=ROUNDING_BF16, atol=1e-6)
    towards = (model.weights.unembed[ONE].float() * model.weights.final_norm).abs().sum()
    assert 0 < float(abs(shares.sel(component="rest")).max()) < 10 * ROUNDING_BF16 * float(towards)


def test_each_share_by_hand(tiny, run) -> None:
    """The norm written out with its size frozen, applied to one part at a time."""
    parts = wb.decompose_residual(tiny, run)
    stream = run.tensor("resid_post", 3).double()
    size = (stream.square().mean(-1) + 1e-5).sqrt()
    w = tiny.weights
    towards = (w.unembed[ONE] - w.unembed[OTHER]).double() * w.final_norm.double()
    want = (torch.tensor(parts.values).double() / size[:, None]) @ towards
    shares = wb.direct_logit_attribution(tiny, run, ONE, OTHER, tokens=None)
    assert shares["component"].values.tolist() == parts["component"].values.tolist()
    np.testing.assert_allclose(shares[:-1], want[:-1], rtol=0, atol=SUM_F32)


def test_a_share_is_the_effect_of_removal_with_the_norm_frozen(tiny, run) -> None:
    """Nothing comes after the last experts but the norm. So with the norm's output corrected for the new size, the
    logit without one of their slots falls by exactly that expert's share."""
    shares = wb.direct_logit_attribution(tiny, run, ONE, OTHER)
    expert = int(run.tensor("router.experts", 3)[-1, 1])
    without = tiny.run(IDS, capture=SITES, edits=[wb.zero("router.weights", layer=3, tokens=-1, slot=1)])
    def size(run):
        return (run.tensor("resid_post", 3)[-1].square().mean() + 1e-5).sqrt()
    def metric(run):
        return run.logits[-1, ONE] - run.logits[-1, OTHER]
    fall = metric(run) - metric(without) * size(without) / size(run)
    assert float(shares.sel(component=f"layer 3 expert {expert}")) == pytest.approx(float(fall), abs=SUM_F32)


def test_a_batch_row_and_a_selection_of_tokens(tiny, run) -> None:
    batch = tiny.run([IDS, IDS[4:9]], capture=SITES)
    row = wb.direct_logit_attribution(tiny, batch[1], ONE, OTHER, tokens=[-1, 0])
    alone = wb.direct_logit_attribution(tiny, tiny.run(IDS[4:9], capture=SITES), ONE, OTHER, tokens=[-1, 0])
    assert row["token"].values.tolist() == [4, 0] and row["id"].values.tolist() == [IDS[8], IDS[4]]
    np.testing.assert_allclose(row, alone, rtol=0, atol=SITE_F32)
    part = tiny.run(IDS, capture=wb.capture(SITES, tokens=[2, -1]))
    np.testing.assert_allclose(wb.direct_logit_attribution(tiny, part, ONE, OTHER),
                               wb.direct_logit_attribution(tiny, run, ONE, OTHER), rtol=0, atol=SUM_F32)


def test_edits_after_the_parts_are_the_rest(tiny, run) -> None:
    vector = torch.linspace(-1, 1, 64)
    steered = tiny.run(IDS, capture=SITES, edits=[wb.steer("resid_post", layer=3, vector=vector, scale=3.0)])
    shares = wb.direct_logit_attribution(tiny, steered, ONE, OTHER)
    size = (steered.tensor("resid_post", 3)[-1].square().mean() + 1e-5).sqrt()
    want = (3 * vector / size * tiny.weights.final_norm) @ (tiny.weights.unembed[ONE] - tiny.weights.unembed[OTHER])
    assert float(shares.sel(component="rest")) == pytest.approx(float(want), abs=SUM_F32)
    doubled = tiny.run(IDS, capture=SITES, edits=[wb.scale("final_norm", 2.0)])
    shares = wb.direct_logit_attribution(tiny, doubled, ONE)
    assert float(shares.sel(component="rest")) == pytest.approx(float(run.logits[-1, ONE]), abs=SUM_F32)
    assert float(shares.sum()) == pytest.approx(float(doubled.logits[-1, ONE]), abs=SUM_F32)


def test_mistakes(tiny, model, run) -> None:
    with pytest.raises(ExperimentError, match="not one token"):
        wb.direct_logit_attribution(model, model.run("Hello", capture=SITES), "Paris in spring")
    with pytest.raises(SiteError, match="holds no"):
        wb.direct_logit_attribution(tiny, tiny.run(IDS, capture="resid_post"), ONE)
    with pytest.raises(ExperimentError, match="no such token id"):
        wb.direct_logit_attribution(tiny, run, 512)
