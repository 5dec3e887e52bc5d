"""Random edits for hypothesis: places of every form at every site, and edits of every kind."""

from __future__ import annotations

import atexit
import dataclasses
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

import gptoss_workbench as wb
from gptoss_workbench.hooks.edits import Edit
from gptoss_workbench.hooks.selection import Where
from gptoss_workbench.hooks.sites import SITES
from tests.hooks.sae_folders import write

N = 12
SIZES = {"d_model": 64, "head": 8, "kv_head": 2, "d_head": 16, "expert": 8, "slot": 4, "d_ff": 96, "vocab": 512}
FLOATS = [site for site in SITES if site != "router.experts"]

numbers = st.floats(-4, 4, width=32) | st.integers(-3, 3)
layers = st.none() | st.integers(-4, 3) | st.lists(st.integers(0, 3), min_size=1, max_size=3) | st.just(slice(1, None))
labels = st.sampled_from([wb.where(field="content"), wb.where(matching="."), wb.where(channel=None, message=0)])
tokens = (st.none() | st.integers(-N, N - 1) | st.lists(st.integers(0, N - 1), min_size=1, max_size=4) | labels
          | st.sampled_from([slice(2, None), slice(None, None, 3), slice(-4, -1)]))


@st.composite
def selections(draw: Any, site: str) -> dict[str, Any]:
    """Some of a site's further dimensions; keys that every query may find."""
    chosen: dict[str, Any] = {}
    for dim in SITES[site].dims:
        if dim not in ("token", "query") and draw(st.integers(0, 3)) == 0:
            if dim == "key":
                sink = ["sink"] if site == "attn.pattern" else []
                chosen[dim] = draw(st.sampled_from([0, [0, 2], slice(0, 3), wb.where(field="content"), *sink]))
            else:
                most = min(SIZES[dim], 6) - 1
                chosen[dim] = draw(st.integers(0, most) | st.lists(st.integers(0, most), min_size=1, unique=True))
    return chosen


@cache
def sae() -> wb.SAE:
    """One SAE for all, in a folder that is there as long as the tests run."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return wb.load_sae(write(Path(folder.name) / "sae", "jumprelu"))


def tensors(*shape: int) -> st.SearchStrategy[torch.Tensor]:
    def make(seed: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return st.integers(0, 99).map(make)


@st.composite
def edits(draw: Any, run: Any = None) -> Edit:
    """An edit of any kind; those that need a run are made from ``run``, which captured every site."""
    site = draw(st.sampled_from(FLOATS))
    at = {"layer": draw(layers) if SITES[site].per_layer else None, "tokens": draw(tokens)}
    within = {**at, **draw(selections(site))}
    routed = {"layer": draw(layers), "tokens": draw(tokens)}
    seen = {"layer": routed["layer"], "query": routed["tokens"], "head": draw(st.none() | st.integers(0, 7))}
    some = draw(st.lists(st.integers(0, 7), min_size=1, max_size=3, unique=True))
    change = draw(st.sampled_from(["scale", "add", "set"]))
    kinds = {
        "set": lambda: wb.set(site, draw(numbers), **within),
        "add": lambda: wb.add(site, draw(numbers), **within),
        "add a vector": lambda: wb.add("mlp.out", draw(tensors(64)), **routed),
        "scale": lambda: wb.scale(site, draw(numbers), **within),
        "zero": lambda: wb.zero(site, **within),
        "noise": lambda: wb.noise("resid_mid", draw(st.floats(0, 2)), seed=draw(st.integers(0, 9)), **routed),
        "steer": lambda: wb.steer("resid_post", vector=draw(tensors(64)), scale=draw(st.floats(-2, 2)),
                                  keep_norm=draw(st.booleans()), **routed),
        "project": lambda: wb.project("attn.z", draw(tensors(2, 16)), **routed),
        "cut": lambda: wb.cut_attention(key=draw(st.sampled_from([0, slice(0, 2), wb.where(matching=".")])), **seen),
        "sink": lambda: wb.scale_sink(draw(st.floats(0, 5)), **seen),
        "silence": lambda: wb.silence_experts(experts=list(range(6)), **routed),
        "ban": lambda: wb.ban_experts(experts=some, **routed),
        "force": lambda: wb.force_experts(experts=some, **routed),
        "swap": lambda: wb.swap_experts(experts=[0, 5], **routed),
        "features": lambda: wb.steer_features(sae(), some, tokens=routed["tokens"], **{change: draw(st.floats(-2, 2))}),
        "temperature": lambda: wb.router_temperature(draw(st.floats(0.125, 8)), **routed),
    }
    if run is not None:
        kinds |= {
            "replay": lambda: wb.replay_routes(run, **routed),
            "pin": lambda: wb.pin_attention(run, **seen),
            "mean": lambda: wb.mean("attn.z", run, over=draw(st.none() | st.just([1, 2])), head=some, **routed),
            "patch": lambda: wb.patch("expert.act", run, slot=[0, 2], **routed),
            "patch one for all": lambda: wb.patch("resid_pre", run, source=3, **routed),
            "patch within": lambda: wb.patch("resid_mid", source=0, **routed),
        }
    return kinds[draw(st.sampled_from(sorted(kinds)))]()


def looks_ahead(edit: Edit) -> bool:
    """Whether an edit may let a query see tokens after it, which in a chunk are not there yet."""
    key = dict(edit.place.dims).get("key")
    return "key" in SITES[edit.place.site].dims and edit.name in ("set", "zero", "scale") and (
        key is None or isinstance(key, Where))


def for_prompt(edit: Edit, prompt: int) -> Edit:
    """The same edit for one row of a batch."""
    return dataclasses.replace(edit, place=dataclasses.replace(edit.place, prompt=prompt))
