"""Is it right on this device? Every kernel at the published widths, whole layers, and recordings."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import gptoss_workbench as wb
from gptoss_kernels import reference
from gptoss_workbench.model.config import ModelConfig
from gptoss_workbench.model.model import Model
from gptoss_workbench.model.weights import LayerWeights
from tests.gpu.shapes import Maker
from tests.tolerances import BF16_SUBLAYER, FULL_SHAPE_L2

ROOT = Path(__file__).resolve().parents[2]
FILES = [str(ROOT / "tests" / "kernels" / "specification" / f"{name}.py") for name in ("rows", "experts", "attention")]
TOKENS = (1, 2, 4, 5, 64, 500)
CONTEXTS = (1, 127, 128, 129, 511, 512, 513, 4000)


class Wrong(AssertionError):
    """Something computes wrongly on this device."""


def off(got: Tensor, want: Tensor) -> float:
    """Relative L2 of a difference; infinite where one is finite and the other is not."""
    a, b = got.double(), want.double()
    if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    there = b.isfinite()
    return float((a - b)[there].norm() / b[there].norm().clamp(min=1e-30))


def kernels(c: ModelConfig, ours: ModuleType, device: torch.device, dry: bool) -> dict[str, float]:
    """The largest relative L2 error of each kernel against the reference, over numbers of tokens and of keys.

    Raises:
        Wrong: one is beyond ``FULL_SHAPE_L2``, or a fused form has other bits than its pieces.
    """
    maker = Maker(device, seed=1)
    w = maker.layer(c)
    worst: dict[str, float] = {}

    def note(name: str, got: Tensor, want: Tensor) -> None:
        worst[name] = max(worst.get(name, 0.0), off(got, want))

    for tokens in (1, 5) if dry else TOKENS:
        _tokens(c, ours, maker, w, tokens, note)
    for keys in (20,) if dry else CONTEXTS:
        for tokens in (1, min(keys, 17)):
            _attention(c, ours, maker, w, tokens, keys, note)
    wrong = {name: value for name, value in worst.items() if not value <= FULL_SHAPE_L2}
    if wrong:
        raise Wrong(f"beyond {FULL_SHAPE_L2}: {wrong}")
    return worst


def _tokens(
    c: ModelConfig, ours: ModuleType, maker: Maker, w: LayerWeights, tokens: int,
    note: Callable[[str, Tensor, Tensor], None],
) -> None:
    eps, k = c.rms_norm_eps, c.num_experts_per_tok
    x, delta = (maker.normal(1, tokens, c.hidden_size, scale=1.0) for _ in range(2))
    for got, want in zip(ours.add_norm(x, delta, w.mlp_norm, eps), reference.add_norm(x, delta, w.mlp_norm, eps)):
        note("add_norm", got, want)
    total, normed = ours.add_norm(x, delta, w.mlp_norm, eps)
    _bits("add_norm", normed, ours.rms_norm(total, w.mlp_norm, eps))
    positions = torch.arange(tokens, device=x.device)[None] + 1000
    frequencies = torch.logspace(0, -4, c.head_dim // 2, device=x.device)
    cos, sin = reference.rope_tables(positions, frequencies, 1.3, x.dtype)
    maps = (w.q_weight, w.q_bias), (w.k_weight, w.k_bias), (w.v_weight, w.v_bias)
    for got, want in zip(ours.project_qkv(x, *maps, cos, sin), reference.project_qkv(x, *maps, cos, sin)):
        note("project_qkv", got, want)
    note("linear", ours.linear(x, w.router_weight, w.router_bias), reference.linear(x, w.router_weight, w.router_bias))
    # Routes are compared on logits without ties, whose order torch leaves open.
    logits = torch.stack([torch.randperm(c.num_local_experts) for _ in range(tokens)]).to(x) / 8
    chosen, weights = ours.route(logits, k)
    if not torch.equal(chosen, reference.choose_experts(logits, k)):
        raise Wrong("route chooses other experts")
    note("route", weights, reference.expert_weights(logits, chosen))
    rows = x[0]
    what = rows, chosen, weights, w.gate_up, w.gate_up_bias, w.down, w.down_bias, c.swiglu_alpha, c.swiglu_limit
    fused = ours.expert_mixture(*what)
    note("expert_mixture", fused, reference.expert_mixture(*what))
    gate_up = ours.expert_linear(rows, chosen, w.gate_up, w.gate_up_bias)
    note("expert_linear", gate_up, reference.expert_linear(rows, chosen, w.gate_up, w.gate_up_bias))
    gate, up = reference.split_gate_up(gate_up)
    act = ours.swiglu(gate, up, c.swiglu_alpha, c.swiglu_limit)
    note("swiglu", act, reference.swiglu(gate, up, c.swiglu_alpha, c.swiglu_limit))
    pieces = ours.combine_experts(ours.expert_linear(act, chosen, w.down, w.down_bias), weights)
    _bits("expert_mixture", fused, pieces)
    if tokens <= 5:
        y, pull = rows.clone().requires_grad_(), torch.ones_like(gate_up)
        slopes = [torch.autograd.grad(room.expert_linear(y, chosen, w.gate_up, w.gate_up_bias), y, pull)[0]
                  for room in (ours, reference)]
        note("gradient of expert_linear", *slopes)


def _attention(
    c: ModelConfig, ours: ModuleType, maker: Maker, w: LayerWeights, tokens: int, keys: int,
    note: Callable[[str, Tensor, Tensor], None],
) -> None:
    q = maker.normal(1, tokens, c.num_attention_heads, c.head_dim, scale=1.0)
    k, v = (maker.normal(1, keys + 3, c.num_key_value_heads, c.head_dim, scale=1.0) for _ in range(2))
    at = torch.arange(keys + 3, device=q.device)[None]  # the last three columns are not filled yet
    for window in (None, c.sliding_window):
        what = q, k, v, w.sinks, at[:, keys - tokens:keys], at, window
        z, scores, pattern = ours.attention_shown(*what)
        _bits("attention", ours.attention(*what), z)
        for name, got, want in zip(("attention", "scores", "pattern"), (z, scores, pattern),
                                   reference.attention_shown(*what)):
            note(name, got, want)


def _bits(name: str, fused: Tensor, pieces: Tensor) -> None:
    if not torch.equal(fused, pieces):
        raise Wrong(f"{name} has other bits when a hook looks inside: {off(fused, pieces):.1e} off")


def layers(model: Model, ids: list[int]) -> dict[str, float]:
    """Each sublayer from the reference's input and with its routes: relative L2 of what it adds to the stream.

    Raises:
        Wrong: beyond ``BF16_SUBLAYER``.
    """
    theirs = Model(model.config, model.weights, name="reference", kernels=reference)
    want = theirs.run(ids, capture=["resid_pre", "resid_mid", "attn.out", "mlp.out", "router.experts"])
    edits = [wb.patch("resid_pre", want), wb.patch("resid_mid", want), wb.replay_routes(want)]
    got = model.run(ids, capture=["attn.out", "mlp.out"], edits=edits)
    found = {site: max(off(a, b) for a, b in zip(got.tensor(site), want.tensor(site))) for site in
             ("attn.out", "mlp.out")}
    if max(found.values()) > BF16_SUBLAYER:
        raise Wrong(f"beyond {BF16_SUBLAYER}: {found}")
    return found


def recordings(model: Model, ids: list[int], tokens: int, dry: bool) -> dict[str, str]:
    """Generations by a recording against those step by step: the same tokens and captures.

    Raises:
        Wrong: they differ by more than another order of sums explains.
    """
    vector = torch.ones(model.config.hidden_size, device=model.device)
    plans: dict[str, Any] = {
        "nothing": {}, "captures": {"capture": ["resid", "router"]},
        "edits": {"capture": "resid_post", "edits": [wb.steer("resid_post", layer=0, vector=vector, scale=0.5),
                                                     wb.ban_experts(layer=1, experts=[0, 1])]},
        "by expert": {"edits": [wb.scale("expert.out", 0.5, expert=[0, 2])], "capture": "mlp.out"},
    }
    found = {}
    for name, options in list(plans.items())[2:3] if dry else plans.items():
        plain, recorded = (model.generate(ids, max_tokens=tokens, stop=[], graph=graph, **options).finish()
                           for graph in (False, True))
        if recorded.decoding != "recorded":
            raise Wrong(f"{name}: {recorded.decoding}")
        agree = next((i for i, (a, b) in enumerate(zip(plain.tokens, recorded.tokens)) if a != b), tokens)
        there = len(ids) + agree
        difference = off(recorded.run().hidden[:there], plain.run().hidden[:there])
        for site in plain.data.data_vars:
            a, b = (torch.as_tensor(gen.data[site].sel(token=slice(0, there - 1)).values) for gen in (recorded, plain))
            if a.is_floating_point():
                difference = max(difference, off(a, b))
        found[name] = f"{agree} of {tokens} tokens the same, {difference:.1e} apart"
        if difference > BF16_SUBLAYER:  # a token may tip where two are equally likely; what led to it may not
            raise Wrong(f"{name}: {found[name]}")
    return found


def specification(dry: bool) -> str:
    """The tests of the kernels on this device, in a process of their own; its last line.

    Raises:
        Wrong: one failed.
    """
    environment = {**os.environ, "GPTOSS_TEST_KERNELS": "triton"}
    some = ["-k", "test_route_with_ties or test_a_large_sink"] if dry else []
    return _pytest([sys.executable], some, environment)


def sanitizer(dry: bool) -> str:
    """The same tests under compute-sanitizer, as far as they are quick; where that tool is installed.

    Raises:
        Wrong: it found something.
    """
    tool = shutil.which("compute-sanitizer")
    if tool is None or dry:
        return "compute-sanitizer is not installed" if tool is None else "not in a dry run"
    environment = {**os.environ, "GPTOSS_TEST_KERNELS": "triton", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    watched = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable]
    return _pytest(watched, ["-m", "not slow"], environment)


def _pytest(python: list[str], options: list[str], environment: dict[str, str]) -> str:
    command = [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *FILES]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise Wrong(done.stdout[-4000:] + done.stderr[-2000:])
    return next(line for line in reversed(done.stdout.splitlines()) if " passed" in line).strip("= ")
