"""Lenses against transformers' own norm and head, by hand, and the known places of the embedded model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.extra import numpy as arrays

import gptoss_workbench as wb
from gptoss_workbench.errors import ExperimentError, SiteError
from gptoss_workbench.experiments.decided import _stays
from tests.factories import tiny_model, write_compact, write_hf
from tests.oracle import transformers_model
from tests.tolerances import LENS_F32, PROBABILITY, TRAINED_F32

IDS = [5, 17, 300, 8, 90, 91, 12, 3, 44, 210]
EVERY = ["resid", "attn.out", "mlp.out"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory):
    base, values = tmp_path_factory.mktemp("tiny"), tiny_model(seed=21)
    return write_hf(base / "full", values), write_compact(base / "compact", values)


@pytest.fixture(scope="module")
def tiny(folders):
    return wb.load(folders[0], dtype="float32")


@pytest.fixture(scope="module")
def theirs(folders):
    """log-probabilities (token, vocab) by site and layer, through transformers' own modules."""
    model, states = transformers_model(folders[0]), {}
    for number, layer in enumerate(model.model.layers):
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda _, x, n=number: states.__setitem__((n, "resid_mid"), x[0]))
        layer.register_forward_hook(lambda _, x, y, n=number: states.__setitem__(
            (n, "resid_post"), y[0] if isinstance(y, tuple) else y))
        layer.register_forward_pre_hook(lambda _, x, n=number: states.__setitem__((n, "resid_pre"), x[0]))
    with torch.no_grad():
        model(torch.tensor([IDS]))
        return {place: model.lm_head(model.model.norm(x.view(len(IDS), -1))).log_softmax(-1)
                for place, x in states.items()}


def test_the_grid_is_what_transformers_would_say(tiny, theirs) -> None:
    run = tiny.run(IDS, capture=EVERY)
    grid = wb.lens_grid(tiny, run, sites=("resid_post", "resid_mid", "resid_pre"))
    assert grid["step"].values.tolist()[:4] == ["layer 0 resid_pre", "layer 0 resid_mid", "layer 0 resid_post",
                                                "layer 1 resid_pre"]
    final = theirs[3, "resid_post"]
    for step in range(12):
        row = grid.isel(step=step)
        log_p = theirs[int(row.layer), str(row.site.values)]
        answer = log_p.gather(1, final.argmax(-1)[:, None])
        assert row["said_id"].values.tolist() == log_p.argmax(-1).tolist()
        assert row["answer_rank"].values.tolist() == (log_p > answer).sum(-1).tolist()
        np.testing.assert_allclose(row["prob"], log_p.max(-1).values.exp(), atol=LENS_F32)
        np.testing.assert_allclose(row["answer_prob"], answer[:, 0].exp(), atol=LENS_F32)
        np.testing.assert_allclose(row["entropy"], -(log_p.exp() * log_p).sum(-1), atol=LENS_F32)
        np.testing.assert_allclose(row["kl"], torch.nn.functional.kl_div(log_p, final, log_target=True,
                                                                         reduction="none").sum(-1), atol=LENS_F32)


def test_one_answer_followed_at_some_tokens(tiny, theirs) -> None:
    grid = wb.lens_grid(tiny, tiny.run(IDS, capture="resid_post"), [2, -1], answer=44)
    for layer in range(4):
        log_p = theirs[layer, "resid_post"][[2, 9]]
        np.testing.assert_allclose(grid["answer_prob"].isel(step=layer), log_p[:, 44].exp(), atol=PROBABILITY)
        assert grid["answer_rank"].isel(step=layer).values.tolist() == (log_p > log_p[:, [44]]).sum(-1).tolist()
    assert grid["token"].values.tolist() == [2, 9] and grid["id"].values.tolist() == [300, 210]


def test_contributions_and_what_stood_before_make_the_stream(tiny) -> None:
    """At one size the norm is linear, so the logits of the parts sum to those of the whole."""
    run = tiny.run(IDS, capture=EVERY)
    w = tiny.weights
    for before, added, after in (("resid_pre", "attn.out", "resid_mid"), ("resid_mid", "mlp.out", "resid_post")):
        grid = wb.lens_grid(tiny, run, sites=[added])
        for layer in range(4):
            size = (run.tensor(after, layer).square().mean(-1, keepdim=True) + 1e-5).sqrt()
            whole, first = (run.tensor(site, layer) / size * w.final_norm @ w.unembed.T for site in (after, before))
            log_p = (whole - first).log_softmax(-1)
            assert grid["said_id"].isel(step=layer).values.tolist() == log_p.argmax(-1).tolist()
            np.testing.assert_allclose(grid["prob"].isel(step=layer), log_p.max(-1).values.exp(), atol=LENS_F32)


