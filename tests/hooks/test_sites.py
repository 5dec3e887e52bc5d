"""Every site shows what the model computes: against transformers, and against its neighbours worked out anew.

For a prompt, a batch padded on the left, and a generation with a cache; in float32 and bfloat16.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import gptoss_workbench as wb
from gptoss_kernels.mxfp4 import Mxfp4Tensor
from gptoss_workbench.hooks.sites import SITES
from tests.factories import unpack
from tests.oracle import transformers_model
from tests.parity.theirs import trace
from tests.tolerances import SITE_F32, STEP_BF16, STEP_F32

LONG = torch.randint(512, (34,), generator=torch.Generator().manual_seed(12)).tolist()


def ways(model) -> dict[str, list[tuple[list[int], object]]]:
    """(ids that were read, run with every site) of each prompt, in the three ways to read."""
    prompts = [LONG, LONG[4:9], LONG[::-1][:20]]
    gens = model.generate([LONG[:12], LONG[:5]], capture=list(SITES), max_tokens=9, stop=[])
    for gen in gens:
        gen.finish()
    batch = model.run(prompts, capture=list(SITES))
    return {
        "prompt": [(LONG, model.run(LONG, capture=list(SITES)))],
        "padded batch": list(zip(prompts, batch, strict=True)),
        "generation": [(gen.ids[:-1], gen.run()) for gen in gens],
    }


@pytest.fixture(scope="module")
def read(small, small_bf16):
    return {"float32": ways(small), "bfloat16": ways(small_bf16)}


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers_model(folder)


@pytest.mark.parametrize("way", ["prompt", "padded batch", "generation"])
def test_every_site_equals_transformers(way: str, read, theirs) -> None:
    for ids, run in read["float32"][way]:
        other = trace(theirs, ids)
        for site in SITES:
            for layer in range(4) if SITES[site].per_layer else [None]:
                ours, wanted = run.tensor(site, layer), other.tensor(site, layer)
                if site == "router.experts":
                    assert torch.equal(ours, wanted)
                else:
                    torch.testing.assert_close(ours, wanted.view(ours.shape), rtol=0, atol=SITE_F32, msg=site)


def norm(x: Tensor, scale: Tensor) -> Tensor:
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * scale.double()


def rotate(x: Tensor) -> Tensor:
    """YaRN by complex numbers: (token, head, 16) at positions 0, 1, ... for the constants of the tiny model."""
    half = x.shape[-1] // 2
    low, high = (half * math.log(4096 / (turns * 2 * math.pi)) / math.log(150000) for turns in (32, 1))
    pairs = torch.arange(half, dtype=torch.float64)
    keep = 1 - ((pairs - max(low, 0)) / (min(high, x.shape[-1] - 1) - max(low, 0))).clamp(0, 1)
    frequency = 150000 ** (-pairs / half) * (keep + (1 - keep) / 32)
    angle = torch.arange(len(x), dtype=torch.float64)[:, None, None] * frequency
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), -1) * (0.1 * math.log(32) + 1)


def dense(weight: Tensor | Mxfp4Tensor) -> Tensor:
    return unpack(weight.blocks, weight.scales).double() if isinstance(weight, Mxfp4Tensor) else weight.double()


def anew(run, site: str, layer: int | None, weights) -> Tensor:
    """A site from the captured sites right before it and the weights, in float64, by formulas of this file's own."""
    def of(name: str, at: int | None = layer) -> Tensor:
        values = run.tensor(name, at)
        return values if values.dtype == torch.int64 else values.double()

    if layer is None:
        last = len(weights.layers) - 1
        return {"embed": lambda: weights.embed[run.ids[:len(run.positions)]].double(),
                "final_norm": lambda: norm(of("resid_post", last), weights.final_norm),
                "logits": lambda: of("final_norm") @ weights.unembed.double().T}[site]()
    w = weights.layers[layer]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ getattr(w, f"{name}_weight").double().T + getattr(w, f"{name}_bias").double()

    def per_slot(x: Tensor, weight: Tensor | Mxfp4Tensor, bias: Tensor) -> Tensor:
        matrices, experts = dense(weight), of("router.experts")
        rows = [[matrices[e] @ (x[t] if x.dim() == 2 else x[t, s]) + bias[e].double() for s, e in enumerate(chosen)]
                for t, chosen in enumerate(experts.tolist())]
        return torch.stack([torch.stack(row) for row in rows])

    def scores() -> Tensor:
        q, k = of("attn.q"), of("attn.k").repeat_interleave(4, dim=1)
        raw = torch.einsum("qhd,khd->hqk", q, k) / 4
        back = torch.arange(len(q))[:, None] - torch.arange(len(q))
        return raw.masked_fill((back < 0) | ((back >= 8) if layer % 2 == 0 else (back < 0)), -math.inf)

    def pattern() -> Tensor:
        s = of("attn.scores")
        sink = w.sinks.double()[:, None, None].expand(-1, s.shape[1], 1)
        powers = torch.cat((s, sink), -1).exp()
        return powers / powers.sum(-1, keepdim=True)

    def gate_up(part: int) -> Tensor:
        return per_slot(of("mlp.norm"), w.gate_up, w.gate_up_bias)[..., part::2]

    def act() -> Tensor:
        gate, up = of("expert.gate").clamp(max=7), of("expert.up").clamp(-7, 7)
        return gate / (1 + (-1.702 * gate).exp()) * (up + 1)

    heads = (len(run.positions), -1, 16)
    return {
        "resid_pre": lambda: of("embed", None) if layer == 0 else of("resid_post", layer - 1),
        "attn.norm": lambda: norm(of("resid_pre"), w.attn_norm),
        "attn.q": lambda: rotate(linear(of("attn.norm"), "q").view(heads)),
        "attn.k": lambda: rotate(linear(of("attn.norm"), "k").view(heads)),
        "attn.v": lambda: linear(of("attn.norm"), "v").view(heads),
        "attn.scores": scores,
        "attn.pattern": pattern,
        "attn.z": lambda: torch.einsum("hqk,khd->qhd", of("attn.pattern")[..., :-1],
                                       of("attn.v").repeat_interleave(4, dim=1)),
        "attn.out": lambda: linear(of("attn.z").flatten(1), "o"),
        "resid_mid": lambda: of("resid_pre") + of("attn.out"),
        "mlp.norm": lambda: norm(of("resid_mid"), w.mlp_norm),
        "router.logits": lambda: linear(of("mlp.norm"), "router"),
        "router.experts": lambda: of("router.logits").argsort(dim=-1, descending=True)[:, :4],
        "router.weights": lambda: torch.softmax(of("router.logits").gather(-1, of("router.experts")), -1),
        "expert.gate": lambda: gate_up(0),
        "expert.up": lambda: gate_up(1),
        "expert.act": act,
        "expert.out": lambda: per_slot(of("expert.act"), w.down, w.down_bias),
        "mlp.out": lambda: (of("expert.out") * of("router.weights")[..., None]).sum(1),
        "resid_post": lambda: of("resid_mid") + of("mlp.out"),
    }[site]()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", ["prompt", "padded batch", "generation"])
