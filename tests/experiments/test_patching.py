"""Patching of every kind against naive hooks on transformers, on a dequantised copy; and what is said about it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

import gptoss_workbench as wb
from gptoss_workbench.errors import ExperimentError
from tests.factories import tiny_model, write_hf
from tests.oracle import transformers_model
from tests.tolerances import PATCHED_F32

CLEAN = [5, 17, 300, 8, 90, 91, 12, 3, 44, 210]
CORRUPT = [5, 17, 301, 8, 90, 77, 12, 3, 44, 210]
PAIRS = [CLEAN, CLEAN[::-1], [9, *CLEAN[1:]]], [CORRUPT, CORRUPT[::-1], [10, *CORRUPT[1:]]]
METRIC = wb.logit_diff(7, 450)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    return write_hf(tmp_path_factory.mktemp("tiny") / "hf", tiny_model(seed=21))


@pytest.fixture(scope="module")
def tiny(folder):
    return wb.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def theirs(folder):
    model = transformers_model(folder)
    model.set_experts_implementation("eager")
    return model


class Hooked:
    """transformers, read and patched by plain hooks. A place is (kind, layer); its tensor is (token, ...)."""

    def __init__(self, model) -> None:
        self.model, self.seen = model, {}

    def run(self, ids: list[int], change=lambda place, x: x) -> Tensor:
        """Logits (vocab,) after the last token; ``change`` sees and may replace each place."""
        self.seen, handles = {}, []

        def act(place, x: Tensor) -> Tensor:
            new = change(place, x[0]).reshape(x.shape)
            self.seen[place] = new[0].clone()
            return new

        for number, layer in enumerate(self.model.model.layers):
            handles += [
                layer.register_forward_pre_hook(
                    lambda m, args, n=number: (act(("resid_pre", n), args[0]), *args[1:])),
                layer.self_attn.register_forward_hook(
                    lambda m, args, out, n=number: (act(("attn.out", n), out[0]), *out[1:])),
                layer.self_attn.o_proj.register_forward_pre_hook(
                    lambda m, args, n=number: (act(("attn.z", n), args[0]),)),
                layer.post_attention_layernorm.register_forward_hook(
                    lambda m, args, out, n=number: act(("mlp.norm", n), out)),
                layer.mlp.router.register_forward_hook(lambda m, args, out, n=number: self._route(m, args[0], n, act)),
                layer.mlp.register_forward_hook(lambda m, args, out, n=number: (act(("mlp.out", n), out[0]), *out[1:])),
            ]
        try:
            with torch.no_grad():
                return self.model(torch.tensor([ids])).logits[0, -1]
        finally:
            for handle in handles:
                handle.remove()

    def _route(self, router, x: Tensor, number: int, act):
        logits = act(("router.logits", number), torch.nn.functional.linear(x, router.weight, router.bias)[None])[0]
        top, chosen = torch.topk(logits, router.top_k, dim=-1)
        self.seen["chosen", number] = chosen
        return logits, torch.softmax(top, -1), chosen

    def share(self, layer: int, expert: int, neurons=slice(None)) -> Tensor:
        """What an expert added to the stream in the last run, (token, d_model), from the dense weights."""
        block = self.model.model.layers[layer].mlp.experts
        x, chosen = self.seen["mlp.norm", layer], self.seen["chosen", layer]
        weights = torch.softmax(self.seen["router.logits", layer].gather(-1, chosen), -1)
        gate_up = x @ block.gate_up_proj[expert] + block.gate_up_proj_bias[expert]
        gate, up = gate_up[:, ::2].clamp(max=7.0), gate_up[:, 1::2].clamp(-7.0, 7.0)
        act = gate * torch.sigmoid(1.702 * gate) * (up + 1)
        out = act[:, neurons] @ block.down_proj[expert][neurons]
        if neurons == slice(None):
            out = out + block.down_proj_bias[expert]
        return (weights * (chosen == expert)).sum(-1, keepdim=True) * out.detach()


def value(logits: Tensor) -> float:
    return float(logits[7] - logits[450])


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("site, by", [
    ("resid_pre", ("layer", "token")), ("attn.out", ("layer", "token")), ("mlp.out", ("layer", "token")),
    ("attn.z", ("layer", "head")), ("attn.z", ("layer", "token", "head")), ("router.logits", ("layer", "token")),
    ("router.logits", ("layer", "expert")), ("expert.out", ("layer", "expert")), ("expert.out", ("layer", "token")),
    ("expert.act", ("layer", "expert", "neuron")),
])
def test_every_kind_equals_naive_hooks_on_transformers(tiny, theirs, site, by, direction) -> None:
    neurons = [3, 50] if "neuron" in by else None
    found = wb.patching(tiny, CLEAN, CORRUPT, site, metric=METRIC, normalize=False, by=by, direction=direction,
                        neurons=neurons)
    hooked, into = Hooked(theirs), CORRUPT if direction == "denoise" else CLEAN
    shares = {}
    for ids in (CLEAN, CORRUPT):
        hooked.run(ids)
        shares[tuple(ids)] = {(layer, expert, neuron): hooked.share(layer, expert, *([[neuron]] if neuron else []))
                              for layer in range(4) for expert in range(8) for neuron in neurons or [None]}
    hooked.run(CLEAN if direction == "denoise" else CORRUPT)
    source, source_shares = dict(hooked.seen), shares[tuple(CLEAN if direction == "denoise" else CORRUPT)]
    places = list(itertools.product(*(found[dim].values.tolist() for dim in by)))
    for place in places[::max(1, len(places) // 12)]:
        at = dict(zip(by, place, strict=True))

        def change(where, x, at=at):
            name, layer = where
            tokens = [at["token"]] if "token" in at else list(range(len(x)))
            if layer != at["layer"]:
                return x
            x = x.clone()
            if name == site == "attn.z":
                width = 16 * at["head"] if "head" in at else 0
                own = slice(width, width + 16) if "head" in at else slice(None)
                x[tokens, own] = source[where][tokens, own]
            elif name == site == "router.logits" and "expert" in at:
                x[tokens, at["expert"]] = source[where][tokens, at["expert"]]
            elif name == site:
                x[tokens] = source[where][tokens]
            elif name == "mlp.out" and site in ("expert.out", "expert.act"):
                for expert in [at["expert"]] if "expert" in at else range(8):
                    key = (layer, expert, at.get("neuron"))
                    x[tokens] += (source_shares[key] - shares[tuple(into)][key])[tokens]
            return x

        assert float(found.sel(at)) == pytest.approx(value(hooked.run(into, change)), abs=PATCHED_F32), at


def test_a_whole_is_the_sum_of_its_places(tiny) -> None:
    """All heads of the last layer patched as one: what attn.out does too. All experts together: as mlp.out."""
    for parts, whole in (("attn.z", "attn.out"), ("expert.out", "mlp.out")):
        one, two = (wb.patching(tiny, CLEAN, CORRUPT, site, metric=METRIC) for site in (parts, whole))
        np.testing.assert_allclose(one, two, atol=1e-4)


def test_directions_meet_at_the_end(tiny) -> None:
    back, lost = (wb.patching(tiny, CLEAN, CORRUPT, "resid_post", metric=METRIC, direction=direction, layers=3,
                              tokens=-1) for direction in ("denoise", "noise"))
    assert back.item() == pytest.approx(1, abs=1e-4) and lost.item() == pytest.approx(1, abs=1e-4)
    assert back.name == "recovered" and lost.name == "lost" and back.dims == ("layer", "token")


def test_metrics_by_hand(tiny) -> None:
    metrics = [METRIC, wb.probability(7), wb.rank(7), wb.kl_divergence(), wb.Metric("own", lambda m, x: x[:, 3] * 2)]
    found = wb.patching(tiny, CLEAN, CORRUPT, metric=metrics, normalize=False, layers=[1], tokens=[5])
    clean = tiny.run(CLEAN, capture="resid_pre")
    logits = tiny.run(CORRUPT, edits=wb.patch("resid_pre", clean, layer=1, tokens=5)).logits[-1]
    p, q = torch.softmax(clean.logits[-1], -1), torch.softmax(logits, -1)
    want = [value(logits), q[7], (logits > logits[7]).sum(), (p * (p / q).log()).sum(), 2 * logits[3]]
    np.testing.assert_allclose(found.squeeze(), [float(one) for one in want], atol=PATCHED_F32)
    assert found["metric"].values.tolist() == found.attrs["metric"] == [metric.name for metric in metrics]
    assert found.attrs["clean"][3][0] == pytest.approx(0, abs=PATCHED_F32)
    share = wb.patching(tiny, CLEAN, CORRUPT, metric=wb.kl_divergence(), layers=[1], tokens=[5])
    assert share.item() == pytest.approx(1 - float(want[3]) / share.attrs["corrupt"], abs=1e-4)
    with pytest.raises(ExperimentError, match="clean prompt"):
        wb.sweep(tiny, CLEAN, [wb.zero("mlp.out", layer=0)], wb.kl_divergence())


def test_pairs_are_one_after_the_other(tiny) -> None:
    answers = [(7, 450), (450, 7), (3, 4)]
    found = wb.patching(tiny, *PAIRS, metric=lambda pair: wb.logit_diff(*answers[pair]))
    assert found.dims == ("pair", "layer", "token")
    for pair, (clean, corrupt) in enumerate(zip(*PAIRS, strict=True)):
        alone = wb.patching(tiny, clean, corrupt, metric=wb.logit_diff(*answers[pair]))
        np.testing.assert_allclose(found.sel(pair=pair), alone, atol=1e-4)
        assert found.attrs["clean"][0][pair] == pytest.approx(alone.attrs["clean"], abs=PATCHED_F32)
    ragged = [CLEAN, CLEAN[2:]], [CORRUPT, CORRUPT[2:]]
    assert wb.patching(tiny, *ragged, "attn.z", metric=METRIC, by=("layer", "head")).shape == (2, 4, 8)
    with pytest.raises(ExperimentError, match="different lengths"):
        wb.patching(tiny, *ragged, metric=METRIC)


@pytest.mark.parametrize("options, words", [
    ({"site": "attn.z", "by": ("layer", "expert")}, "can't be patched layer by expert"),
    ({"site": "router.weights"}, "can't be patched"), ({"site": "resid_pre", "heads": 3}, "can't be selected"),
    ({"site": "expert.out", "by": ("token",)}, "different experts"),
    ({"site": "expert.act"}, "which experts and neurons"),
    ({"direction": "back"}, "no direction"), ({"corrupt": [CORRUPT]}, "don't pair up"),
])
def test_mistakes(tiny, options, words) -> None:
    with pytest.raises(ExperimentError, match=words) as caught:
        wb.patching(tiny, CLEAN, **{"corrupt": CORRUPT, "metric": METRIC, **options})
    assert str(caught.value).count("\n") < 6
