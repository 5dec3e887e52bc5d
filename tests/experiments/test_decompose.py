"""The parts of the residual stream: each is what it says, and together they are the whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gptoss_workbench as wb
from gptoss_workbench.errors import ExperimentError, SiteError
from tests.factories import tiny_model, write_hf, write_hf_bf16
from tests.oracle import transformers_model
from tests.tolerances import PARTS_F32, ROUNDING_BF16, SITE_F32, SUM_F32

IDS = torch.randint(512, (24,), generator=torch.Generator().manual_seed(4)).tolist()
WHOLE = [*wb.COMPONENT_SITES, "attn.out", "mlp.out", "resid"]
PLACES = [(layer, site) for layer in range(4) for site in ("resid_pre", "resid_mid", "resid_post")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    return write_hf(tmp_path_factory.mktemp("tiny"), tiny_model(seed=13))


@pytest.fixture(scope="module")
def tiny(folder):
    return wb.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def run(tiny):
    return tiny.run(IDS, capture=WHOLE)


def close(parts: np.ndarray, whole: np.ndarray | Tensor, relative: float = PARTS_F32) -> None:
    whole = np.asarray(whole)
    np.testing.assert_allclose(parts, whole, rtol=0, atol=relative * np.abs(whole).max())


# the whole ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer, site", PLACES)
def test_the_components_sum_to_the_stream_everywhere(tiny, run, layer: int, site: str) -> None:
    parts = wb.decompose_residual(tiny, run, layer, site)
    assert parts.dims == ("component", "token", "d_model")
    close(parts.drop_sel(component="rest").sum("component"), run.tensor(site, layer))
    close(parts.sum("component"), run.tensor(site, layer))


@pytest.mark.parametrize("sizes", [
    {"num_local_experts": 4, "num_experts_per_tok": 1}, {"num_key_value_heads": 8}, {"hidden_size": 96},
], ids=str)
def test_the_sum_holds_for_other_shapes(sizes: dict[str, int], tmp_path) -> None:
    model = wb.load(write_hf_bf16(tmp_path / "dense", tiny_model(seed=3, **sizes)), dtype="float32")
    run = model.run(IDS, capture=WHOLE)
    parts = wb.decompose_residual(model, run).drop_sel(component="rest")
    close(parts.sum("component"), run.tensor("resid_post", 3))
    close(wb.head_contributions(model, run).sum("head"), run.tensor("attn.out"))
    close(wb.expert_contributions(model, run).sum("expert"), run.tensor("mlp.out"))


def test_the_sum_holds_in_the_embedded_model(model) -> None:
    run = model.run(wb.chat("What is 27 + 58?", effort="high"), capture=WHOLE)
    parts = wb.decompose_residual(model, run)
    close(parts.drop_sel(component="rest").sum("component"), run.data["resid_post"][-1])
    heads, experts = wb.head_contributions(model, run), wb.expert_contributions(model, run)
    for layer in range(model.config.num_hidden_layers):
        close(heads.sel(layer=layer).sum("head"), run.tensor("attn.out", layer))
        close(experts.sel(layer=layer).sum("expert"), run.tensor("mlp.out", layer))


def test_in_bfloat16_the_sum_is_off_by_the_models_own_roundings(folder) -> None:
    """A sublayer rounds its output once (twice with the bias), the stream once for every addition, by 2 ** -8 each."""
    model = wb.load(folder)
    run = model.run(IDS, capture=WHOLE)
    assert run.tensor("resid_post", 3).dtype == torch.bfloat16
    for layer in range(4):
        out = run.data["attn.out"].sel(layer=layer)
        close(wb.head_contributions(model, run, layer).sum("head"), out, 2 * ROUNDING_BF16)
        out = run.data["mlp.out"].sel(layer=layer)
        close(wb.expert_contributions(model, run, layer).sum("expert"), out, 2 * ROUNDING_BF16)
    parts = wb.decompose_residual(model, run)
    stream = float(max(abs(run.data[site]).max() for site in ("resid_mid", "resid_post")))
    rest = abs(parts.sel(component="rest"))
    assert 0 < float(rest.max()) < 8 * 3 * ROUNDING_BF16 * stream
    close(parts.sum("component"), run.data["resid_post"][-1])


def test_rows_of_a_padded_batch_are_taken_apart_like_single_runs(tiny) -> None:
    prompts = [IDS, IDS[5:12], IDS[:1]]
    for run, ids in zip(tiny.run(prompts, capture=WHOLE), prompts, strict=True):
        parts = wb.decompose_residual(tiny, run)
        close(parts.drop_sel(component="rest").sum("component"), run.tensor("resid_post", 3))
        alone = wb.decompose_residual(tiny, tiny.run(ids, capture=WHOLE))
        assert parts["component"].values.tolist() == alone["component"].values.tolist()
        np.testing.assert_allclose(parts, alone, rtol=0, atol=SITE_F32)


# each part ------------------------------------------------------------------------------------------------------


def test_parts_equal_those_made_from_transformers(tiny, run, folder) -> None:
    """Heads through transformers' own projection, one at a time; experts through its expert module, one at a time."""
    theirs: Any = transformers_model(folder)
    seen: dict[tuple[str, int], Any] = {}
    for number, layer in enumerate(theirs.model.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda module, inputs, number=number: seen.update({("z", number): inputs[0]}))
        layer.mlp.experts.register_forward_pre_hook(
            lambda module, inputs, number=number: seen.update({("experts", number): inputs}))
    heads, experts = wb.head_contributions(tiny, run), wb.expert_contributions(tiny, run)
    with torch.no_grad():
        theirs(torch.tensor([IDS]))
        for number, layer in enumerate(theirs.model.layers):
            z, project = seen["z", number][0].view(len(IDS), 8, 16), layer.self_attn.o_proj
            bias = project(torch.zeros(1, 128))
            close(heads.sel(layer=number, head="bias")[0], bias[0])
            for head in range(8):
                alone = torch.zeros_like(z)
                alone[:, head] = z[:, head]
                want = project(alone.flatten(1)) - bias
                np.testing.assert_allclose(heads.sel(layer=number, head=head), want, rtol=0, atol=SITE_F32)
            x, chosen, weights = seen["experts", number]
            for expert in range(8):
                want = layer.mlp.experts(x, chosen, torch.where(chosen == expert, weights, 0.0)).view(len(IDS), 64)
                np.testing.assert_allclose(experts.sel(layer=number, expert=expert), want, rtol=0, atol=SITE_F32)


