"""Each edit has the effect that a change of the model or of the tensors by hand has: alone, in a batch, generating."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import gptoss_workbench as wb
from gptoss_kernels.mxfp4 import Mxfp4Tensor
from gptoss_workbench.errors import EditError, EditNeverFired, SiteError
from tests.tolerances import CACHE_F32, EDIT_F32, PROBABILITY, SITE_F32, SUM_F32

LAYER = 1
DIRECTION = torch.linspace(-1, 2, 64)


def with_layer(model, **changes: Callable[[Tensor], Tensor]):
    """The same model with some weights of one layer replaced."""
    layers = list(model.weights.layers)
    old = layers[LAYER]
    layers[LAYER] = dataclasses.replace(old, **{name: change(getattr(old, name)) for name, change in changes.items()})
    weights = dataclasses.replace(model.weights, layers=layers)
    return wb.Model(model.config, weights, name="changed by hand", folder=model._folder)


def at(index: int | slice | tuple, value: Tensor | float | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x[index] = value(x[index]) if callable(value) else value
        return x
    return change


def without_expert(expert: int) -> Callable[[Mxfp4Tensor], Mxfp4Tensor]:
    return lambda packed: Mxfp4Tensor(at(expert, 0)(packed.blocks), packed.scales)


def without_direction(x: Tensor) -> Tensor:
    unit = DIRECTION / DIRECTION.norm()
    return x - torch.tensordot(unit, x, 1) * unit.view(-1, *(1,) * (x.dim() - 1))


BY_WEIGHTS: dict[str, tuple[Callable[[], wb.hooks.edits.Edit], dict[str, Callable]]] = {
    "add to a router logit": (lambda: wb.add("router.logits", 100.0, layer=LAYER, expert=0),
                              {"router_bias": at(0, lambda b: b + 100)}),
    "silence": (lambda: wb.silence_experts(layer=LAYER, experts=[2, 5]),
                {"down": lambda w: without_expert(5)(without_expert(2)(w)), "down_bias": at([2, 5], 0.0)}),
    "route around": (lambda: wb.route_around(layer=LAYER, experts=[2, 5]),
                     {"router_bias": at([2, 5], -1e4), "router_weight": at([2, 5], 0.0)}),
    "swap": (lambda: wb.swap_experts(layer=LAYER, experts=[2, 5]),
             {"router_bias": at([2, 5], lambda b: b.flip(0)), "router_weight": at([2, 5], lambda w: w.flip(0))}),
    "router temperature": (lambda: wb.router_temperature(4.0, layer=LAYER),
                           {"router_bias": lambda b: b / 4, "router_weight": lambda w: w / 4}),
    "scale the sink": (lambda: wb.scale_sink(3.0, layer=LAYER), {"sinks": lambda s: s + math.log(3)}),
    "scale the sink of a head": (lambda: wb.scale_sink(0.25, layer=LAYER, head=6),
                                 {"sinks": at(6, lambda s: s - math.log(4))}),
    "close the sink": (lambda: wb.scale_sink(0.0, layer=LAYER), {"sinks": lambda s: s - 1e4}),
    "steer": (lambda: wb.steer("attn.out", layer=LAYER, vector=DIRECTION, scale=0.5),
              {"o_bias": lambda b: b + 0.5 * DIRECTION}),
    "project": (lambda: wb.project("attn.out", DIRECTION, layer=LAYER),
                {"o_weight": without_direction, "o_bias": without_direction}),
    "zero a head": (lambda: wb.zero("attn.z", layer=LAYER, head=[0, 3]),
                    {"o_weight": lambda w: w * ~torch.isin(torch.arange(128) // 16, torch.tensor([0, 3]))}),
    "scale a sublayer": (lambda: wb.scale("attn.out", -2.0, layer=LAYER),
                         {"o_weight": lambda w: -2 * w, "o_bias": lambda b: -2 * b}),
    "add to values": (lambda: wb.add("attn.v", torch.arange(16.0), layer=LAYER, kv_head=1),
                      {"v_bias": at(slice(16, 32), lambda b: b + torch.arange(16.0))}),
}


@pytest.mark.parametrize("name", BY_WEIGHTS)
def test_an_edit_equals_other_weights(small, ids, name) -> None:
    make, changes = BY_WEIGHTS[name]
    by_hand, edit = with_layer(small, **changes), make()
    clean = small.run(ids).logits
    want = by_hand.run(ids).logits
    assert (want - clean).abs().max() > 1e-3
    torch.testing.assert_close(small.run(ids, edits=edit).logits, want, rtol=0, atol=EDIT_F32)
    for run, prompt in zip(small.run([ids, ids[:6]], edits=edit), (ids, ids[:6]), strict=True):
        torch.testing.assert_close(run.logits, by_hand.run(prompt).logits, rtol=0, atol=EDIT_F32)
    torch.testing.assert_close(small.run(ids, edits=edit, chunk=7).logits, want, rtol=0, atol=EDIT_F32)
    assert small.generate(ids, edits=edit, max_tokens=8, stop=[]).tokens == \
        by_hand.generate(ids, max_tokens=8, stop=[]).tokens


def test_a_neuron_of_an_expert(small, ids) -> None:
    """(up + 1) is 0 where up is -1: the same as a zero column in that expert's second map."""
    edit = wb.set("expert.up", -1.0, layer=LAYER, expert=3, d_ff=7)
    run, clean = (small.run(ids, capture=["expert.act", "router", "mlp.out"], edits=edits) for edits in (edit, ()))
    hits = clean.tensor("router.experts", LAYER) == 3
    want = clean.tensor("expert.act", LAYER).clone()
    want[..., 7][hits] = 0
    assert torch.equal(run.tensor("expert.act", LAYER), want) and 0 < int(hits.sum()) < hits.numel() / 2
    served = hits.any(-1)
    moved = (run.tensor("mlp.out", LAYER) != clean.tensor("mlp.out", LAYER)).any(-1)
    assert torch.equal(moved, served)