def test_shared_rows_keep_every_quantity(folders, tiny) -> None:
    compact = wb.load(folders[1], dtype="float32")
    one, two = (wb.lens_grid(m, m.run(IDS, capture="resid_post"), answer=450) for m in (tiny, compact))
    for name in ("entropy", "kl", "answer_prob"):
        np.testing.assert_allclose(one[name], two[name], atol=LENS_F32)


def test_parts_of_a_long_prompt(tiny, monkeypatch) -> None:
    run = tiny.run(IDS, capture="resid_post")
    whole = wb.lens_grid(tiny, run)
    monkeypatch.setattr("gptoss_workbench.experiments.lens_grid.TOKENS_AT_ONCE", 3)
    parts = wb.lens_grid(tiny, run)
    assert parts["said_id"].equals(whole["said_id"]) and parts["answer"].equals(whole["answer"])
    np.testing.assert_allclose(parts["kl"], whole["kl"], atol=LENS_F32)


@given(arrays.arrays(bool, (5, 3)))
def test_decided_is_the_first_layer_of_the_last_stretch(holds) -> None:
    for token, found in enumerate(_stays(holds)):
        column = holds[:, token]
        want = next(layer for layer in range(5) if column[layer:].all() or layer == 4)
        assert found == want


def test_decided_by_hand(tiny, theirs) -> None:
    run = tiny.run(IDS, capture="resid_post")
    found = wb.decided_at(tiny, run, kl=1.0)
    said = torch.stack([theirs[layer, "resid_post"].argmax(-1) for layer in range(4)])
    for token in range(len(IDS)):
        same = (said[:, token] == said[-1, token]).tolist()
        assert int(found["layer"][token]) == next(layer for layer in range(4) if all(same[layer:]))
        assert int(found["first"][token]) == same.index(True)
    kl = wb.lens_grid(tiny, run)["kl"].values
    assert all((kl[int(layer):, token] <= 1.0).all() for token, layer in enumerate(found["layer_kl"]))


def test_decisions_of_the_embedded_model(model) -> None:
    """The country's name holds the fact early; that it is asked for is known at the end only (nothing moves to the
    last token before layer 3), while the end of a repeated word is decided as soon as it can be."""
    run = model.run("The capital of France is", capture=["resid_post", "resid_mid", "mlp.out"])
    found = wb.decided_at(model, run)
    assert found["said"].values[-1] == " Paris" and int(found["layer"][-1]) >= 3
    grid = wb.lens_grid(model, run, -1, ["resid_mid", "resid_post"], answer=" Paris")["answer_prob"].values
    assert grid[:6].max() < 0.01 and grid[-1] > 0.99


TEXTS = [[(7 * i + 3 * j) % 384 for j in range(12)] for i in range(10)]


def test_an_untrained_tuned_lens_is_the_logit_lens(tiny) -> None:
    run = tiny.run(IDS, capture="resid_post")
    lens = wb.tuned_lens(tiny, TEXTS, steps=1, should_stop=lambda: True)
    assert len(lens.history) == 0
    assert lens.lens(run).equals(wb.logit_lens(tiny, run))
    kl = wb.tuned_lens_kl(tiny, [IDS], lens)
    np.testing.assert_array_equal(kl.sel(lens="tuned"), kl.sel(lens="logit"))
    np.testing.assert_allclose(kl.sel(lens="logit")[0], wb.lens_grid(tiny, run)["kl"].mean("token"), atol=LENS_F32)


def test_training_equals_torchs_adam(tiny) -> None:
    """Three steps, all tokens of all texts in each, against torch.optim.Adam and autograd over the whole head."""
    lens = wb.tuned_lens(tiny, TEXTS[:1], steps=3, rate=0.01, batch=1, positions=1000)
    run = tiny.run(TEXTS[0], capture="resid_post")
    final = run.logits.log_softmax(-1)
    for layer in range(3):
        states = run.tensor("resid_post", layer)
        weight, bias = torch.zeros(64, 64, requires_grad=True), torch.zeros(64, requires_grad=True)
        adam = torch.optim.Adam([weight, bias], lr=0.01)
        for step in range(3):
            adam.param_groups[0]["lr"] = 0.01 * (1 - step / 3)
            x = states + states @ weight.T + bias
            x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * tiny.weights.final_norm
            log_p = (x @ tiny.weights.unembed.T).log_softmax(-1)
            loss = torch.nn.functional.kl_div(log_p, final, log_target=True, reduction="batchmean")
            adam.zero_grad()
            loss.backward()
            adam.step()
        np.testing.assert_allclose(lens.weight[layer], weight.detach(), atol=TRAINED_F32)
        np.testing.assert_allclose(lens.bias[layer], bias.detach(), atol=TRAINED_F32)


