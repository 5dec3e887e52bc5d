"""Decoding by a recording gives what decoding step by step gives: tokens, captures, edits, errors.

Twice: with the processor's own recordings and kernels; and, since there is no GPU here, with a recording that has a
CUDA graph's habits (``recording``) and the reference's kernels, with experts that read nothing on the host.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import gptoss_workbench as wb
from gptoss_kernels import reference
from gptoss_kernels.cpu.recording import NotRecordable
from gptoss_workbench.errors import EditError, EditNeverFired, WorkbenchError
from gptoss_workbench.hooks.acting import Editor
from gptoss_workbench.hooks.capture import as_capture
from gptoss_workbench.hooks.chunk import Chunk
from gptoss_workbench.hooks.edits import Edit
from gptoss_workbench.hooks.feeding import Feed
from gptoss_workbench.hooks.keeping import Keeper
from gptoss_workbench.hooks.prompts import Prompts
from gptoss_workbench.hooks.sites import SITES
from gptoss_workbench.hooks.steady import Steady
from gptoss_workbench.model import graphs
from gptoss_workbench.model.model import Model
from gptoss_workbench.model.transformer import Transformer
from tests.factories import tiny_model, write_hf
from tests.model import steady_kernels
from tests.model.recording import OpRecording, RefusedWhileRecording
from tests.tolerances import SITE_F32

IDS, OTHER = [5, 17, 300, 8, 8, 91], [7, 7, 2, 400]
TOKENS = 7


@pytest.fixture(scope="module", params=["as a GPU records", "as a processor records"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    loaded = wb.load(write_hf(tmp_path_factory.mktemp("tiny"), tiny_model(seed=9, num_hidden_layers=2)),
                     dtype="float32", kernels="cpu")
    with pytest.MonkeyPatch.context() as patch:
        if "GPU" in request.param:
            loaded.transformer = Transformer(loaded.config, loaded.weights, steady_kernels)
            patch.setitem(graphs.RECORDERS, "cpu", OpRecording)
        else:
            pytest.importorskip("numba")
        yield loaded


def both(model: Model, prompt: Any = IDS, **options: Any) -> Iterator[tuple[Any, Any]]:
    """Pairs of generations, step by step and recorded, that have come to their end."""
    made = []
    for graph in (False, True):
        gens = model.generate(prompt, **{"max_tokens": TOKENS, "stop": [], "graph": graph, **options})
        made.append([gen.finish() for gen in (gens if isinstance(gens, list) else [gens])])
    assert all(gen.decoding == "recorded" for gen in made[1])
    return zip(*made)


def same(plain: Any, recorded: Any) -> None:
    """Equal but for sums over wider rows of the cache."""
    bound = SITE_F32
    assert recorded.tokens == plain.tokens and recorded.reason == plain.reason
    for a, b in zip(plain.steps, recorded.steps):
        assert b.logprob == pytest.approx(a.logprob, abs=bound)
    torch.testing.assert_close(recorded.run().hidden, plain.run().hidden, rtol=bound, atol=bound)
    assert list(plain.data.data_vars) == list(recorded.data.data_vars)
    for name, values in plain.data.data_vars.items():
        assert values.dims == recorded.data[name].dims
        np.testing.assert_allclose(recorded.data[name].values, values.values, rtol=bound, atol=bound, err_msg=str(name))
    for name in plain.data.coords:
        np.testing.assert_array_equal(recorded.data.coords[name].values, plain.data.coords[name].values)


VECTOR = torch.linspace(-1, 1, 64)
EDITS: dict[str, Edit] = {
    "set": wb.set("attn.z", 0.3, layer=1, head=[2, 5]),
    "set by rows": wb.set("mlp.out", torch.randn(13, 64, generator=torch.Generator().manual_seed(1)), layer=0,
                          tokens=slice(0, 13)),
    "add": wb.add("router.logits", 0.7, layer=0, expert=3),
    "add tensor": wb.add("resid_mid", VECTOR),
    "scale": wb.scale("attn.k", 1.3, layer=1, kv_head=0),
    "zero": wb.zero("expert.out", layer=1, slot=0),
    "by expert": wb.scale("expert.act", 0.1, expert=[0, 3, 5]),
    "noise": wb.noise("resid_post", 0.5, seed=3, layer=0),
    "steer": wb.steer("resid_post", layer=0, vector=VECTOR, scale=2.5),
    "steer, same length": wb.steer("resid_post", layer=0, vector=VECTOR, scale=2.5, keep_norm=True),
    "project": wb.project("resid_pre", torch.stack((VECTOR, VECTOR.square())), layer=1),
    "silence": wb.silence_experts(experts=[1, 2, 6]),
    "ban": wb.ban_experts(layer=0, experts=[1, 2]),
    "force": wb.force_experts(layer=1, experts=[7, 0]),
    "swap": wb.swap_experts(experts=[4, 2]),
    "temperature": wb.router_temperature(3.0),
    "logits": wb.add("logits", 4.0, vocab=[11, 12]),
    "embed": wb.scale("embed", 0.5),
    "some tokens": wb.zero("mlp.out", layer=0, tokens=[2, 7, 9]),
    "from a token on": wb.scale("attn.out", -1.0, layer=1, tokens=slice(8, None)),
    "every third": wb.add("resid_mid", 1.0, tokens=slice(1, None, 3)),
    "by text": wb.scale("resid_mid", 0.5, tokens=wb.where(test=lambda text: len(text) > 1)),
    "in the prompt": wb.patch("mlp.out", layer=0, tokens=4, source=1),
    "function, in the prompt": wb.apply("mlp.out", torch.neg, layer=0, tokens=slice(0, 3)),
}


@pytest.mark.parametrize("name", EDITS)
def test_each_edit(tiny: Model, name: str) -> None:
    for plain, recorded in both(tiny, edits=[EDITS[name]], capture=["resid_post", "router"]):
        same(plain, recorded)


IN_ANY_DTYPE = [name for name, edit in EDITS.items() if not name.endswith("in the prompt") and name != "by text"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", IN_ANY_DTYPE)
def test_the_bits_are_those_of_the_plain_edit(tiny: Model, name: str, dtype: torch.dtype) -> None:
    """Two rows of one token at a site, edited both ways."""
    edit, sizes, position = EDITS[name], tiny.config.dimensions, 9
    prompts = Prompts([IDS, OTHER], None, open_ended=True)
    spec, draw = SITES[edit.place.site], torch.Generator().manual_seed(0)
    layer = None if not spec.per_layer else edit.place.layer if isinstance(edit.place.layer, int) else 1
    routes = torch.stack([torch.randperm(sizes["expert"], generator=draw)[:4] for _ in range(2)])[:, None]
    x = (torch.randn(2, 1, *(sizes[dim] for dim in spec.dims[1:]), generator=draw) * 3).to(dtype)
    x = routes if edit.place.site == "router.experts" else x

    chunk = Chunk([0, 1], [position, position], 1, prompts)
    chunk.routes = routes
    plain = Editor([edit], prompts, sizes)
    want = plain.change([0], edit.place.site, layer, x.clone(), chunk, 0)

    capture, fired = as_capture(None), [0]
    feed = Feed([edit], Keeper(capture, prompts, sizes, 8), prompts, sizes, [], {}, fired, lambda site, of: [layer],
                [0, 1], [position, position])
    steady = Steady(feed.plan, 2, sizes, dtype, torch.device("cpu"))
    feed.attach(steady)
    feed.load([position, position], [True, True])
    if edit.place.site != "router.experts":
        steady("router.experts", layer, routes)
    got = steady(edit.place.site, layer, x.clone())
    feed.settle()
    if name == "project" and dtype == torch.float32:  # a product of all rows at once
        torch.testing.assert_close(got, want, rtol=0, atol=SITE_F32)
    else:
        assert got.dtype == want.dtype and torch.equal(got, want)
    assert bool(fired[0]) == bool(plain.fired[0])


def test_edits_that_take_from_runs(tiny: Model) -> None:
    run = tiny.generate(OTHER, capture=["resid_mid", "router"], max_tokens=12, stop=[]).finish().run()
    edits = [wb.patch("resid_mid", run, layer=0, tokens=slice(2, 9)), wb.replay_routes(run),
             wb.mean("resid_mid", run, layer=1)]
    for plain, recorded in both(tiny, edits=edits, capture=["resid_mid", "router"]):
        same(plain, recorded)


def test_many_edits_at_one_place_in_their_order(tiny: Model) -> None:
    edits = [wb.add("resid_post", 1.0, layer=0), wb.scale("resid_post", 2.0, layer=0),
             wb.set("resid_post", 0.25, layer=0, d_model=slice(0, 8), tokens=slice(7, 10)),
             wb.ban_experts(experts=[0]), wb.add("router.logits", 1.0, expert=5)]
    for order in (edits, edits[::-1]):
        for plain, recorded in both(tiny, edits=order, capture=["resid", "router"]):
            same(plain, recorded)


@pytest.mark.parametrize("capture", [
    "resid", list(wb.SITES), "attn.pooled", wb.capture(["router", "expert.out"], layers=1, experts=[0, 3]),
    wb.capture(["attn.z", "attn.pattern"], heads=[1, 4], tokens=slice(4, 9)), wb.capture("resid_post", tokens=11),
    wb.capture("mlp.out", tokens=[0, 7]),
], ids=str)
def test_captures(tiny: Model, capture: Any) -> None:
    for plain, recorded in both(tiny, capture=capture):
        same(plain, recorded)


def test_what_was_captured_stays_as_it_was(tiny: Model) -> None:
    """Buffers are written again for each token; what a person holds is not."""
    gen = tiny.generate(IDS, capture="resid_post", max_tokens=TOKENS, stop=[], graph=True)
    steps = iter(gen)
    for _ in range(2):
        next(steps)
    seen = gen.data["resid_post"].copy(deep=True)
    gen.finish()
    assert np.array_equal(gen.data["resid_post"].sel(token=seen.token), seen)


def test_a_batch_whose_rows_end_at_different_times(tiny: Model) -> None:
    said = tiny.generate(IDS, max_tokens=TOKENS, stop=[], graph=False).tokens
    edits = [wb.scale("resid_mid", 0.7, layer=0, prompt=1), wb.ban_experts(layer=1, experts=[2])]
    for options in ({"stop": [said[3]]}, {"edits": edits, "stop": [said[2]], "capture": ["router", "attn.pattern"]}):
        pairs = list(both(tiny, [IDS, OTHER, IDS[:5]], **options))
        for plain, recorded in pairs:
            same(plain, recorded)
    assert {len(plain.tokens) for plain, _ in both(tiny, [IDS, OTHER, IDS[:5]], stop=[said[3]])} != {TOKENS}


def test_sampling_draws_the_same(tiny: Model) -> None:
    for plain, recorded in both(tiny, [IDS, OTHER], temperature=1.0, top_k=40, seed=5):
        assert recorded.tokens == plain.tokens


def test_a_cache_that_grows(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptoss_workbench.model.static_cache.SMALLEST", 2)
    monkeypatch.setitem(graphs.AHEAD, "cpu", 1)
    edits = [wb.scale("expert.out", 0.5, expert=[0, 1, 2])]
    for plain, recorded in both(tiny, edits=edits, capture="resid_post", max_tokens=14):
        same(plain, recorded)


# one recording for many values --------------------------------------------------------------------------------------


def recordings(model: Model) -> int:
    return graphs.pool(model).made


def test_other_values_need_no_other_recording(tiny: Model) -> None:
    def edits(vector: torch.Tensor, scale: float, experts: list[int], token: int) -> list[Edit]:
        return [wb.steer("resid_post", layer=0, vector=vector, scale=scale), wb.ban_experts(layer=1, experts=experts),
                wb.scale("attn.z", scale, layer=1, head=experts[0]), wb.zero("mlp.out", tokens=slice(token, None))]

    graphs.pool(tiny).clear()
    list(both(tiny, edits=edits(VECTOR, 1.0, [1], 7), capture="resid_post"))
    before = recordings(tiny)
    for values in ((-VECTOR, 1.0, [1], 7), (VECTOR, 3.0, [0, 2, 5], 3), (VECTOR.square(), 0.0, [7], 9)):
        for plain, recorded in both(tiny, edits=edits(*values), capture="resid_post"):
            same(plain, recorded)
    assert recordings(tiny) == before
    list(both(tiny, edits=edits(VECTOR, 1.0, [1], 7)[:2], capture="resid_post"))
    assert recordings(tiny) == before + 1


def test_edits_change_between_two_tokens(tiny: Model) -> None:
    """What was generated is what the edits that are then on record make of the whole text, read at once."""
    def steer(scale: float, experts: list[int]) -> list[Edit]:
        return [wb.steer("resid_post", layer=0, vector=VECTOR, scale=scale), wb.ban_experts(layer=1, experts=experts)]

    made = []
    for graph in (False, True):
        gen = tiny.generate(IDS, edits=steer(1.0, [0]), capture="resid_post", max_tokens=9, stop=[], graph=graph)
        steps = iter(gen)
        for count in (3, 2):
            for _ in range(count):
                next(steps)
            before = recordings(tiny)
            gen.change(steer(-3.0 * count, [1, count]))
        made.append(gen.finish())
        assert recordings(tiny) == before, "no new recording"
    same(*made)
    whole = tiny.run(made[0].ids[:-1], edits=made[1].run().edits, capture="resid_post")
    np.testing.assert_allclose(made[1].data["resid_post"].values, whole.data["resid_post"].values, atol=SITE_F32)
    assert [int(row.argmax()) for row in whole.logits[len(IDS) - 1:]] == made[1].tokens
    assert made[1].provenance.edits == made[0].provenance.edits


def test_changing_one_row_leaves_the_others(tiny: Model) -> None:
    alone = tiny.generate(OTHER, max_tokens=TOKENS, stop=[], edits=[wb.scale("resid_mid", 0.9)]).finish()
    first, second = tiny.generate([IDS, OTHER], max_tokens=TOKENS, stop=[], edits=[wb.scale("resid_mid", 0.9)],
                                  graph=True)
    next(iter(first))
    first.change([wb.zero("mlp.out")])
    first.finish()
    assert second.finish().tokens == alone.tokens
    assert [edit.name for edit in first.run().edits] == ["scale", "scale", "zero"]


def test_edits_that_can_not_change_in_the_middle(tiny: Model) -> None:
    gen = tiny.generate(IDS, max_tokens=4, stop=[], graph=True)
    steps = iter(gen)
    for _ in range(2):
        next(steps)
    with pytest.raises(EditError, match="middle of a text"):
        gen.change(wb.zero("mlp.out", tokens=wb.where(channel="final")))
    with pytest.raises(WorkbenchError, match="function of your own"):
        gen.change(wb.apply("mlp.out", torch.neg))
    assert len(gen.finish().tokens) == 4


def test_waiting_recordings_keep_no_model_alive(tiny: Model) -> None:
    other = Model(tiny.config, tiny.weights, kernels=steady_kernels)
    other.generate(IDS, max_tokens=3, stop=[], graph=True).finish()
    assert recordings(other) == 1
    gone = weakref.ref(other.transformer)
    del other
    gc.collect()
    assert gone() is None


# what can't be recorded ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("edit", "why"), [
    (wb.apply("resid_post", torch.neg, layer=0), "function of your own"),
    (wb.scale_sink(0.5), "grows with every token"),
    (wb.cut_attention(layer=0, key=0), "grows with every token"),
    (wb.patch("mlp.out", layer=0, tokens=slice(3, None), source=1), "this very pass"),
], ids=lambda value: getattr(value, "name", ""))
def test_some_edits_decode_step_by_step(tiny: Model, edit: Edit, why: str) -> None:
    gen = tiny.generate(IDS, edits=edit, max_tokens=3, stop=[])
    assert gen.decoding == "not begun"
    assert len(gen.tokens) == 3
    assert gen.decoding.startswith("step by step: ") and why in gen.decoding
    with pytest.raises(WorkbenchError, match=why):
        tiny.generate(IDS, edits=edit, max_tokens=3, stop=[], graph=True).finish()


def test_it_can_be_turned_off(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tiny.generate(IDS, max_tokens=3, stop=[]).finish().decoding == "recorded"
    assert tiny.generate(IDS, max_tokens=3, stop=[], graph=False).finish().decoding == "step by step: as asked"
    monkeypatch.setenv("GPTOSS_GRAPH", "0")
    assert tiny.generate(IDS, max_tokens=3, stop=[]).finish().decoding == "step by step: as asked"
    assert tiny.generate(IDS, max_tokens=3, stop=[], graph=True).finish().decoding == "recorded"


def test_kernels_that_read_back_are_not_recorded(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "transformer", Transformer(tiny.config, tiny.weights, reference))
    assert "read numbers back" in tiny.generate(IDS, max_tokens=3, stop=[]).finish().decoding
    monkeypatch.setattr(reference, "not_recorded", lambda dtype, rows: None, raising=False)
    with pytest.raises((RefusedWhileRecording, NotRecordable)):  # the recorder sees what a GPU would refuse
        tiny.generate(IDS, max_tokens=3, stop=[]).finish()


# errors -------------------------------------------------------------------------------------------------------------


def test_edits_must_fire_when_recorded_too(tiny: Model) -> None:
    experts = [e for e in range(8) if e not in _served(tiny)]
    idle = [wb.zero("mlp.out", layer=0, tokens=40)]
    idle += [wb.silence_experts(layer=1, experts=experts)] if experts else []
    for edit in idle:
        for graph in (False, True):
            with pytest.raises(EditNeverFired):
                tiny.generate(IDS, edits=edit, max_tokens=3, stop=[], graph=graph).finish()
    late = wb.scale("expert.out", 0.5, layer=1, expert=[0, 1, 2, 3, 4, 5, 6, 7], tokens=slice(len(IDS), None))
    assert len(tiny.generate(IDS, edits=late, max_tokens=3, stop=[], graph=True).tokens) == 3, "counted on the device"


def _served(model: Model) -> set[int]:
    run = model.generate(IDS, capture="router.experts", max_tokens=3, stop=[], graph=False).finish().run()
    return {int(expert) for expert in run.tensor("router.experts", 1).flatten()}


def test_too_many_bans_are_seen_on_the_device(tiny: Model) -> None:
    edits = [wb.ban_experts(layer=0, experts=[0, 1, 2], tokens=slice(7, None)),
             wb.ban_experts(layer=0, experts=[3, 4], tokens=slice(8, None))]
    for graph in (False, True):
        gen = tiny.generate(IDS, edits=edits, max_tokens=6, stop=[], graph=graph)
        with pytest.raises(EditError, match="banned for one token"):
            gen.finish()
        assert len(gen.steps) == 3 and gen.reason == "stopped"


def test_values_that_do_not_fit_are_told(tiny: Model) -> None:
    for graph in (False, True):
        with pytest.raises(EditError, match="does not fit"):
            tiny.generate(IDS, edits=wb.add("mlp.out", torch.zeros(5), tokens=slice(6, None)), max_tokens=3, stop=[],
                          graph=graph).finish()
