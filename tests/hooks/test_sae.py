"""Sparse autoencoders against NumPy written by hand, folders made here, and edits whose effect is known."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gptoss_workbench as wb
from gptoss_workbench.errors import CheckpointError, EditError, ExperimentError, MissingShard, ModelNotFound
from gptoss_workbench.hooks.sae_files import site_of
from tests.factories import tiny_model, write_hf
from tests.hooks.sae_folders import D, F, K, tensors, write
from tests.tolerances import PARTS_F32, SITE_F32, SWEEP_F32

IDS = [5, 17, 300, 8, 90, 91, 12]


def by_hand(architecture: str, w: dict[str, np.ndarray], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One vector x (d_in) -> features and reconstruction, one feature at a time."""
    out = np.zeros(F)
    u = x - w["b_dec"]
    for i in range(F):
        dot = sum(float(u[j]) * float(w["W_enc"][j, i]) for j in range(len(x)))
        if architecture == "gated":
            out[i] = max(0.0, np.exp(w["r_mag"][i]) * dot + w["b_mag"][i]) if dot + w["b_gate"][i] > 0 else 0.0
        else:
            out[i] = dot + w["b_enc"][i]
    if architecture == "standard":
        out = np.where(out > 0, out, 0.0)
    elif architecture == "jumprelu":
        out = np.where((out > w["threshold"]) & (out > 0), out, 0.0)
    elif architecture == "topk":
        kept = sorted(range(F), key=lambda i: -out[i])[:K]
        out = np.array([max(0.0, out[i]) if i in kept else 0.0 for i in range(F)])
    return out, w["b_dec"] + sum(out[i] * w["W_dec"][i] for i in range(F))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    return wb.load(write_hf(tmp_path_factory.mktemp("tiny") / "full", tiny_model(seed=33)), dtype="float32")


@pytest.fixture(scope="module")
def tiny_bf16(tmp_path_factory: pytest.TempPathFactory):
    return wb.load(write_hf(tmp_path_factory.mktemp("tiny") / "full", tiny_model(seed=33)), dtype="bfloat16")


ARCHITECTURES = ["standard", "topk", "jumprelu", "gated"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_encode_and_decode_equal_a_hand_made_one(tmp_path, architecture):
    sae = wb.load_sae(write(tmp_path, architecture))
    x = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(9))
    features = sae.encode(x)
    plain = {name: tensor.double().numpy() for name, tensor in tensors(architecture).items()}
    for at in np.ndindex(2, 3):
        want, made = by_hand(architecture, plain, x[at].double().numpy())
        np.testing.assert_allclose(features[at].numpy(), want, atol=SITE_F32)
        np.testing.assert_allclose(sae.decode(features)[at].numpy(), made, atol=SITE_F32)
    assert 0 < int((features > 0).sum()) < features.numel()
    torch.testing.assert_close(sae.encode(x, [3, -1]), features[..., [3, F - 1]], atol=PARTS_F32, rtol=1e-5)
    np.testing.assert_allclose((sae.decode(features) + sae.error(x)).numpy(), x.numpy(), atol=SITE_F32)


@pytest.mark.parametrize("normalize", ["constant_norm_rescale", "layer_norm"])
def test_normalised_sae(tmp_path, normalize):
    sae = wb.load_sae(write(tmp_path, "standard", normalize_activations=normalize, apply_b_dec_to_input=False))
    w = {name: tensor.double().numpy() for name, tensor in tensors("standard").items()}
    x = torch.randn(4, D, generator=torch.Generator().manual_seed(9)) * 7 + 1
    plain = x.double().numpy()
    if normalize == "layer_norm":
        scale, shift = plain.std(1, ddof=1, keepdims=True), plain.mean(1, keepdims=True)
        u = (plain - shift) / (scale + 1e-5)
    else:
        scale, shift = np.linalg.norm(plain, axis=1, keepdims=True) / 8, 0.0  # sqrt(64) = 8
        u = plain / scale
    want = np.maximum(u @ w["W_enc"] + w["b_enc"], 0)
    np.testing.assert_allclose(sae.encode(x).numpy(), want, atol=SITE_F32)
    made = (want @ w["W_dec"] + w["b_dec"]) * scale + shift
    np.testing.assert_allclose(sae.decode(sae.encode(x), like=x).numpy(), made, atol=SITE_F32, rtol=1e-5)
    with pytest.raises(ExperimentError, match="beside what was read"):
        sae.decode(sae.encode(x))