def test_stopped_saved_and_resumed_is_the_same_bit_for_bit(tiny, tmp_path) -> None:
    how = {"steps": 8, "batch": 3, "positions": 20}
    seen, costs = [], []
    whole = wb.tuned_lens(tiny, TEXTS, **how, on_plan=costs.append, on_progress=lambda *at: seen.append(at))
    assert seen == [(i, 8) for i in range(1, 9)] and (costs[0].passes, costs[0].tokens) == (24, 24 * 12)
    asked = iter([False] * 3 + [True])
    part = wb.tuned_lens(tiny, TEXTS, **how, should_stop=lambda: next(asked))
    assert len(part.history) == 3
    part.save(tmp_path / "lens.safetensors")
    part = wb.TunedLens.load(tmp_path / "lens.safetensors", tiny)
    done = wb.tuned_lens(tiny, TEXTS, **how, resume=part, on_plan=costs.append)
    assert costs[1].passes == 5 * 3 and done.digest == whole.digest and done.history.equals(whole.history)
    assert len(part.history) == 3  # what it went on from stays as it was
    with pytest.raises(ExperimentError, match="trained otherwise"):
        wb.tuned_lens(tiny, TEXTS[:-1], **how, resume=part)


def test_files_of_others_are_refused(tiny, tmp_path, folders) -> None:
    lens = wb.tuned_lens(tiny, TEXTS, steps=1, should_stop=lambda: True)
    lens.save(tmp_path / "lens.safetensors")
    other = wb.load(write_hf(tmp_path / "other", tiny_model(seed=1)), dtype="float32")
    with pytest.raises(ExperimentError, match="another model"):
        wb.TunedLens.load(tmp_path / "lens.safetensors", other)
    for path in (folders[0] / "model.safetensors", folders[0] / "config.json", tmp_path / "none"):
        with pytest.raises(ExperimentError, match="no tuned lens"):
            wb.TunedLens.load(path, tiny)


def test_a_tuned_lens_beats_the_logit_lens_on_text_it_never_saw(model) -> None:
    """And at the end of a prompt it is near what the model says a layer or more before the logit lens is."""
    names = ["Italy", "Japan", "Peru", "Spain", "Kenya", "Norway", "Chile", "Egypt", "Cuba", "Poland", "Greece", "Iran"]
    forms = ("The capital of {} is", "What is the capital of {}?", "People in {} speak", "The currency of {} is the")
    lens = wb.tuned_lens(model, [form.format(name) for name in names for form in forms], steps=40)
    held = [form.format(name) for name in ("France", "Russia") for form in forms]
    kl = wb.tuned_lens_kl(model, held, lens).mean("text")
    assert (kl.sel(lens="tuned", layer=slice(0, 4)) < 0.5 * kl.sel(lens="logit", layer=slice(0, 4))).all()
    run = model.run("The capital of France is", capture="resid_post")
    early, late = (int(wb.decided_at(model, run, -1, kl=2.0, lens=one)["layer_kl"]) for one in (lens, None))
    assert early < late
    assert lens.lens(run).attrs["provenance"] != wb.logit_lens(model, run).attrs["provenance"]


def test_mistakes(tiny) -> None:
    run = tiny.run(IDS, capture="resid_post")
    lens = wb.tuned_lens(tiny, TEXTS, steps=1, should_stop=lambda: True)
    with pytest.raises(SiteError, match="resid_mid"):
        wb.lens_grid(tiny, run, sites="resid_mid")
    with pytest.raises(ExperimentError, match="No lens"):
        wb.lens_grid(tiny, run, sites="attn.z")
    with pytest.raises(ExperimentError, match="after each layer only"):
        wb.lens_grid(tiny, run, sites="resid_mid", lens=lens)
    with pytest.raises(ExperimentError, match="Not every layer"):
        wb.decided_at(tiny, tiny.run(IDS, capture=wb.capture("resid_post", layers=[1, 3])))
    with pytest.raises(ExperimentError, match="threshold"):
        wb.decided_at(tiny, run, kl=float("nan"))
    with pytest.raises(ExperimentError, match="can't be trained"):
        wb.tuned_lens(tiny, [], steps=1)
