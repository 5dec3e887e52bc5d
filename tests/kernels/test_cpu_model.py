"""A whole model on the CPU kernels: every site as on the reference, one token at a time as all at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import gptoss_workbench as wb
from gptoss_kernels.cpu import packing, paths
from gptoss_workbench.errors import NotEnoughMemory, WorkbenchError
from gptoss_workbench.model.model import Model
from gptoss_workbench.model.packed import matrices
from tests.factories import tiny_model, write_hf
from tests.tolerances import BF16_SUBLAYER, SITE_F32, TINY_LOGITS_F32

IDS = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32, 79, 50, 28]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("tiny"), tiny_model())


def on(kernels: str, folder: Path, dtype: str) -> Model:
    return wb.load(folder, dtype=dtype, kernels=kernels)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    bits = torch.int16 if one.dtype == torch.bfloat16 else torch.int32
    return torch.equal(one.contiguous().view(bits), other.contiguous().view(bits))


def test_every_site_in_float32(folder: Path) -> None:
    ours, theirs = (on(kernels, folder, "float32").run(IDS, capture=list(wb.SITES)) for kernels in ("cpu", "reference"))
    for name in theirs.data:
        got, wanted = (torch.tensor(run.data[name].values) for run in (ours, theirs))
        torch.testing.assert_close(got, wanted, rtol=0, atol=SITE_F32, equal_nan=True,
                                   msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=TINY_LOGITS_F32)


def test_one_token_at_a_time_in_float32(folder: Path) -> None:
    model = on("cpu", folder, "float32")
    whole = model.run(IDS)
    parts = model.run(IDS, chunk=1)
    torch.testing.assert_close(parts.logits, whole.logits, rtol=0, atol=TINY_LOGITS_F32)


@pytest.mark.parametrize("chunk", [None, 1], ids=["at once", "one token at a time"])
def test_each_sublayer_in_bfloat16(folder: Path, chunk: int | None) -> None:
    """From the reference's input of each sublayer: what both add to the residual stream."""
    edits = []
    theirs = on("reference", folder, "bfloat16").run(IDS, capture=["resid_pre", "resid_mid", "attn.out", "mlp.out",
                                                                "router.experts"])
    for layer in range(theirs.data.sizes["layer"]):
        edits += [wb.patch("resid_pre", theirs, layer=layer), wb.patch("resid_mid", theirs, layer=layer)]
    ours = on("cpu", folder, "bfloat16").run(IDS, capture=["attn.out", "mlp.out", "router.experts"], edits=edits,
                                           chunk=chunk)
    same = torch.tensor((ours.data["router.experts"].values == theirs.data["router.experts"].values).all(-1))
    assert same.float().mean() > 0.9
    for name in ("attn.out", "mlp.out"):
        got, wanted = (torch.tensor(run.data[name].values).float() for run in (ours, theirs))
        off = (got - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        assert off[same].max() < BF16_SUBLAYER / 2, name


@pytest.mark.parametrize("chunk", [None, 1], ids=["at once", "one token at a time"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernels", ["cpu", "reference"])
def test_looking_changes_no_bit(folder: Path, kernels: str, dtype: str, chunk: int | None) -> None:
    """Fused where nobody looks, in pieces where somebody does; edits that change nothing take the pieces too."""
    model = on(kernels, folder, dtype)
    plain = model.run(IDS, chunk=chunk)
    for site in wb.SITES:
        seen = model.run(IDS, capture=site, chunk=chunk)
        assert same_bits(seen.hidden, plain.hidden), site
    every = model.run(IDS, capture=[*wb.SITES, *wb.POOLED], chunk=chunk)
    assert same_bits(every.hidden, plain.hidden)
    nothing = [wb.scale(site, 1.0) for site in wb.SITES if site not in ("router.experts", "logits")]
    edited = model.run(IDS, capture=list(wb.SITES), edits=nothing, chunk=chunk)
    assert same_bits(edited.hidden, plain.hidden)
    for site in edited.data:
        assert np.array_equal(every.data[site], edited.data[site], equal_nan=True), site


EDITS = {
    "router": lambda: [wb.add("router.logits", layer=1, expert=3, value=100.0),
                       wb.ban_experts(layer=2, experts=[0, 5])],
    "attention": lambda: [wb.cut_attention(layer=1, query=[9, 12], key=[4]), wb.scale_sink(0.0, layer=0)],
    "experts": lambda: [wb.scale("expert.act", 0.5, layer=1), wb.zero("expert.out", layer=2, tokens=7),
                        wb.add("expert.gate", 1.0, layer=3)],
    "residual": lambda: [wb.scale("resid_mid", 1.5, layer=0), wb.zero("attn.out", layer=2, tokens=[3, 4]),
                         wb.scale("resid_post", 0.9, layer=3), wb.scale("mlp.norm", 1.1, layer=1)],
    "heads": lambda: [wb.zero("attn.z", layer=1, head=2), wb.scale("attn.q", 2.0, layer=0, head=5)],
}


@pytest.mark.parametrize("which", EDITS)
def test_edits_do_the_same_as_on_the_reference(folder: Path, which: str) -> None:
    ours, theirs, untouched = (on(kernels, folder, "float32").run(IDS, edits=EDITS[which]() if edited else ())
                               for kernels, edited in (("cpu", True), ("reference", True), ("reference", False)))
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=TINY_LOGITS_F32)
    assert (theirs.logits - untouched.logits).abs().max() > 100 * TINY_LOGITS_F32


def test_generation_on_the_reference_and_here(folder: Path) -> None:
    made = {kernels: on(kernels, folder, "float32").generate(IDS, capture=["router", "attn.pattern"], max_tokens=12,
                                                             stop=[]) for kernels in ("cpu", "reference")}
    assert made["cpu"].tokens == made["reference"].tokens
    plain = on("cpu", folder, "float32").generate(IDS, max_tokens=12, stop=[])
    assert plain.tokens == made["cpu"].tokens
    assert [step.logprob for step in plain.steps] == [step.logprob for step in made["cpu"].steps]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recorded_and_step_by_step_are_the_same_bits(folder: Path, dtype: str) -> None:
    pytest.importorskip("numba")
    model = on("cpu", folder, dtype)
    edits = [wb.scale("resid_mid", 1.25, layer=1), wb.ban_experts(layer=2, experts=[1, 3])]
    for prompt in (IDS, [IDS, IDS[:7]]):
        plain, played = (model.generate(prompt, capture=list(wb.SITES), edits=edits, max_tokens=8, stop=[], graph=graph)
                         for graph in (False, True))
        for one, other in zip(plain, played, strict=True) if isinstance(plain, list) else [(plain, played)]:
            assert one.tokens == other.tokens and other.decoding == "recorded"
            assert [step.logprob for step in one.steps] == [step.logprob for step in other.steps]
            assert same_bits(one.run().hidden, other.run().hidden)
            for site in one.data:
                assert np.array_equal(one.data[site], other.data[site], equal_nan=True), site


def test_packed_matrices(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Read by decoding alone, and by decoding that has begun only from the next recording on."""
    pytest.importorskip("numba")
    if paths.why_not("avx2"):
        pytest.skip("needs AVX2")
    model, plain = on("cpu", folder, "bfloat16"), on("cpu", folder, "bfloat16")
    held = model.pack()
    whole = sum(one.nbytes for one in matrices(model.weights))
    assert 0.74 * whole < held < 0.9 * whole  # small matrices have their tables and places too
    assert model.pack() == held and not capsys.readouterr().out
    for graph in (True, False):
        one, other = (each.generate(IDS, max_tokens=12, stop=[], graph=graph).finish() for each in (model, plain))
        off = (one.run().hidden.float() - other.run().hidden.float()).norm() / other.run().hidden.float().norm()
        assert one.tokens[0] == other.tokens[0] and off < BF16_SUBLAYER
    for weight in matrices(model.weights):
        packing.of(weight).records.zero_()  # type: ignore[union-attr]
    spoilt = model.generate(IDS, max_tokens=12, stop=[]).finish().run()
    assert same_bits(spoilt.hidden[:len(IDS)], plain.run(IDS).hidden)
    assert not same_bits(spoilt.hidden, other.run().hidden)


@pytest.mark.parametrize(("kernels", "dtype"), [("reference", "bfloat16"), ("cpu", "float32")])
def test_what_can_not_be_packed(folder: Path, kernels: str, dtype: str) -> None:
    with pytest.raises(WorkbenchError, match=f"{dtype}, {kernels} kernels"):
        on(kernels, folder, dtype).pack()


def test_no_room_for_packed_matrices(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptoss_workbench.model.packed.available", lambda: 1000)
    with pytest.raises(NotEnoughMemory, match="do not fit"):
        on("cpu", folder, "bfloat16").pack()


def test_what_computes_is_chosen_and_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPTOSS_KERNELS", raising=False)
    for dtype, name in (("bfloat16", "cpu"), ("float32", "reference")):
        model = wb.load(folder, dtype=dtype)
        assert model.transformer.kernels.name == name and model.provenance.kernels == name
        assert f"kernels: {name}" in repr(model)
    assert on("cpu", folder, "float32").provenance.kernels == "cpu"
    monkeypatch.setenv("GPTOSS_KERNELS", "reference")
    assert wb.load(folder, dtype="bfloat16").provenance.kernels == "reference"
    monkeypatch.setenv("GPTOSS_KERNELS", "fast")
    with pytest.raises(WorkbenchError, match="GPTOSS_KERNELS"):
        wb.load(folder)
    for wrong in ("fast", "triton"):
        with pytest.raises(WorkbenchError, match=f"'{wrong}'") as caught:
            wb.load(folder, dtype="bfloat16", kernels=wrong)
        assert len(str(caught.value).splitlines()) <= 6