def test_the_layout_of_dictionary_learning_is_a_jumprelu(tmp_path):
    """BatchTopK: one threshold for all features, as the SAEs for gpt-oss-20b are published."""
    values = tensors("standard")
    state = {"encoder.weight": values["W_enc"].T.contiguous(), "encoder.bias": values["b_enc"],
             "decoder.weight": values["W_dec"].T.contiguous(), "b_dec": values["b_dec"],
             "k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(0.7)}
    torch.save(state, tmp_path / "ae.pt")
    trainer = {"dict_class": "BatchTopKSAE", "activation_dim": D, "dict_size": F, "k": K, "layer": 1,
               "lm_name": "openai/gpt-oss-20b", "submodule_name": "resid_post_layer_1"}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    sae = wb.load_sae(tmp_path)
    assert (sae.architecture, sae.site, sae.layer, sae.model) == ("jumprelu", "resid_post", 1, "openai/gpt-oss-20b")
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(9))
    kept = ((x - values["b_dec"]) @ values["W_enc"] + values["b_enc"]).relu()
    torch.testing.assert_close(sae.encode(x), kept * (kept > 0.7), atol=SITE_F32, rtol=0)
    torch.save({**state, "threshold": torch.tensor(-1.0)}, tmp_path / "ae.pt")
    with pytest.raises(CheckpointError, match="not understood"):
        wb.load_sae(tmp_path)
    (tmp_path / "ae.pt").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="can't be read"):
        wb.load_sae(tmp_path)


def test_a_folder_from_before_version_6(tmp_path):
    old = write(tmp_path, "topk")
    said = {"d_in": D, "d_sae": F, "hook_point": "blocks.3.hook_mlp_out", "activation_fn_str": "topk",
            "activation_fn_kwargs": {"k": K}, "normalize_activations": "none", "model_name": "old"}
    want = wb.load_sae(old).encode(torch.ones(D))
    (old / "cfg.json").write_text(json.dumps(said))
    sae = wb.load_sae(old)
    assert (sae.architecture, sae.k, sae.site, sae.layer) == ("topk", K, "mlp.out", 3)
    assert torch.equal(sae.encode(torch.ones(D)), want)


@pytest.mark.parametrize(("hook", "place"), [
    ("blocks.11.hook_resid_post", ("resid_post", 11)), ("blocks.0.hook_resid_pre", ("resid_pre", 0)),
    ("blocks.4.attn.hook_z", ("attn.z", 4)), ("blocks.4.hook_attn_out", ("attn.out", 4)),
    ("model.layers.7", ("resid_post", 7)), ("layers.7.mlp", ("mlp.out", 7)),
    ("model.layers.7.post_attention_layernorm", ("mlp.norm", 7)), ("resid_post.3", ("resid_post", 3)),
    ("resid_post_layer_19", ("resid_post", 19)),
])
def test_hook_names(hook, place):
    assert site_of(hook) == place


@pytest.mark.parametrize("hook", ["blocks.1.mlp.hook_post", "transformer.h.3", "blocks.x.hook_resid_post", "logits.2"])
def test_other_hook_names_are_refused(hook):
    with pytest.raises(ExperimentError, match="no site here"):
        site_of(hook)


# edits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_change_of_nothing_changes_no_bit(tmp_path, tiny, architecture):
    sae = wb.load_sae(write(tmp_path, architecture))
    plain = tiny.run(IDS, capture="resid_post")
    dead = [i for i in range(F) if not sae.encode(plain.tensor("resid_post", 2))[:, i].any()]
    for edit in (sae.ablate([]), sae.steer(slice(None), scale=1.0), sae.steer([1, 2], add=0.0), sae.ablate(dead)):
        assert torch.equal(tiny.run(IDS, edits=edit).hidden, plain.hidden)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("how", "value"), [("scale", 0.0), ("scale", 3.0), ("add", -1.5), ("set", 2.0)])
