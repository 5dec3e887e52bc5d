"""What is captured is what the model computed, under the right labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gptoss_workbench as wb
from gptoss_workbench.errors import SiteError
from gptoss_workbench.hooks.sites import SITES
from tests.factories import tiny_model, write_hf
from tests.tolerances import PROBABILITY, SITE_F32, SUM_F32

IDS = torch.randint(512, (30,), generator=torch.Generator().manual_seed(4)).tolist()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    return wb.load(write_hf(tmp_path_factory.mktemp("tiny"), tiny_model(seed=5)), dtype="float32")


@pytest.fixture(scope="module")
def everything(tiny):
    return tiny.run(IDS, capture=list(SITES))


@pytest.mark.parametrize("site", SITES)
def test_dimensions_are_as_the_table_says(site: str, tiny, everything) -> None:
    spec, variable = SITES[site], everything.data[site]
    sizes = {**tiny.config.dimensions, "layer": 4, "token": 30, "query": 30, "key": 31}
    assert variable.dims == (("layer",) if spec.per_layer else ()) + spec.dims
    assert variable.shape == tuple(sizes[dim] for dim in variable.dims)


def test_hooks_on_equals_hooks_off_bit_for_bit(tiny, everything) -> None:
    bare = tiny.run(IDS)
    assert torch.equal(bare.hidden, everything.hidden)
    assert torch.equal(bare.logits, everything.tensor("logits"))


def test_the_parts_make_the_whole(everything) -> None:
    """Neighbouring sites recomputed from each other: each is what it says it is."""
    t = everything.tensor
    def close(a, b, atol=SUM_F32):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)

    close(t("resid_pre") + t("attn.out"), t("resid_mid"), 0)
    close(t("resid_mid") + t("mlp.out"), t("resid_post"), 0)
    close(t("resid_post")[:-1], t("resid_pre")[1:], 0)
    close(t("embed"), t("resid_pre", 0), 0)
    close((t("expert.out") * t("router.weights")[..., None]).sum(2), t("mlp.out"), SITE_F32)
    close(torch.softmax(t("router.logits").gather(-1, t("router.experts")), -1), t("router.weights"))
    assert torch.equal(t("router.logits").sort(descending=True).values[..., :4],
                       t("router.logits").gather(-1, t("router.experts")))
    close(t("attn.pattern").sum(-1), torch.ones(4, 8, 30), PROBABILITY)
    gate, up = t("expert.gate").clamp(max=7), t("expert.up").clamp(-7, 7)
    close(gate * torch.sigmoid(1.702 * gate) * (up + 1), t("expert.act"), SITE_F32)
    v = t("attn.v").repeat_interleave(4, dim=2)  # four query heads share a key head
    close(torch.einsum("lhqk,lkhd->lqhd", t("attn.pattern")[..., :-1], v), t("attn.z"))
    k = t("attn.k").repeat_interleave(4, dim=2)
    scores = torch.einsum("lqhd,lkhd->lhqk", t("attn.q"), k) / 4
    seen = t("attn.scores") > -torch.inf
    close(t("attn.scores")[seen], scores[seen])


def test_bands_reach_as_far_as_they_should(everything) -> None:
    q, k = torch.arange(30)[:, None], torch.arange(30)[None]
    for layer, band in enumerate(["sliding", "full"] * 2):
        sees = (k <= q) & (q - k < 8) if band == "sliding" else k <= q
        assert torch.equal(everything.tensor("attn.scores", layer) > -torch.inf, sees.expand(8, -1, -1))
    assert everything.data["band"].values.tolist() == ["sliding", "full"] * 2


def test_the_sink_is_a_key_by_name(everything) -> None:
    pattern = everything.data["attn.pattern"]
    sink = pattern.sel(key="sink")
    rest = pattern.drop_sel(key="sink").sum("key")
    np.testing.assert_allclose(sink + rest, 1, atol=PROBABILITY)
    assert float(sink.min()) > 0


def test_labels_come_from_the_conversation(model) -> None:
    chat = wb.chat("What is 27 + 58?", effort="high", developer="Be brief.")
    run = model.run(chat, capture="resid_pre")
    data = run.data
    assert data["id"].values.tolist() == run.ids
    assert "".join(data["text"].values) == model.decode(run.ids)
    said = run.select(role="user", field="content")["text"].values
    assert "".join(said) == "What is 27 + 58?"
    assert set(data["role"].values) == {"system", "developer", "user", "assistant"}
    with pytest.raises(SiteError, match="no label 'speaker'"):
        run.select(speaker="user")


@pytest.mark.parametrize("tokens, expected", [(0, [0]), (-1, [29]), ([3, 5], [3, 5]), (slice(4, 9, 2), [4, 6, 8]),
                                              (slice(-3, None), [27, 28, 29])])
def test_selected_tokens_and_layers(tiny, everything, tokens, expected) -> None:
    run = tiny.run(IDS, capture=wb.capture(["resid_post", "attn.pattern", "router"], layers=[1, 3], tokens=tokens))
    assert run.data["token"].values.tolist() == expected
    assert run.data["layer"].values.tolist() == [1, 3]
    assert run.data["band"].values.tolist() == ["full", "full"]
    for site in ("resid_post", "router.logits", "router.experts"):
        assert torch.equal(run.tensor(site), everything.tensor(site)[[1, 3]][:, expected])
    assert torch.equal(run.tensor("attn.pattern"), everything.tensor("attn.pattern")[[1, 3]][:, :, expected])
    with pytest.raises(SiteError, match="no 'resid_post' of layer 0"):
        run.tensor("resid_post", 0)


def test_a_batch_is_stacked_and_padded_on_the_left(tiny) -> None:
    prompts = [IDS[:12], IDS[3:8]]
    capture = ["resid_post", "router", "attn.pattern"]
    data = tiny.run(prompts, capture=capture).data
    assert data["resid_post"].dims == ("prompt", "layer", "token", "d_model")
    alone = tiny.run(prompts[1], capture=capture).data
    np.testing.assert_allclose(data["resid_post"].values[1, :, 7:], alone["resid_post"].values, atol=SITE_F32)
    assert np.isnan(data["resid_post"].values[1, :, :7]).all()
    assert (data["router.experts"].values[1, :, :7] == -1).all()
    assert data["router.experts"].dtype == np.int64
    np.testing.assert_allclose(data["attn.pattern"].sel(key="sink").values[1, :, :, 7:],
                               alone["attn.pattern"].sel(key="sink").values, atol=SITE_F32)
    assert data["id"].values[1].tolist() == [-1] * 7 + prompts[1]


@pytest.mark.parametrize("capture, words", [
    ("resid", None), ("router.logit", "router.logits"), (["attn.patern"], "attn.pattern"), (5, "site names"),
])
def test_names_that_do_not_exist(tiny, capture, words) -> None:
    if words is None:
        tiny.run(IDS, capture=capture)
        return
    with pytest.raises(SiteError, match=words) as caught:
        tiny.run(IDS, capture=capture)
    assert str(caught.value).count("\n") < 6


def test_what_was_not_captured_is_named(everything, tiny) -> None:
    run = tiny.run(IDS, capture="router")
    with pytest.raises(SiteError, match='capture=\\["resid_post"\\]'):
        run.tensor("resid_post")
    for tokens in (30, -31, [0, 99]):
        with pytest.raises(SiteError, match="token 0 to 29"):
            tiny.run(IDS, capture=wb.capture("router", tokens=tokens))
    with pytest.raises(SiteError, match="layer 0 to 3"):
        tiny.run(IDS, capture=wb.capture("router", layers=4))