def test_the_three_meanings_of_taking_an_expert_away(small, ids) -> None:
    """They are three different things, and each says what it is in the weights."""
    expert = 3
    run = {name: small.run(ids, capture=["router", "mlp.out"], edits=edit) for name, edit in (
        ("clean", ()), ("silent", wb.silence_experts(layer=LAYER, experts=expert)),
        ("around", wb.route_around(layer=LAYER, experts=expert)),
        ("swapped", wb.swap_experts(layer=LAYER, experts=[expert, 6])))}
    experts = {name: one.tensor("router.experts", LAYER) for name, one in run.items()}
    weights = {name: one.tensor("router.weights", LAYER) for name, one in run.items()}
    served = (experts["clean"] == expert).any(-1)
    assert torch.equal(experts["silent"], experts["clean"])
    assert (weights["silent"].sum(-1)[served] < 1).all()
    assert torch.equal(weights["silent"], weights["clean"].masked_fill(experts["clean"] == expert, 0))
    assert not (experts["around"] == expert).any()
    torch.testing.assert_close(weights["around"].sum(-1), torch.ones(len(ids)))
    logits = run["clean"].tensor("router.logits", LAYER)
    swapped = logits[:, [0, 1, 2, 6, 4, 5, 3, 7]]
    assert torch.equal(experts["swapped"], swapped.topk(4).indices)
    outs = [one.tensor("mlp.out", LAYER) for one in run.values()]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(outs) for b in outs[:i])
    assert wb.ban_experts(layer=LAYER, experts=expert) == wb.route_around(layer=LAYER, experts=expert)


def test_swapping_twice_is_nothing(small, ids) -> None:
    swap = wb.swap_experts(experts=[1, 4])
    assert torch.equal(small.run(ids, edits=[swap, swap]).hidden, small.run(ids).hidden)