def test_a_part_is_what_is_missing_when_it_is_silenced(tiny, run) -> None:
    heads, experts = wb.head_contributions(tiny, run), wb.expert_contributions(tiny, run)
    without = tiny.run(IDS, capture="attn.out", edits=[wb.zero("attn.z", layer=2, head=5)])
    missing = run.tensor("attn.out", 2) - without.tensor("attn.out", 2)
    np.testing.assert_allclose(heads.sel(layer=2, head=5), missing, rtol=0, atol=SITE_F32)
    without = tiny.run(IDS, capture="mlp.out", edits=[wb.zero("router.weights", layer=1, tokens=7, slot=2)])
    missing = run.tensor("mlp.out", 1)[7] - without.tensor("mlp.out", 1)[7]
    expert = int(run.tensor("router.experts", 1)[7, 2])
    np.testing.assert_allclose(experts.sel(layer=1, token=7, expert=expert), missing, rtol=0, atol=SITE_F32)


def test_experts_that_did_not_serve_contribute_nothing(tiny, run) -> None:
    experts = wb.expert_contributions(tiny, run)
    served = np.zeros((4, len(IDS), 8), dtype=bool)
    np.put_along_axis(served, run.data["router.experts"].values, True, axis=2)
    assert (abs(experts).sum("d_model").values > 0).tolist() == served.tolist()


def test_the_components_are_the_contributions_under_their_names(tiny, run) -> None:
    parts = wb.decompose_residual(tiny, run)
    heads, experts = wb.head_contributions(tiny, run), wb.expert_contributions(tiny, run)
    np.testing.assert_allclose(parts.sel(component="layer 2 head 7"), heads.sel(layer=2, head=7), atol=SUM_F32)
    np.testing.assert_allclose(parts.sel(component="layer 1 bias"), heads.sel(layer=1, head="bias"), atol=SUM_F32)
    np.testing.assert_allclose(parts.sel(component="layer 3 expert 4"), experts.sel(layer=3, expert=4), atol=SUM_F32)
    np.testing.assert_array_equal(parts.sel(component="embed"), run.data["embed"])
    named = [(str(name), str(kind), int(layer), int(index)) for name, kind, layer, index in zip(
        parts.component.values, parts.kind.values, parts.layer.values, parts.index.values, strict=True)]
    assert named[0] == ("embed", "embed", -1, -1) and named[-1] == ("rest", "rest", -1, -1)
    assert ("layer 2 head 7", "head", 2, 7) in named and ("layer 1 bias", "bias", 1, -1) in named
    assert len({name for name, *_ in named}) == len(named)
    by_layer = parts.groupby("layer").sum()
    for layer in range(4):
        want = run.tensor("attn.out", layer) + run.tensor("mlp.out", layer)
        np.testing.assert_allclose(by_layer.sel(layer=layer), want, rtol=0, atol=SITE_F32)


# selections, edits, mistakes ------------------------------------------------------------------------------------