def test_the_error_is_kept(tmp_path, tiny, architecture, how, value):
    sae = wb.load_sae(write(tmp_path, architecture))
    x = tiny.run(IDS, capture="resid_post").tensor("resid_post", 2)
    features = sae.encode(x)
    chosen = features.sum(0).topk(3).indices.tolist()
    changed = features.clone()
    changed[:, chosen] = {"scale": features[:, chosen] * value, "add": features[:, chosen] + value,
                          "set": torch.full_like(features[:, chosen], value)}[how]
    edit = sae.steer(chosen, **{how: value}, tokens=[1, 4])
    found = tiny.run(IDS, capture="resid_post", edits=edit).tensor("resid_post", 2)
    want = x.clone()
    want[[1, 4]] = (x - sae.decode(features) + sae.decode(changed))[[1, 4]]
    torch.testing.assert_close(found, want, atol=SITE_F32, rtol=1e-5)
    assert torch.equal(found[0], x[0])
    whole = sae.steer(chosen, **{how: value}, tokens=[1, 4], keep_error=False)
    bare = tiny.run(IDS, capture="resid_post", edits=whole).tensor("resid_post", 2)
    torch.testing.assert_close(bare[[1, 4]], sae.decode(changed)[[1, 4]], atol=SITE_F32, rtol=1e-5)


def test_features_of_heads_together(tmp_path, tiny):
    values = tensors("standard", width=128)  # 8 heads of 16
    sae = wb.load_sae(write(tmp_path, "standard", values, metadata={"hook_name": "blocks.1.attn.hook_z"}))
    z = tiny.run(IDS, capture="attn.z").tensor("attn.z", 1)
    features = sae.encode(z.flatten(1))
    best = int(features.sum(0).argmax())
    found = tiny.run(IDS, capture="attn.z", edits=sae.ablate(best)).tensor("attn.z", 1)
    want = z.flatten(1) - features[:, [best]] * values["W_dec"][best]
    torch.testing.assert_close(found.flatten(1), want, atol=SITE_F32, rtol=1e-5)


def test_the_edit_prints_compares_and_is_recorded(tmp_path, tiny):
    folder = write(tmp_path / "mine" / "layer_2", "topk")
    sae, same = wb.load_sae(folder), wb.load_sae(folder)
    assert repr(sae) == "<SAE mine/layer_2: topk 6, 40 features of resid_post.2>"
    assert repr(sae.ablate([3, 5])) == f"wb.steer_features({sae!r}, (3, 5), scale=0.0)"
    assert repr(sae.steer(-1, add=2, tokens=[1, 4], keep_error=False)) == \
        f"wb.steer_features({sae!r}, (39,), tokens=(1, 4), add=2.0, keep_error=False)"
    assert repr(sae.ablate(slice(None))) == f"wb.steer_features({sae!r}, <40 of 0 to 39>, scale=0.0)"
    edit = sae.ablate([3, 5])
    assert edit == same.ablate([3, 5]) == wb.steer_features(sae, [3, 5], scale=0.0)
    different = [sae.ablate([3, 6]), sae.steer([3, 5], set=0.0), sae.steer([3, 5], scale=0.5), sae.ablate(
        [3, 5], keep_error=False), sae.ablate([3, 5], tokens=1), another(tmp_path).ablate([3, 5])]
    assert len({edit, same.ablate([3, 5]), *different}) == 1 + len(different)
    record = tiny.run(IDS, edits=edit).provenance.edits[0]
    assert record["args"] == {"features": [3, 5], "scale": 0.0, "sae": {
        "sae": {"name": "mine/layer_2", "source": str(folder), "sha256": sae.digest}}}


def another(folder):
    """An SAE whose biases are those of the others, so that only a look at everything tells them apart."""
    values = tensors("topk")
    values["W_dec"][0, 0] += 1e-3
    return wb.load_sae(write(folder / "another", "topk", values))


HOW = st.sampled_from(["scale", "add", "set"])


@pytest.fixture(scope="module")
def saes(tmp_path_factory: pytest.TempPathFactory):
    base = tmp_path_factory.mktemp("saes")
    return {architecture: wb.load_sae(write(base / architecture, architecture)) for architecture in ARCHITECTURES}


@given(st.sampled_from(ARCHITECTURES), st.lists(st.integers(-F, F - 1), max_size=5), HOW, st.floats(-4, 4, width=32),
       st.none() | st.integers(-7, 6) | st.just(slice(1, None, 2)), st.booleans())