def test_cutting_off_the_past_is_a_shorter_prompt(small, ids) -> None:
    """Rotary positions are relative: tokens that can't see the first eight compute what they compute alone."""
    edit = wb.cut_attention(query=slice(8, None), key=slice(None, 8))
    alone = small.run(ids[8:]).hidden
    torch.testing.assert_close(small.run(ids, edits=edit).hidden[8:], alone, rtol=0, atol=SITE_F32)
    batch = small.run([ids, ids[:12]], edits=edit)
    torch.testing.assert_close(batch[0].hidden[8:], alone, rtol=0, atol=SITE_F32)
    torch.testing.assert_close(batch[1].hidden[8:], small.run(ids[8:12]).hidden, rtol=0, atol=SITE_F32)
    assert small.generate(ids, edits=edit, max_tokens=6, stop=[]).tokens == \
        small.generate(ids[8:], max_tokens=6, stop=[]).tokens


def test_cutting_between_channels(model) -> None:
    ids = model.generate(wb.chat("What is 27 + 58?", effort="high"), max_tokens=150).ids
    final, analysis = (wb.where(channel=channel, field="content") for channel in ("final", "analysis"))
    run = model.run(ids, capture=["attn.pattern"], edits=[wb.cut_attention(query=final, key=analysis, head=[0, 1])])
    labels = run.token_coords("token")
    q, k = ([t for t in range(len(ids)) if (labels["channel"][1][t], labels["field"][1][t]) == (channel, "content")]
            for channel in ("final", "analysis"))
    pattern, before = run.tensor("attn.pattern", 0), model.run(ids, capture="attn.pattern").tensor("attn.pattern", 0)
    assert q and k and float(pattern[:2][:, q][..., k].abs().max()) == 0
    want = before.clone()
    for head in (0, 1):
        for query in q:
            want[head, query, k] = 0
            want[head, query] /= want[head, query].sum()
    torch.testing.assert_close(pattern, want, rtol=0, atol=PROBABILITY)


@pytest.mark.parametrize("head", [None, [1, 6]])
def test_a_pinned_pattern(small, ids, head) -> None:
    other = small.run(ids[::-1], capture=["attn.pattern"])
    edit = wb.pin_attention(other, layer=LAYER, head=head)
    run = small.run(ids, capture=["attn.pattern", "attn.v", "attn.z"], edits=edit)
    heads = list(range(8)) if head is None else head
    pinned = other.tensor("attn.pattern", LAYER)
    assert torch.equal(run.tensor("attn.pattern", LAYER)[heads], pinned[heads])
    v = run.tensor("attn.v", LAYER).repeat_interleave(4, dim=1)
    z = torch.einsum("hqk,khd->qhd", pinned[heads][..., :-1], v[:, heads])
    torch.testing.assert_close(run.tensor("attn.z", LAYER)[:, heads], z, rtol=0, atol=SUM_F32)
    by_tensor = wb.pin_attention(pinned[heads], layer=LAYER, head=head)
    for options in ({}, {"chunk": 6}):
        again = small.run(ids, capture="attn.pattern", edits=by_tensor, **options)
        assert torch.equal(again.tensor("attn.pattern", LAYER)[heads], pinned[heads])
    padded = small.run([ids, ids + ids[:5]], capture="attn.pattern", edits=wb.pin_attention(
        other, layer=LAYER, head=head, prompt=0))
    assert torch.equal(padded[0].tensor("attn.pattern", LAYER)[heads], pinned[heads])


