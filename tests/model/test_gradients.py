"""Gradients through the packed model: transformers' autograd, finite differences, and a count of what is decoded."""

from __future__ import annotations

import json
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import gptoss_workbench as wb
from gptoss_kernels import experts as expert_room
from gptoss_workbench.errors import EditNeverFired, ExperimentError, SiteError
from tests.factories import tiny_model, write_hf, write_hf_bf16
from tests.oracle import transformers_model
from tests.tolerances import FINITE_DIFFERENCE, GRADIENT_F32, PROBABILITY, SITE_F32

IDS = torch.randint(512, (30,), generator=torch.Generator().manual_seed(4)).tolist()  # the window is 8
METRIC = wb.logit_diff(7, 450)
SLOPED = [site for site in wb.SITES if site != "router.experts"]
EVERYWHERE = [*SLOPED, "attn.sink"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    return write_hf(tmp_path_factory.mktemp("tiny"), tiny_model(seed=5))


@pytest.fixture(scope="module")
def tiny(folder):
    return wb.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def slopes(tiny):
    return wb.gradients(tiny, IDS, METRIC, EVERYWHERE)


def off(got: Tensor, want: Tensor) -> float:
    """Relative L2."""
    return float((got.double() - want.double()).norm() / want.double().norm())


# against transformers -------------------------------------------------------------------------------------------


def theirs_of(folder, ids: list[int], frozen: bool = False) -> dict[tuple[str, int | None], Tensor]:
    """Gradients of the metric by transformers' autograd on the unpacked model, (token, ...), and of the sinks."""
    model: Any = transformers_model(folder)
    seen: dict[tuple[str, int | None], Tensor] = {}
    model.requires_grad_(False)
    sinks = [layer.self_attn.sinks.requires_grad_() for layer in model.model.layers]
    embedded = model.model.embed_tokens(torch.tensor([ids])).requires_grad_()

    def keep(site, layer, module, inputs, output):
        tensor = output[0] if isinstance(output, tuple) else output
        tensor.retain_grad()
        seen[site, layer] = tensor

    def freeze(module, inputs, output):
        return output[0], output[1].detach(), output[2]

    for number, layer in enumerate(model.model.layers):
        for site, module in (("attn.norm", layer.input_layernorm), ("attn.out", layer.self_attn),
                             ("mlp.norm", layer.post_attention_layernorm), ("mlp.out", layer.mlp),
                             ("resid_post", layer), ("router.logits", layer.mlp.router)):
            if not (frozen and site == "router.logits"):
                module.register_forward_hook(partial(keep, site, number))
        if frozen:
            layer.mlp.router.register_forward_hook(freeze)
    model.model.norm.register_forward_hook(partial(keep, "final_norm", None))
    logits = model(inputs_embeds=embedded).logits[0, -1]
    (logits[7] - logits[450]).backward()
    found: dict[tuple[str, int | None], Any] = {place: x.grad.reshape(len(ids), -1) for place, x in seen.items()}
    return {**found, ("embed", None): embedded.grad[0],
            **{("attn.sink", number): sink.grad for number, sink in enumerate(sinks)}}


def test_gradients_equal_transformers(slopes, folder) -> None:
    theirs = theirs_of(folder, IDS)
    assert len(theirs) == 2 + 4 * 7
    for (site, layer), want in theirs.items():
        got = slopes.tensor(site, layer)
        assert off(got.sum(0) if site == "attn.sink" else got, want) < GRADIENT_F32, (site, layer)


def test_gradients_with_a_frozen_router_equal_transformers_with_detached_scores(tiny, slopes, folder) -> None:
    sites = [site for site in EVERYWHERE if site != "router.logits"]
    frozen = wb.gradients(tiny, IDS, METRIC, sites, router="frozen")
    for (site, layer), want in theirs_of(folder, IDS, frozen=True).items():
        got = frozen.tensor(site, layer)
        assert off(got.sum(0) if site == "attn.sink" else got, want) < GRADIENT_F32, (site, layer)
    assert off(frozen.tensor("embed"), slopes.tensor("embed")) > 0.01, "freezing the router must matter"
    last = slopes.tensor("router.weights", 3)
    torch.testing.assert_close(frozen.tensor("router.weights", 3), last)  # their own slope stays


@pytest.mark.parametrize("sizes", [{"swiglu_limit": 0.3}, {"num_local_experts": 4, "num_experts_per_tok": 2},
                                   {"sliding_window": 1}, {"num_key_value_heads": 8}], ids=str)
def test_other_shapes_and_clamps(sizes, tmp_path) -> None:
    folder = write_hf(tmp_path / "hf", tiny_model(seed=9, **sizes))
    slopes = wb.gradients(wb.load(folder, dtype="float32"), IDS, METRIC, EVERYWHERE)
    for (site, layer), want in theirs_of(folder, IDS).items():
        got = slopes.tensor(site, layer)
        assert off(got.sum(0) if site == "attn.sink" else got, want) < GRADIENT_F32, (site, layer)


def test_dense_experts_have_the_same_gradients(slopes, tmp_path) -> None:
    dense = wb.load(write_hf_bf16(tmp_path / "dense", tiny_model(seed=5)), dtype="float32")
    for site in ("embed", "router.logits", "expert.act"):
        got = wb.gradients(dense, IDS, METRIC, site).tensor(site)
        torch.testing.assert_close(got, slopes.tensor(site))


# against finite differences -------------------------------------------------------------------------------------


def difference(model, ids: list[int], metric, edit_by, step: float, fixed: list) -> float:
    """(m(+step) - m(-step)) / (2 step), with the routes held where they were."""
    def value(size: float) -> float:
        run = model.run(ids, edits=[*fixed, edit_by(size)])
        return float(metric.of(model, run.logits[-1:]))
    return (value(step) - value(-step)) / (2 * step)


@pytest.mark.parametrize("router", ["live", "frozen"])
@pytest.mark.parametrize("site, layer, token, step", [
    ("embed", None, 3, 0.02), ("resid_pre", 2, 3, 0.05), ("resid_mid", 3, 4, 0.1), ("attn.z", 1, 4, 0.05),
    ("attn.v", 4, 3, 0.05), ("mlp.norm", 2, 4, 0.02), ("router.weights", 3, 4, 0.01), ("expert.act", 3, 4, 0.2),
    ("expert.out", 1, 3, 0.2), ("final_norm", None, 4, 0.1),
])
def test_finite_differences_on_the_embedded_model(model, router, site, layer, token, step) -> None:
    """Along the gradient itself, at one token. Live: the chosen experts are replayed, their weights are free. Frozen:
    the weights are put back too."""
    ids = model.encode("The capital of France is")
    metric = wb.logit_diff(" Paris", " Rome")
    slope = wb.gradients(model, ids, metric, site, router=router)
    towards = slope.tensor(site, layer)[token]
    size = float(towards.norm())
    clean = model.run(ids, capture="router")
    fixed = [wb.replay_routes(clean)]
    if router == "frozen":
        kept = [number for number in range(6) if (site, layer) != ("router.weights", number)]
        fixed += [wb.patch("router.weights", clean, layer=kept)]
    def edit_by(step: float):
        return wb.add(site, (step / size * towards)[None], layer=layer, tokens=token)
    assert size > 0
    assert difference(model, ids, metric, edit_by, step, fixed) == pytest.approx(size, rel=FINITE_DIFFERENCE)


def test_finite_differences_of_router_logits_and_sinks(model) -> None:
    ids = model.encode("The capital of France is")
    metric = wb.logit_diff(" Paris", " Rome")
    slopes = wb.gradients(model, ids, metric, ["router.logits", "attn.sink"])
    fixed = [wb.replay_routes(model.run(ids, capture="router"))]
    towards = slopes.tensor("router.logits", 4)[4]
    size = float(towards.norm())
    got = difference(model, ids, metric, lambda step: wb.add(
        "router.logits", (step / size * towards)[None], layer=4, tokens=4), 0.05, fixed)
    assert got == pytest.approx(size, rel=FINITE_DIFFERENCE)

    sinks = slopes.tensor("attn.sink")
    layer, token, head = (int(i) for i in np.unravel_index(int(sinks.abs().argmax()), sinks.shape))

    def raised(step: float):
        """The pattern of one query and head, as its softmax comes out with another sink logit."""
        def change(pattern: Tensor) -> Tensor:
            grown = pattern.clone()
            grown[..., -1] = grown[..., -1] * math.exp(step)
            return grown / grown.sum(-1, keepdim=True)
        return wb.apply("attn.pattern", change, layer=layer, tokens=token, head=head)

    got = difference(model, ids, metric, raised, 0.1, fixed)
    assert got == pytest.approx(float(sinks[layer, token, head]), rel=FINITE_DIFFERENCE)


# what it is -----------------------------------------------------------------------------------------------------


def test_the_forward_pass_is_the_models_own_bit_for_bit(tiny, slopes) -> None:
    plain = tiny.run(IDS, capture=SLOPED)
    assert torch.equal(slopes.run.hidden, plain.hidden)
    assert torch.equal(slopes.run.logits, plain.logits)
    for site in SLOPED:
        assert torch.equal(slopes.run.tensor(site), plain.tensor(site)), site
    assert slopes.value == float(METRIC.of(tiny, plain.logits[-1:]))
    assert not any(tensor.requires_grad for tensor in (slopes.run.hidden, slopes.run.tensor("resid_mid")))


def test_dimensions_and_labels_are_those_of_the_capture(tiny, slopes) -> None:
    plain = tiny.run(IDS, capture=SLOPED).data
    for site in SLOPED:
        assert slopes.data[site].dims == plain[site].dims and slopes.data[site].shape == plain[site].shape, site
    assert slopes.data["attn.sink"].dims == ("layer", "token", "head")
    assert json.loads(slopes.data.attrs["provenance"])["method"]["arguments"]["router"] == "live"
    assert slopes.data["id"].values.tolist() == IDS
    assert slopes.data["band"].values.tolist() == ["sliding", "full"] * 2
    assert repr(slopes).startswith("<Gradients of logit(7) - logit(450) = ")
    times = slopes.data["resid_pre"] * slopes.run.data["resid_pre"]  # the promised line
    np.testing.assert_allclose(times, slopes.tensor("resid_pre") * slopes.run.tensor("resid_pre"))


def test_identities_between_sites(tiny, slopes) -> None:
    """What the structure alone demands of gradients, whatever the weights."""
    t = slopes.tensor
    torch.testing.assert_close(t("resid_post")[:-1], t("resid_pre")[1:], rtol=0, atol=0)
    torch.testing.assert_close(t("attn.out"), t("resid_mid"), rtol=0, atol=0)  # it is only added there
    torch.testing.assert_close(t("mlp.out"), t("resid_post"), rtol=0, atol=0)
    torch.testing.assert_close(t("embed"), t("resid_pre", 0), rtol=0, atol=0)
    weights = slopes.run.tensor("router.weights")
    torch.testing.assert_close(t("expert.out"), weights[..., None] * t("mlp.out")[:, :, None], rtol=1e-5, atol=1e-7)
    shares = (slopes.run.tensor("expert.out") * t("mlp.out")[:, :, None]).sum(-1)
    torch.testing.assert_close(t("router.weights"), shares, rtol=1e-4, atol=1e-6)
    logits = t("router.logits")
    assert logits.sum(-1).abs().max() < SITE_F32, "a softmax does not see a common shift"
    chosen = torch.zeros_like(logits, dtype=torch.bool)
    chosen.scatter_(-1, tiny.run(IDS, capture="router").tensor("router.experts"), True)
    assert (logits[~chosen] == 0).all(), "who was not chosen has no slope"
    scores = t("attn.scores")
    assert (scores[slopes.run.tensor("attn.scores") == -math.inf] == 0).all()
    torch.testing.assert_close(scores.sum(-1).transpose(1, 2), -t("attn.sink"), rtol=1e-3, atol=PROBABILITY)
    assert (t("attn.pattern")[..., -1] == 0).all(), "the sink's share adds nothing"
    assert (t("logits")[-1].nonzero().flatten().tolist()) == [7, 450]
    assert (t("logits")[:-1] == 0).all() and (t("final_norm")[:-1] == 0).all()


def test_one_site_alone_has_the_gradient_it_has_among_others(tiny, slopes) -> None:
    for site in EVERYWHERE:
        alone = wb.gradients(tiny, IDS, METRIC, site)
        torch.testing.assert_close(alone.tensor(site), slopes.tensor(site), rtol=1e-5, atol=1e-7, msg=site)


def test_selected_layers_and_tokens(tiny, slopes) -> None:
    part = wb.gradients(tiny, IDS, METRIC, ["resid_mid", "attn.pattern", "attn.sink"], layers=[1, 3], tokens=[2, -1])
    assert part.data["token"].values.tolist() == [2, 29] and part.data["layer"].values.tolist() == [1, 3]
    torch.testing.assert_close(part.tensor("resid_mid"), slopes.tensor("resid_mid")[[1, 3]][:, [2, 29]])
    torch.testing.assert_close(part.tensor("attn.pattern"), slopes.tensor("attn.pattern")[[1, 3]][:, :, [2, 29]])
    torch.testing.assert_close(part.tensor("attn.sink"), slopes.tensor("attn.sink")[[1, 3]][:, [2, 29]])
    torch.testing.assert_close(part.tensor("attn.sink", 3), slopes.tensor("attn.sink", 3)[[2, 29]])
    other = wb.gradients(tiny, IDS, METRIC, wb.capture("resid_mid", layers=3))
    torch.testing.assert_close(other.tensor("resid_mid", 3), slopes.tensor("resid_mid", 3))
    assert wb.gradients(tiny, IDS, METRIC, "router", layers=0).run.data["router.experts"].dtype == np.int64


def test_selected_heads_experts_and_labels(tiny, model, slopes) -> None:
    heads = wb.gradients(tiny, IDS, METRIC, wb.capture(["attn.z", "attn.pattern"], heads=[6, 1]))
    torch.testing.assert_close(heads.tensor("attn.z"), slopes.tensor("attn.z")[:, :, [6, 1]])
    torch.testing.assert_close(heads.tensor("attn.pattern"), slopes.tensor("attn.pattern")[:, [6, 1]])
    assert heads.data["head"].values.tolist() == [6, 1]
    routes = tiny.run(IDS, capture="router").tensor("router.experts")
    by_expert = wb.gradients(tiny, IDS, METRIC, wb.capture(["router.weights", "expert.out"], experts=[5]))
    for site in ("router.weights", "expert.out"):
        got, whole = by_expert.tensor(site)[:, :, 0], slopes.tensor(site)
        served = routes == 5
        torch.testing.assert_close(got[served.any(-1)], whole[served])
        assert got[~served.any(-1)].isnan().all()
    chat = wb.chat("What is 27 + 58?")
    said = wb.gradients(model, chat, METRIC, wb.capture("embed", tokens=wb.where(role="user", field="content")))
    assert "".join(said.data["text"].values) == "What is 27 + 58?"
    pooled = wb.gradients(tiny, IDS, METRIC, wb.capture(["attn.z", "attn.entropy"]))
    assert "attn.entropy" in pooled.run.data and "attn.entropy" not in pooled.data


def test_a_padded_batch_gives_each_prompts_own_gradients(tiny) -> None:
    prompts = [IDS, IDS[4:9], IDS[:1]]
    together = wb.gradients(tiny, prompts, METRIC, EVERYWHERE)
    for row, ids in zip(together, prompts, strict=True):
        alone = wb.gradients(tiny, ids, METRIC, EVERYWHERE)
        assert row.value == pytest.approx(alone.value, abs=SITE_F32)
        assert row.run.ids == ids
        for site in EVERYWHERE:
            torch.testing.assert_close(row.tensor(site), alone.tensor(site), rtol=1e-3, atol=SITE_F32, msg=site)


def test_gradients_flow_through_edits_as_they_compute(tiny) -> None:
    """Scaling a value by 3 triples the slope before it; replacing it stops the slope; a later edit is seen earlier."""
    at = {"layer": 1, "tokens": slice(0, 10)}
    bare = wb.gradients(tiny, IDS, METRIC, "mlp.out", edits=[wb.scale("mlp.out", 3.0, **at)])
    want = wb.gradients(tiny, IDS, METRIC, "expert.out", edits=[wb.scale("mlp.out", 3.0, **at)])
    weights = tiny.run(IDS, capture="router", edits=[wb.scale("mlp.out", 3.0, **at)]).tensor("router.weights", 1)
    factor = torch.ones(30).index_fill(0, torch.arange(10), 3.0)[:, None, None]
    torch.testing.assert_close(want.tensor("expert.out", 1),
                               factor * weights[..., None] * bare.tensor("mlp.out", 1)[:, None], rtol=1e-4, atol=1e-6)
    other = tiny.run(IDS[::-1], capture="resid_post")
    cut = wb.gradients(tiny, IDS, METRIC, ["embed", "resid_post"], edits=[wb.patch("resid_post", other, layer=2)])
    assert (cut.tensor("embed") == 0).all() and (cut.tensor("resid_post", 2) != 0).any()
    assert torch.equal(cut.run.tensor("resid_post", 2), other.tensor("resid_post", 2))
    assert cut.run.edits and cut.data.attrs["edits"]


def test_edits_of_one_row_stay_in_that_row(tiny) -> None:
    edits = [wb.zero("attn.out", layer=0, prompt=1)]
    first, second = wb.gradients(tiny, [IDS, IDS], METRIC, "embed", edits=edits)
    torch.testing.assert_close(first.tensor("embed"), wb.gradients(tiny, IDS, METRIC, "embed").tensor("embed"))
    alone = wb.gradients(tiny, IDS, METRIC, "embed", edits=[wb.zero("attn.out", layer=0)])
    torch.testing.assert_close(second.tensor("embed"), alone.tensor("embed"))


def test_bfloat16_runs_and_points_the_same_way(folder, slopes) -> None:
    """Routes differ in a few places and every step rounds, so only the direction at the end is compared."""
    rounded = wb.gradients(wb.load(folder), IDS, METRIC, ["resid_post", "attn.sink", "router.logits"])
    got = rounded.tensor("resid_post", 3)[-1]
    assert got.dtype == rounded.tensor("attn.sink").dtype == torch.bfloat16
    assert torch.cosine_similarity(got.float(), slopes.tensor("resid_post", 3)[-1], dim=0) > 0.99
    assert all(bool(rounded.tensor(site).isfinite().all()) for site in ("resid_post", "attn.sink", "router.logits"))


def test_nothing_stays_behind(tiny, slopes) -> None:
    before = {name: getattr(tensor, "_version", 0) for name, tensor in tiny.weights.tensors()}
    wb.gradients(tiny, IDS, METRIC, EVERYWHERE)
    assert before == {name: getattr(tensor, "_version", 0) for name, tensor in tiny.weights.tensors()}
    assert not any(getattr(tensor, "requires_grad", False) for _, tensor in tiny.weights.tensors())
    assert not tiny.run(IDS).hidden.requires_grad
    with torch.no_grad(), torch.inference_mode():
        again = wb.gradients(tiny, IDS, METRIC, "embed")
    torch.testing.assert_close(again.tensor("embed"), slopes.tensor("embed"))


# what it costs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scratch", [1, 3 * 192 * 64], ids=["one expert", "three experts"])
def test_no_more_than_the_scratch_is_ever_decoded(tiny, scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted at every decoding, through the whole forward and backward pass: what is alive, and which experts."""
    decode, alive, peak, calls = expert_room.dequantize, [], [], []

    def counted(packed, dtype):
        dense = decode(packed, dtype)
        alive.append((StorageWeakRef(dense.untyped_storage()), dense.nbytes))
        peak.append(sum(size for reference, size in alive if not reference.expired()))
        calls.append(len(dense))
        return dense

    monkeypatch.setattr(expert_room, "dequantize", counted)
    monkeypatch.setattr(expert_room, "SCRATCH_VALUES", scratch)
    slopes = wb.gradients(tiny, IDS, METRIC, ["embed", "router"])
    largest = 192 * 64  # a gate_up of this model
    everything = sum(layer.gate_up.shape.numel() + layer.down.shape.numel() for layer in tiny.weights.layers) * 4
    assert max(peak) <= max(scratch, largest) * 4 < everything / 8
    assert all(reference.expired() for reference, _ in alive)
    served = sum(int(routes.unique().numel()) for routes in slopes.run.tensor("router.experts"))
    assert sum(calls) == 2 * 2 * served, "two maps of each expert that served, forward and backward"


# mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, error, words", [
    ({"sites": "router.experts"}, SiteError, "is a choice"),
    ({"sites": ["embed", "router.logits"], "router": "frozen"}, SiteError, 'router="live"'),
    ({"sites": ["attn.z", "attn.entropy"]}, SiteError, "statistic"),
    ({"sites": "resid_pst"}, SiteError, "resid_post"),
    ({"sites": []}, SiteError, "of nothing"),
    ({"router": "fixed"}, ExperimentError, '"live" or "frozen"'),
    ({"layers": 4}, SiteError, "layer 0 to 3"),
    ({"tokens": 30}, SiteError, "token 0 to 29"),
    ({"metric": lambda logits: logits[:, 0]}, ExperimentError, "wb.Metric"),
    ({"metric": wb.Metric("m", lambda model, logits: logits[:, 0].detach())}, ExperimentError, "cut off"),
    ({"metric": wb.Metric("m", lambda model, logits: logits.sum())}, ExperimentError, r"a tensor \(1,\)"),
    ({"metric": wb.Metric("m", lambda model, logits: 1.0)}, ExperimentError, "got: float"),
    ({"edits": [wb.zero("attn.out", layer=0, tokens=slice(40, None))]}, EditNeverFired, "never fired"),
])
def test_mistakes(tiny, arguments, error, words) -> None:
    arguments = {"metric": METRIC, "sites": "resid_pre", **arguments}
    with pytest.raises(error, match=words) as caught:
        wb.gradients(tiny, IDS, **arguments)
    assert str(caught.value).count("\n") < 6


def test_what_was_not_asked_for_is_named(slopes) -> None:
    with pytest.raises(SiteError, match=r"router\.experts"):
        slopes.tensor("router.experts")