@settings(max_examples=60)
def test_json_and_back_is_equal_and_does_the_same(saes, tiny, architecture, features, how, value, tokens, keep_error):
    edit = saes[architecture].steer(features, **{how: value}, tokens=tokens, keep_error=keep_error)
    text = edit.to_json()
    json.loads(text, parse_constant=pytest.fail)
    for back in (wb.edit_from_json(text), wb.edit_from_json(text, sae=saes[architecture])):
        assert back == edit and hash(back) == hash(edit) and repr(back) == repr(edit) and back.to_json() == text
    assert torch.equal(tiny.run(IDS, edits=wb.edit_from_json(text)).hidden, tiny.run(IDS, edits=edit).hidden)


@given(st.sampled_from(ARCHITECTURES), st.lists(st.integers(0, F - 1), max_size=F), st.sampled_from([("scale", 1.0),
                                                                                                     ("add", 0.0)]))
@settings(max_examples=40)
def test_a_change_of_nothing_is_nothing_in_both_dtypes(saes, tiny, tiny_bf16, architecture, features, change):
    edit = saes[architecture].steer(features, **dict([change]))
    for model in (tiny, tiny_bf16):
        assert torch.equal(model.run(IDS, edits=edit).hidden, model.run(IDS).hidden)


def test_features_are_swept_as_in_a_loop(saes, tiny):
    edits = [saes["jumprelu"].steer(feature, scale=3.0, tokens=token) for feature in range(0, F, 9) for token in (2, 6)]
    metric = wb.logit_diff(7, 450)
    want = [float(metric.of(tiny, tiny.run(IDS, edits=edit).logits[-1:])) for edit in edits]
    found = wb.sweep(tiny, IDS, edits, metric)
    np.testing.assert_allclose(found, want, atol=SWEEP_F32)
    assert found["what"].values[0] == repr(edits[0]) and len({*want}) > 2
    part = wb.sweep(tiny, IDS, edits, metric, should_stop=lambda: True)
    again = [wb.edit_from_json(edit.to_json()) for edit in edits]  # another day
    np.testing.assert_array_equal(wb.sweep(tiny, IDS, again, metric, resume=part), found)


def test_another_sae_is_refused(tmp_path, tiny):
    folder = write(tmp_path / "mine", "topk")
    sae = wb.load_sae(folder)
    text, other = sae.ablate(3).to_json(), another(tmp_path)
    assert len(text) < 600, "the weights are not in it"

    def refused(said: str, **how) -> None:
        with pytest.raises(EditError, match=said) as caught:
            wb.edit_from_json(text, **how)
        assert len(str(caught.value).splitlines()) <= 6

    refused("not the SAE", sae=other)
    write(tmp_path / "mine", "topk", tensors("topk", seed=1))  # the folder holds another one now
    refused("not the SAE")
    shutil.rmtree(folder)
    refused("is not there")
    assert wb.edit_from_json(text, sae=sae) == sae.ablate(3)
    text = text.replace('"layer": 2', '"layer": 1')
    refused("no edit", sae=sae)
    text = text.replace('"layer": 1', '"layer": 2').replace('"scale": 0.0', '"scale": 0.0, "add": 1.0')
    refused("one way", sae=sae)
    text = wb.load_sae(write(tmp_path / "bare", "topk", metadata={}), site="mlp.out", layer=1).ablate(3).to_json()
    assert wb.edit_from_json(text).place.site == "mlp.out"  # where the files don't say, the edit does


def test_what_does_not_fit_is_told(tmp_path, tiny):
    sae = wb.load_sae(write(tmp_path, "standard", tensors("standard", width=32)))
    with pytest.raises(EditError, match="another width"):
        tiny.run(IDS, edits=sae.ablate(1))
    with pytest.raises(ExperimentError, match="another width"):
        sae.encode(torch.zeros(D))
    with pytest.raises(ExperimentError, match="no such feature"):
        sae.ablate(F)
    with pytest.raises(EditError, match="one way"):
        sae.steer(1, scale=2.0, add=1.0)
    with pytest.raises(EditError, match="finite"):
        sae.steer(1, add=float("nan"))


# files ----------------------------------------------------------------------------------------------------------