def test_a_pinned_row_for_all(small, ids) -> None:
    """One row, all the weight on the sink, for every query: attention adds nothing but its bias."""
    row = torch.zeros(len(ids) + 1)
    row[-1] = 1
    run = small.run(ids, capture="attn.out", edits=wb.pin_attention(row, layer=LAYER))
    bias = small.weights.layers[LAYER].o_bias
    torch.testing.assert_close(run.tensor("attn.out", LAYER), bias.expand(len(ids), -1))
    gen = small.generate(ids, capture="attn.out", edits=wb.pin_attention(row, layer=LAYER), max_tokens=4, stop=[])
    torch.testing.assert_close(gen.finish().run().tensor("attn.out", LAYER)[-1], bias)


def test_steering_that_keeps_the_norm(small, ids) -> None:
    clean = small.run(ids, capture="resid_post").tensor("resid_post", LAYER)
    edit = wb.steer("resid_post", layer=LAYER, vector=DIRECTION, scale=3, keep_norm=True, tokens=slice(5, 9))
    after = small.run(ids, capture="resid_post", edits=edit).tensor("resid_post", LAYER)
    want = clean.clone()
    for token in range(5, 9):
        moved = clean[token] + 3 * DIRECTION
        want[token] = moved / moved.norm() * clean[token].norm()
    torch.testing.assert_close(after, want, rtol=0, atol=SUM_F32)


def test_steering_one_channel(model) -> None:
    """Only that channel moves, and it moves while it is being written."""
    vector = torch.ones(model.config.hidden_size)
    thinking = wb.where(channel="analysis", field="content")
    edit = wb.steer("resid_post", layer=2, vector=vector, scale=0.5, tokens=thinking)
    # The prompt holds no such token yet; they come.
    gen = model.generate(wb.chat("What is 27 + 58?", effort="high"), edits=edit, capture="resid_post",
                         max_tokens=40).finish()
    run = gen.run()
    plain = model.run(run.ids, capture=["resid_mid", "mlp.out"], edits=edit)
    shift = (run.tensor("resid_post", 2) - plain.tensor("resid_mid", 2) - plain.tensor("mlp.out", 2)).mean(-1)
    labels = run.token_coords("token")
    inside = torch.tensor([(channel, field) == ("analysis", "content") for channel, field in
                           zip(labels["channel"][1], labels["field"][1], strict=True)])
    assert 3 < int(inside.sum()) < len(run.ids) - 20
    torch.testing.assert_close(shift, 0.5 * inside.float(), rtol=0, atol=1e-3)


def test_projecting_out_several_directions(small, ids) -> None:
    directions = torch.stack((DIRECTION, torch.sin(torch.arange(64.0))))
    clean = small.run(ids, capture="resid_post").tensor("resid_post", LAYER)
    after = small.run(ids, capture="resid_post", edits=wb.project("resid_post", directions, layer=LAYER)).tensor(
        "resid_post", LAYER)
    assert float((after @ directions.T).abs().max()) < 1e-3
    projector = directions.T @ torch.linalg.inv(directions @ directions.T) @ directions
    torch.testing.assert_close(after, clean - clean @ projector, rtol=0, atol=SITE_F32)


def test_noise_is_seeded_and_belongs_to_its_token(small, ids) -> None:
    def out(edit, **options):
        return small.run(ids, capture="embed", edits=edit, **options).tensor("embed")

    clean, noisy = out(()), out(wb.noise("embed", 0.5, seed=7))
    draws = (noisy - clean) / 0.5
    assert abs(float(draws.mean())) < 0.1 and abs(float(draws.std()) - 1) < 0.05  # 1280 draws
    assert abs(float(torch.corrcoef(draws)[0, 1:].mean())) < 0.1
    assert torch.equal(out(wb.noise("embed", 0.5, seed=7), chunk=3), noisy)
    assert not torch.equal(out(wb.noise("embed", 0.5, seed=8)), noisy)
    batch = small.run([ids[:4], ids], capture="embed", edits=wb.noise("embed", 0.5, seed=7))
    assert torch.equal(batch[1].tensor("embed"), noisy)
    gen = small.generate(ids[:5], capture="embed", edits=wb.noise("embed", 0.5, seed=7), max_tokens=6, stop=[]).finish()
    again = small.run(gen.ids[:-1], capture="embed", edits=wb.noise("embed", 0.5, seed=7))
    assert torch.equal(gen.run().tensor("embed"), again.tensor("embed"))
    layers = small.run(ids, capture="mlp.out", edits=wb.noise("mlp.out", 1.0, seed=0)).tensor("mlp.out")
    assert not torch.equal(layers[0], layers[1])