def test_selected_tokens_and_layers(tiny, run) -> None:
    whole = wb.decompose_residual(tiny, run)
    last = wb.decompose_residual(tiny, run, tokens=-1)
    assert last.dims == ("component", "d_model") and last.sizes["component"] < whole.sizes["component"]
    names = last["component"].values
    np.testing.assert_allclose(last, whole.sel(component=names).isel(token=-1), atol=SUM_F32)
    unused = whole.drop_sel(component=names).isel(token=-1)
    assert (unused == 0).all() and set(unused.kind.values) == {"expert"}
    part = tiny.run(IDS, capture=wb.capture(WHOLE, tokens=[3, 9]))
    again = wb.decompose_residual(tiny, part, tokens=[9, 3])
    assert again["token"].values.tolist() == [9, 3] and again["id"].values.tolist() == [IDS[9], IDS[3]]
    want = whole.sel(token=[9, 3], component=again["component"])
    np.testing.assert_allclose(again, want, atol=SUM_F32)
    heads = wb.head_contributions(tiny, run, layers=[3, 1], tokens=[0])
    assert heads.dims == ("layer", "token", "head", "d_model") and heads["layer"].values.tolist() == [3, 1]
    assert heads["band"].values.tolist() == ["full", "full"]
    assert wb.expert_contributions(tiny, run, layers=2, tokens=slice(2, 4)).dims == ("token", "expert", "d_model")


def test_tokens_by_what_they_are(model) -> None:
    run = model.run(wb.chat("What is 27 + 58?"), capture=wb.COMPONENT_SITES)
    asked = wb.decompose_residual(model, run, tokens=wb.where(role="user", field="content"))
    assert "".join(asked["text"].values) == "What is 27 + 58?"
    with pytest.raises(SiteError, match="no token"):
        wb.decompose_residual(model, run, tokens=wb.where(channel="analysis"))


def test_what_an_edit_writes_into_the_stream_is_the_rest(tiny) -> None:
    vector = torch.linspace(-3, 3, 64)
    edits = [wb.steer("resid_mid", layer=1, vector=vector, scale=2.0, tokens=6), wb.zero("attn.z", layer=0, head=1)]
    run = tiny.run(IDS, capture=WHOLE, edits=edits)
    for layer, site, there in ((1, "resid_pre", 0), (1, "resid_mid", 1), (3, "resid_post", 1)):
        rest = wb.decompose_residual(tiny, run, layer, site).sel(component="rest")
        np.testing.assert_allclose(rest.sel(token=6), there * 2 * vector, rtol=0, atol=SITE_F32)
        assert float(abs(rest.drop_sel(token=6)).max()) < SITE_F32
    assert (wb.decompose_residual(tiny, run).sel(component="layer 0 head 1") == 0).all()


def test_an_expert_in_two_slots_counts_twice(tiny) -> None:
    edits = [wb.apply("router.experts", lambda x: torch.full_like(x, 3), layer=1)]
    run = tiny.run(IDS, capture=WHOLE, edits=edits)
    experts = wb.expert_contributions(tiny, run, layers=1)
    close(experts.sel(expert=3), run.tensor("mlp.out", 1))
    close(wb.decompose_residual(tiny, run).drop_sel(component="rest").sum("component"), run.tensor("resid_post", 3))


def test_mistakes(tiny, run) -> None:
    batch, bare = tiny.run([IDS, IDS], capture=WHOLE), tiny.run(IDS)
    one_layer = tiny.run(IDS, capture=wb.capture("attn.z", layers=1))
    turned = tiny.run(IDS, capture=wb.capture("attn.z", heads=range(7, -1, -1)))
    by_expert = tiny.run(IDS, capture=wb.capture(["expert.out", "router"], experts=[0, 1, 2, 3]))  # as many as slots
    for wrong, error, words in (
        (lambda: wb.decompose_residual(tiny, batch), ExperimentError, "one run at a time"),
        (lambda: wb.decompose_residual(tiny, bare), SiteError, "resid_post"),
        (lambda: wb.decompose_residual(tiny, run, 4), SiteError, "layer 0 to 3"),
        (lambda: wb.decompose_residual(tiny, run, 1, "mlp.out"), ExperimentError, "no place of the residual stream"),
        (lambda: wb.head_contributions(tiny, bare), SiteError, "attn.z"),
        (lambda: wb.expert_contributions(tiny, run, tokens=24), SiteError, "token 0 to 23"),
        (lambda: wb.head_contributions(tiny, one_layer, layers=2), SiteError, "of layer 2"),
        (lambda: wb.head_contributions(tiny, turned), ExperimentError, "a part does not sum"),
        (lambda: wb.expert_contributions(tiny, by_expert), ExperimentError, "a part does not sum"),
    ):
        with pytest.raises(error, match=words) as caught:
            wrong()
        assert str(caught.value).count("\n") < 6
