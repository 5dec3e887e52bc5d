"""The forward pass against transformers, the published code's equal (measured to 2.4e-6 in float32)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import gptoss_workbench as wb
from gptoss_kernels import reference
from tests.factories import tiny_model, write_hf, write_hf_bf16, write_original
from tests.oracle import transformers_model
from tests.tolerances import BF16_SUBLAYER, SITE_F32, TINY_LOGITS_F32

T = 60  # more than seven sliding windows

SHAPES = {
    "default": {},
    "one kv head": {"num_key_value_heads": 1},
    "groups equal kv heads": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    "both clamps bite": {"swiglu_limit": 0.3},
    "window 1": {"sliding_window": 1},
    "full first": {"layer_types": ["full_attention", "sliding_attention"] * 2},
    "top 2 of 4": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def prompt(seed: int, length: int = T, vocab: int = 512) -> list[int]:
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("tiny"), tiny_model(seed=1))


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hf", tiny_model(seed=3, **SHAPES[name]))
    ids = prompt(7)
    ours = wb.load(folder, dtype="float32").run(ids).logits
    with torch.no_grad():
        theirs = transformers_model(folder)(torch.tensor([ids])).logits[0]
    assert (ours - theirs).abs().max() < TINY_LOGITS_F32


def test_the_clamp_config_clamps(tmp_path: Path) -> None:
    """Else the case above would prove nothing: gates above and linear parts beyond both limits occur."""
    model = wb.load(write_hf(tmp_path / "hf", tiny_model(seed=3, **SHAPES["both clamps bite"])), dtype="float32")
    data = model.run(prompt(7), capture=["expert.gate", "expert.up"]).data
    assert float((data["expert.gate"] > 0.3).mean()) > 0.01
    assert float((data["expert.up"] > 0.3).mean()) > 0.01
    assert float((data["expert.up"] < -0.3).mean()) > 0.01


@pytest.mark.parametrize("write", [write_hf_bf16, write_original])
def test_every_layout_computes_the_same(write, folder: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other", tiny_model(seed=1))
    ids = prompt(2)
    one, two = (wb.load(f, dtype="float32").run(ids).logits for f in (folder, other))
    torch.testing.assert_close(one, two, rtol=0, atol=TINY_LOGITS_F32)


def test_sites_equal_transformers(folder: Path) -> None:
    """Each site that transformers can show: residuals, attention, router, sublayer outputs."""
    ids = prompt(5)
    theirs = transformers_model(folder)
    seen: dict[str, list[Tensor]] = {name: [] for name in ("router", "attn.out", "mlp.out", "attn.norm", "mlp.norm")}

    def keep(name: str):
        def hook(module, inputs, output) -> None:
            seen[name].append((output[0] if isinstance(output, tuple) else output).detach())
        return hook

    for layer in theirs.model.layers:
        layer.mlp.router.register_forward_hook(keep("router"))
        layer.self_attn.register_forward_hook(keep("attn.out"))
        layer.mlp.register_forward_hook(keep("mlp.out"))
        layer.input_layernorm.register_forward_hook(keep("attn.norm"))
        layer.post_attention_layernorm.register_forward_hook(keep("mlp.norm"))
    with torch.no_grad():
        out = theirs(torch.tensor([ids]), output_hidden_states=True, output_attentions=True)

    run = wb.load(folder, dtype="float32").run(
        ids, capture=["resid", "embed", "attn.pattern", "router", "attn.out", "mlp.out", "attn.norm", "mlp.norm",
                      "final_norm"])
    def close(a: Tensor, b: Tensor) -> None:
        torch.testing.assert_close(a, b, rtol=0, atol=SITE_F32)

    close(run.tensor("embed"), out.hidden_states[0][0])
    close(run.tensor("final_norm"), out.hidden_states[-1][0])  # theirs is after the last norm
    for layer in range(4):
        close(run.tensor("resid_pre", layer), out.hidden_states[layer][0])
        close(run.tensor("attn.pattern", layer)[..., :-1], out.attentions[layer][0])
        for site in ("attn.out", "mlp.out", "attn.norm", "mlp.norm"):
            close(run.tensor(site, layer), seen[site][layer].view(T, -1))
        w = theirs.model.layers[layer].mlp.router
        close(run.tensor("router.logits", layer), run.tensor("mlp.norm", layer) @ w.weight.T + w.bias)


def test_yarn_frequencies_are_bit_equal() -> None:
    from transformers import GptOssConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for truncate in (False, True):
        for size in (16, 32, 64):
            rope = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
                    "original_max_position_embeddings": 4096, "truncate": truncate}
            config = GptOssConfig(head_dim=size, rope_parameters=dict(rope))
            theirs, concentration = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
            ours, ours_concentration = reference.yarn_frequencies(size, 150000.0, 32.0, 32.0, 1.0, 4096, truncate)
            assert torch.equal(ours, theirs)
            assert ours_concentration == concentration


def test_yarn_constants_by_hand() -> None:
    """The published figures: no rounding of the ramp, concentration 0.1 ln 32 + 1."""
    frequencies, concentration = reference.yarn_frequencies(64, 150000.0, 32.0, 32.0, 1.0, 4096, False)
    assert concentration == pytest.approx(1.3465735902799727, abs=1e-15)
    low, high = 8.092779115512402, 17.39802450158856
    for i in (0, 8, 9, 13, 17, 18, 31):
        fast = 150000.0 ** (-2 * i / 64)
        ramp = min(max((i - low) / (high - low), 0.0), 1.0)
        assert float(frequencies[i]) == pytest.approx(fast / 32 * ramp + fast * (1 - ramp), rel=1e-6)


def test_bf16_sublayers_follow_float32(folder: Path) -> None:
    """Whole-model bfloat16 proves nothing on random weights (routes flip); each sublayer from the same input does.

    Float32 routes are replayed and every layer starts from the float32 residual, rounded once.
    """
    ids = prompt(11)
    sites = ["resid_pre", "resid_mid", "router", "attn.out", "mlp.out"]
    exact = wb.load(folder, dtype="float32").run(ids, capture=sites)
    rounded = wb.load(folder, dtype="bfloat16")
    for layer in range(4):
        teacher = [wb.patch("resid_pre", exact, layer=layer), wb.patch("resid_mid", exact, layer=layer),
                   wb.replay_routes(exact, layer=layer)]
        run = rounded.run(ids, capture=["attn.out", "mlp.out"], edits=teacher)
        for site in ("attn.out", "mlp.out"):
            want, got = exact.tensor(site, layer), run.tensor(site, layer).float()
            assert (got - want).norm() / want.norm() < BF16_SUBLAYER, (site, layer)


def test_bf16_stays_bf16_and_norms_stay_float32(folder: Path) -> None:
    model = wb.load(folder)
    assert model.dtype == "bfloat16"
    assert model.weights.final_norm.dtype == torch.float32
    run = model.run(prompt(1), capture=list(wb.SITES))
    floats = {site: run.tensor(site).dtype for site in wb.SITES if site != "router.experts"}
    assert set(floats.values()) == {torch.bfloat16}, floats