def test_the_mean_of_many_runs(small, ids) -> None:
    """Every token of every run counts once."""
    runs = [small.run(prompt, capture="attn.out") for prompt in (ids, ids[3:9], ids[:2])]
    want = torch.cat([run.tensor("attn.out", LAYER) for run in runs]).mean(0)
    for given in (runs, small.run([ids, ids[3:9], ids[:2]], capture="attn.out")):
        run = small.run(ids, capture="attn.out", edits=wb.mean("attn.out", given, layer=LAYER, tokens=[4, 6]))
        torch.testing.assert_close(run.tensor("attn.out", LAYER)[[4, 6]], want.expand(2, -1), rtol=0, atol=SUM_F32)
        torch.testing.assert_close(run.tensor("attn.out", LAYER)[5], runs[0].tensor("attn.out", LAYER)[5])
    some = wb.mean("attn.out", runs[0], over=[1, 2, -1], layer=LAYER)
    run = small.run(ids, capture="attn.out", edits=some)
    want = runs[0].tensor("attn.out", LAYER)[[1, 2, 19]].mean(0)
    torch.testing.assert_close(run.tensor("attn.out", LAYER), want.expand(20, -1), rtol=0, atol=SUM_F32)
    heads = wb.mean("attn.z", small.run(ids, capture="attn.z"), layer=LAYER, head=[2, 5])
    z = small.run(ids, capture="attn.z").tensor("attn.z", LAYER)
    want = z.clone()
    want[:, [2, 5]] = z[:, [2, 5]].mean(0)
    torch.testing.assert_close(small.run(ids, capture="attn.z", edits=heads).tensor("attn.z", LAYER), want, rtol=0,
                               atol=SUM_F32)


@pytest.mark.parametrize("options", [{}, {"chunk": 4}])
def test_patching_from_another_token_of_the_same_pass(small, ids, options) -> None:
    clean = small.run(ids, capture="resid_mid").tensor("resid_mid", LAYER)
    edit = wb.patch("resid_mid", source=2, layer=LAYER, tokens=[9, 15])
    after = small.run(ids, capture="resid_mid", edits=edit, **options).tensor("resid_mid", LAYER)
    want = clean.clone()
    want[[9, 15]] = clean[2]
    torch.testing.assert_close(after, want, rtol=0, atol=CACHE_F32)
    pairs = wb.patch("resid_mid", source=[2, 3], layer=LAYER, tokens=[9, 15], d_model=slice(0, 8))
    after = small.run([ids[4:], ids], capture="resid_mid", edits=[wb.zero("embed", tokens=0, prompt=0), pairs],
                      **options)[1].tensor("resid_mid", LAYER)
    want = clean.clone()
    want[[9, 15], :8] = clean[[2, 3], :8]
    torch.testing.assert_close(after, want, rtol=0, atol=CACHE_F32)


def test_patching_from_a_token_that_comes_later(small, ids) -> None:
    edit = wb.patch("resid_mid", source=15, layer=LAYER, tokens=3)
    clean = small.run(ids, capture="resid_mid").tensor("resid_mid", LAYER)
    after = small.run(ids, capture="resid_mid", edits=edit).tensor("resid_mid", LAYER)
    torch.testing.assert_close(after[3], clean[15])
    with pytest.raises(EditError, match="not read yet"):
        small.run(ids, edits=edit, chunk=8)