def without(name: str) -> dict[str, torch.Tensor]:
    values = tensors("jumprelu")
    del values[name]
    return values


@pytest.mark.parametrize(("values", "config", "error", "said"), [
    (without("threshold"), {}, CheckpointError, "lacks a tensor"),
    ({**tensors("jumprelu"), "W_skip": torch.zeros(D, D)}, {}, CheckpointError, "not understood"),
    ({**tensors("jumprelu"), "b_enc": torch.zeros(F + 1)}, {}, CheckpointError, "another shape"),
    ({**tensors("jumprelu"), "W_dec": torch.zeros(D, F)}, {}, CheckpointError, "another shape"),
    ({**tensors("jumprelu"), "b_dec": torch.full((D,), float("nan"))}, {}, CheckpointError, "no number"),
    ({**tensors("jumprelu"), "b_enc": torch.zeros(F, dtype=torch.int32)}, {}, CheckpointError, "another kind"),
    ({**tensors("jumprelu"), "scaling_factor": torch.full((F,), 2.0)}, {}, CheckpointError, "not understood"),
    (None, {"architecture": "transcoder"}, CheckpointError, "not understood"),
    (None, {"architecture": "topk", "k": 0, "activation_fn": "tanh-relu"}, CheckpointError, "not understood"),
    (None, {"normalize_activations": "expected_average_only_in"}, CheckpointError, "not understood"),
    (None, {"rescale_acts_by_decoder_norm": True}, CheckpointError, "not understood"),
    (None, {"d_in": "64"}, CheckpointError, "no sizes"),
    (None, {"metadata": {"hook_name": "blocks.1.hook_q"}}, ExperimentError, "no site here"),
    (None, {"metadata": {}}, ExperimentError, "don't say"),
    (None, {"hook_head_index": 3}, CheckpointError, "not understood"),
])
def test_odd_files_are_refused(tmp_path, values, config, error, said):
    with pytest.raises(error, match=said) as found:
        wb.load_sae(write(tmp_path, "jumprelu", values, **config))
    assert len(str(found.value).splitlines()) <= 6


def test_files_that_are_not_there_or_damaged(tmp_path):
    with pytest.raises(MissingShard, match="no SAE"):
        wb.load_sae(tmp_path)
    with pytest.raises(ModelNotFound, match="no such folder"):
        wb.load_sae(tmp_path / "nowhere")
    folder = write(tmp_path / "one", "standard")
    weights = folder / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="can't be read"):
        wb.load_sae(folder)
    weights.unlink()
    with pytest.raises(MissingShard, match="weights"):
        wb.load_sae(folder)
    (folder / "cfg.json").write_text("{")
    with pytest.raises(CheckpointError, match="can't be read"):
        wb.load_sae(folder)


def test_the_place_can_be_given_and_must_agree(tmp_path):
    folder = write(tmp_path, "standard", metadata={})
    assert wb.load_sae(folder, site="mlp.out", layer=1).site == "mlp.out"
    with pytest.raises(ExperimentError, match="another place"):
        wb.load_sae(write(tmp_path, "standard"), layer=1)


def test_bfloat16_files_are_widened(tmp_path):
    values = {name: tensor.bfloat16() for name, tensor in tensors("standard").items()}
    sae = wb.load_sae(write(tmp_path, "standard", values))
    assert sae.w_enc.dtype == torch.float32 and torch.equal(sae.w_enc, values["W_enc"].float())
    x = torch.ones(D, dtype=torch.bfloat16)
    torch.testing.assert_close(sae.encode(x), sae.encode(x.float()), atol=PARTS_F32, rtol=0)


def test_a_folder_of_a_repository_is_fetched_alone(tmp_path, monkeypatch):
    import huggingface_hub

    write(tmp_path / "layer_2" / "trainer_0", "standard")
    asked = []

    def fetched(name, **options):
        asked.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    assert wb.load_sae("somebody/saes/layer_2/trainer_0", revision="abc").name == "layer_2/trainer_0"
    ((name, options),) = asked
    assert name == "somebody/saes" and options["revision"] == "abc"
    assert all(pattern.startswith("layer_2/trainer_0/") for pattern in options["allow_patterns"])
    with pytest.raises(ModelNotFound, match="no such folder"):
        wb.load_sae("somebody/saes/layer_9")