def test_every_site_follows_from_its_neighbours(way: str, dtype: str, read, small, small_bf16) -> None:
    """One step of the computation at a time, so that bfloat16 rounds once or twice and can be held tightly."""
    weights = (small if dtype == "float32" else small_bf16).weights
    limit = STEP_F32 if dtype == "float32" else STEP_BF16
    for ids, run in read[dtype][way]:
        assert run.ids == ids
        for site in SITES:
            for layer in range(4) if SITES[site].per_layer else [None]:
                found, wanted = run.tensor(site, layer), anew(run, site, layer, weights)
                if site == "router.experts":  # equal logits occur in bfloat16; their order does not matter
                    logits = run.tensor("router.logits", layer)
                    assert torch.equal(logits.gather(-1, found), logits.gather(-1, wanted))
                    continue
                if site == "attn.scores":
                    assert torch.equal(found.isinf(), wanted.isinf())
                    found, wanted = found.nan_to_num(neginf=0), wanted.nan_to_num(neginf=0)
                error = (found.double() - wanted).norm() / wanted.norm()
                assert error < limit, f"{site} of layer {layer}, {len(run.ids)} tokens: {error:.2g}"


def test_looking_changes_nothing(small, small_bf16) -> None:
    """Bit for bit, in each of the three ways."""
    for model in (small, small_bf16):
        plain, watched = (ways_hidden(model, capture) for capture in (None, [*SITES, *wb.POOLED]))
        assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


def ways_hidden(model, capture) -> list[Tensor]:
    gens = model.generate([LONG[:12], LONG[:5]], capture=capture, max_tokens=9, stop=[])
    runs = [model.run(LONG, capture=capture), *model.run([LONG, LONG[:9]], capture=capture)]
    return [run.hidden for run in [*runs, *(gen.finish().run() for gen in gens)]]