def test_patching_a_tensor_and_from_a_part_of_a_run(small, ids) -> None:
    """What was captured of some tokens and heads is put where it belongs, and nowhere else."""
    other = small.run(ids[::-1], capture=wb.capture("attn.z", tokens=[5, 6, 11], heads=[4, 2], layers=[LAYER, 3]))
    whole = small.run(ids[::-1], capture="attn.z").tensor("attn.z", LAYER)
    clean = small.run(ids, capture="attn.z").tensor("attn.z", LAYER)
    after = small.run(ids, capture="attn.z", edits=wb.patch("attn.z", other, layer=LAYER, tokens=[6, 11], head=2))
    want = clean.clone()
    want[[6, 11], 2] = whole[[6, 11], 2]
    assert torch.equal(after.tensor("attn.z", LAYER), want)
    for mistake, words in (
        (dict(tokens=7, head=2), "no value for every token"), (dict(tokens=6, head=3), "did not keep every head"),
        (dict(tokens=6), "did not keep every head"),
    ):
        with pytest.raises(EditError, match=words):
            small.run(ids, edits=wb.patch("attn.z", other, layer=LAYER, **mistake))
    with pytest.raises(SiteError, match="of layer 0"):
        wb.patch("attn.z", other, layer=0)
    given = wb.patch("attn.z", whole[[6, 11]], layer=LAYER, tokens=[6, 11], head=None)
    for options in ({}, {"chunk": 7}):
        after = small.run(ids, capture="attn.z", edits=given, **options).tensor("attn.z", LAYER)
        assert torch.equal(after[[6, 11]], whole[[6, 11]])


def test_patching_one_expert(small, ids) -> None:
    """The output of an expert moves from run to run, wherever it stands among the slots."""
    other = small.run(ids[::-1], capture=["expert.out", "router"])
    routes = wb.replay_routes(other, layer=LAYER)
    edits = [routes, wb.patch("expert.out", other, layer=LAYER, expert=3)]
    run, plain = (small.run(ids, capture=["expert.out", "router"], edits=some) for some in (edits, [routes]))
    hits = other.tensor("router.experts", LAYER) == 3
    want = torch.where(hits[..., None], other.tensor("expert.out", LAYER), plain.tensor("expert.out", LAYER))
    assert torch.equal(run.tensor("expert.out", LAYER), want) and 0 < int(hits.sum()) < len(ids)
    with pytest.raises(EditError, match="did not serve token"):
        small.run(ids, edits=edits[1:])


def test_replayed_routes_and_weights_make_the_experts_the_other_runs(small, ids) -> None:
    other = small.run(ids[::-1], capture=["router"])
    run = small.run(ids, capture="router", edits=[wb.replay_routes(other), wb.patch("router.weights", other)])
    assert torch.equal(run.tensor("router.experts"), other.tensor("router.experts"))
    assert torch.equal(run.tensor("router.weights"), other.tensor("router.weights"))
    some = small.run(ids[::-1], capture=wb.capture("router.experts", tokens=[4, 5]))
    run = small.run(ids, capture="router", edits=wb.replay_routes(some, layer=0))
    free = small.run(ids, capture="router").tensor("router.experts", 0)
    assert torch.equal(run.tensor("router.experts", 0)[4:6], some.tensor("router.experts", 0))
    assert torch.equal(run.tensor("router.experts", 0)[6:], free[6:])


# where other tools went wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peers_fail_at_router_logit_plus_100_in_every_layer(small, small_bf16, ids, dtype) -> None:
    """+100 on expert 0's logit in every layer: elsewhere this changes nothing and says nothing."""
    model = small if dtype == "float32" else small_bf16
    run = model.run(ids, capture="router", edits=wb.add("router.logits", 100.0, expert=0))
    assert (run.tensor("router.experts")[..., 0] == 0).all()
    assert (run.logits - model.run(ids).logits).abs().max() > 0.05


def test_peers_fail_at_expert_knock_out(small, ids) -> None:
    """Its share of the layer's output is gone, to the last digit, and nobody else's."""
    clean = small.run(ids, capture=["router", "expert.out", "mlp.out"])
    after = small.run(ids, capture="mlp.out", edits=wb.silence_experts(layer=LAYER, experts=0))
    weights = clean.tensor("router.weights", LAYER) * (clean.tensor("router.experts", LAYER) == 0)
    share = (clean.tensor("expert.out", LAYER) * weights[..., None]).sum(1)
    assert float(share.abs().max()) > 0.1
    torch.testing.assert_close(after.tensor("mlp.out", LAYER), clean.tensor("mlp.out", LAYER) - share, rtol=0,
                               atol=SITE_F32)


def test_peers_fail_at_position_slices_on_router_sites(small, ids) -> None:
    """The last token of router sites: (1, expert), not the last expert; and edits alike."""
    run, whole = (small.run(ids, capture=wb.capture("router", tokens=tokens)) for tokens in (-1, None))
    assert run.tensor("router.logits", 2).shape == (1, 8)
    assert torch.equal(run.tensor("router.logits", 2), whole.tensor("router.logits", 2)[-1:])
    edited = small.run(ids, capture="router", edits=wb.set("router.logits", 0.0, layer=2, tokens=-1))
    want = whole.tensor("router.logits", 2).clone()
    want[-1] = 0
    assert torch.equal(edited.tensor("router.logits", 2), want)


def test_peers_fail_at_left_padded_batches(small, ids) -> None:
    """Every verb at a position of the shorter row of a batch, against the row alone."""
    short = ids[7:13]
    other = small.run(short[::-1], capture=["mlp.out", "router", "attn.pattern"])
    edits = [wb.add("router.logits", 5.0, layer=0, tokens=2, expert=4),
             wb.patch("mlp.out", other, layer=1, tokens=[0, -1]),
             wb.cut_attention(layer=2, query=-1, key=[0, 2]), wb.set("attn.pattern", 0.1, layer=3, key=["sink", 1]),
             wb.scale_sink(2.0, layer=1, query=slice(1, 3)), wb.silence_experts(layer=2, experts=range(8), tokens=-2),
             wb.pin_attention(other, layer=0, query=[3]), wb.force_experts(layer=3, experts=7, tokens=slice(-3, None))]
    alone = small.run(short, edits=edits)
    for edit in edits:  # each alone, and all
        torch.testing.assert_close(small.run([ids, short], edits=for_second(edit))[1].logits,
                                   small.run(short, edits=edit).logits, rtol=0, atol=CACHE_F32)
    batch = small.run([ids, short], edits=[for_second(edit) for edit in edits])
    torch.testing.assert_close(batch[1].logits, alone.logits, rtol=0, atol=CACHE_F32)
    torch.testing.assert_close(batch[0].logits, small.run(ids).logits, rtol=0, atol=CACHE_F32)


def for_second(edit):
    """The same edit for the second prompt alone."""
    return dataclasses.replace(edit, place=dataclasses.replace(edit.place, prompt=1))


def test_negative_tokens_count_from_the_end_of_each_prompt(small, ids) -> None:
    edit = wb.zero("mlp.out", layer=0, tokens=[-1, -3])
    for run, prompt in zip(small.run([ids, ids[:5]], capture="mlp.out", edits=edit), (ids, ids[:5]), strict=True):
        gone = (run.tensor("mlp.out", 0) == 0).all(-1).nonzero()[:, 0].tolist()
        assert gone == [len(prompt) - 3, len(prompt) - 1]


# loud -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, words", [
    (lambda run: wb.zero("mlp.out", tokens=wb.where(channel="final")), "values of channel here: None"),
    (lambda run: wb.zero("mlp.out", tokens=wb.where(text="nowhere")), "values of text here"),
    (lambda run: wb.silence_experts(layer=0, experts=absent(run)), "experts that served there: "),
    (lambda run: wb.zero("expert.out", layer=0, expert=absent(run)), "experts that served there: "),
    (lambda run: wb.cut_attention(query=0, key=5), None),
    (lambda run: wb.zero("mlp.out", tokens=lambda text: False), "tokens are 0 to 4"),
])
def test_an_edit_that_finds_nothing_says_what_there_is(small, ids, make, words) -> None:
    """The prompt is short, so that some expert serves none of its tokens."""
    run = small.run(ids[:2], capture="router")
    prompt = ids[:2] if words and "served" in words else ids[:5]
    with pytest.raises(EditNeverFired, match=words) as caught:
        small.run(prompt, edits=make(run))
    assert str(caught.value).count("\n") < 6


def absent(run) -> int:
    return min({*range(8)} - {*run.tensor("router.experts", 0).flatten().tolist()})


@pytest.mark.parametrize("make, words", [
    (lambda: wb.set("resid_post", "much"), "must be numbers"),
    (lambda: wb.set("resid_post", [True]), "must be numbers"),
    (lambda: wb.set("resid_post", torch.zeros(7, 64), tokens=[1, 2, 3]), "one for each of 3"),
    (lambda: wb.add("resid_post", torch.zeros(20, 3)), "broadcasts to"),
    (lambda: wb.set("router.experts", 0.5, layer=0), "whole numbers"),
    (lambda: wb.set("router.experts", 8, layer=0, slot=0), "expert 0 to 7"),
    (lambda: wb.force_experts(layer=0, experts=9), "expert 0 to 7"),
    (lambda: wb.zero("expert.out", slot=0, expert=1), "by number or by expert"),
    (lambda: wb.zero("resid_post", expert=1), "no dimension 'expert'"),
    (lambda: wb.zero("attn.z", head=wb.where(role="user")), "can't be chosen by the labels"),
    (lambda: wb.noise("attn.scores", 1.0, seed=0), "no meaning"),
    (lambda: wb.noise("embed", math.nan, seed=0), "finite"),
    (lambda: wb.noise("embed", 1.0, seed=-1), "whole number"),
    (lambda: wb.steer("resid_post", layer=0, vector=3.0), "no direction"),
    (lambda: wb.steer("resid_post", layer=0, vector=[math.inf] * 64), "no direction"),
    (lambda: wb.steer("resid_post", layer=0, vector=torch.zeros(63)), "broadcasts to"),
    (lambda: wb.project("resid_post", torch.zeros(64)), "not independent"),
    (lambda: wb.project("resid_post", torch.ones(2, 64)), "not independent"),
    (lambda: wb.mean("attn.pattern", None), "no meaning"),
    (lambda: wb.mean("mlp.out", []), "no run"),
    (lambda: wb.mean("mlp.out", 5), "That is no run"),
    (lambda: wb.patch("mlp.out"), "needs a run, a tensor, or tokens"),
    (lambda: wb.patch("mlp.out", source=-1), "from the start"),
    (lambda: wb.patch("mlp.out", torch.zeros(20, 64), source=3), "row by row"),
    (lambda: wb.patch("mlp.out", source=[1, 2], tokens=[4, 5, 6]), "another number of tokens"),
    (lambda: wb.pin_attention(torch.zeros(2, 20, 21), layer=0), "broadcasts to"),
    (lambda: wb.pin_attention(torch.zeros(5, 21), layer=0), "another number of queries"),
    (lambda: wb.scale_sink(-1.0), "negative"),
    (lambda: wb.swap_experts(experts=[1, 1]), "between two"),
    (lambda: wb.router_temperature(0.0), "above 0"),
    (lambda: wb.zero("attn.scores", key="sink"), "wb.scale_sink"),
])
def test_mistakes_are_named(small, ids, make, words) -> None:
    with pytest.raises((EditError, SiteError), match=words) as caught:
        small.run(ids, edits=make())
    assert str(caught.value).count("\n") < 6
