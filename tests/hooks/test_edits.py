"""An edit does exactly what it says, at exactly its place, or raises."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gptoss_workbench as wb
from gptoss_workbench.errors import EditError, EditNeverFired, SiteError
from gptoss_workbench.hooks.sites import SITES
from tests.factories import tiny_model, write_hf
from tests.tolerances import SITE_F32, SUM_F32

N = 20
IDS = torch.randint(512, (N,), generator=torch.Generator().manual_seed(4)).tolist()
OTHER = torch.randint(512, (N,), generator=torch.Generator().manual_seed(8)).tolist()
FLOATS = [site for site in SITES if site != "router.experts"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    return wb.load(write_hf(tmp_path_factory.mktemp("tiny"), tiny_model(seed=6)), dtype="float32")


@pytest.fixture(scope="module")
def clean(tiny):
    return tiny.run(IDS, capture=list(SITES))


@pytest.fixture(scope="module")
def other(tiny):
    return tiny.run(OTHER, capture=list(SITES))


@st.composite
def places(draw):
    """A site, a layer, some tokens, and maybe a selection along one further dimension."""
    site = draw(st.sampled_from(FLOATS))
    spec = SITES[site]
    layer = draw(st.integers(0, 3)) if spec.per_layer else None
    tokens = draw(st.none() | st.integers(-N, N - 1) | st.lists(st.integers(0, N - 1), min_size=1, max_size=4))
    rest = [dim for dim in spec.dims if dim not in ("token", "query", "key")]
    dims = {}
    if rest and draw(st.booleans()):
        dim = draw(st.sampled_from(rest))
        dims[dim] = draw(st.integers(0, 1) | st.lists(st.integers(0, 1), min_size=1, max_size=2, unique=True))
    return site, layer, tokens, dims


def mask_of(site: str, tokens, dims, like: torch.Tensor) -> torch.Tensor:
    """By plain indexing: which entries of a site's tensor (no layer) the place means."""
    mask = torch.ones_like(like, dtype=torch.bool)
    for dim, selection in {SITES[site].token_dim: tokens, **dims}.items():
        if selection is not None:
            axis = SITES[site].dims.index(dim)
            line = torch.zeros(like.shape[axis], dtype=torch.bool)
            line[selection] = True
            mask &= line.view([-1 if a == axis else 1 for a in range(like.dim())])
    return mask


@given(places(), st.sampled_from(["set", "add", "scale", "zero", "apply"]))
@settings(max_examples=120)
def test_the_selected_entries_change_and_no_others(tiny, clean, place, verb) -> None:
    site, layer, tokens, dims = place
    by_hand = {"set": lambda x: torch.full_like(x, 0.5), "add": lambda x: x + 0.5, "scale": lambda x: x * 0.5,
               "zero": torch.zeros_like, "apply": lambda x: -x}[verb]
    arguments = {"set": (0.5,), "add": (0.5,), "scale": (0.5,), "zero": (), "apply": (lambda x: -x,)}[verb]
    edit = getattr(wb, verb)(site, *arguments, layer=layer, tokens=tokens, **dims)
    before, after = clean.tensor(site, layer), tiny.run(IDS, capture=site, edits=[edit]).tensor(site, layer)
    mask = mask_of(site, tokens, dims, before)
    assert torch.equal(after, torch.where(mask, by_hand(before), before).nan_to_num(nan=0.0)
                       if verb == "scale" and site == "attn.scores" else torch.where(mask, by_hand(before), before))


@given(places())
@settings(max_examples=60)
def test_identity_edits_are_bit_exact_no_ops(tiny, clean, place) -> None:
    site, layer, tokens, dims = place
    for edit in (wb.scale(site, 1.0, layer=layer, tokens=tokens, **dims),
                 wb.apply(site, lambda x: x, layer=layer, tokens=tokens, **dims)):
        assert torch.equal(tiny.run(IDS, edits=[edit]).hidden, clean.hidden)
    if "key" not in SITES[site].dims:
        same = wb.patch(site, clean, layer=layer, tokens=tokens, **dims)
        assert torch.equal(tiny.run(IDS, edits=[same]).hidden, clean.hidden)


@given(places(), st.integers(0, 3))
@settings(max_examples=60)
def test_patch_puts_the_other_runs_values_there(tiny, clean, other, place, _) -> None:
    site, layer, tokens, dims = place
    if "key" in SITES[site].dims:
        return
    run = tiny.run(IDS, capture=site, edits=[wb.patch(site, other, layer=layer, tokens=tokens, **dims)])
    mask = mask_of(site, tokens, dims, clean.tensor(site, layer))
    assert torch.equal(run.tensor(site, layer), torch.where(mask, other.tensor(site, layer), clean.tensor(site, layer)))


def test_patching_everything_at_one_layer_gives_the_other_run(tiny, other) -> None:
    run = tiny.run(IDS, edits=[wb.patch("resid_pre", other, layer=2)])
    torch.testing.assert_close(run.hidden, other.hidden, rtol=0, atol=SITE_F32)


def test_patch_from_other_positions(tiny, clean, other) -> None:
    edit = wb.patch("resid_mid", other, layer=1, tokens=[4, 9], source=[7, 2])
    run = tiny.run(IDS, capture="resid_mid", edits=[edit])
    assert torch.equal(run.tensor("resid_mid", 1)[[4, 9]], other.tensor("resid_mid", 1)[[7, 2]])


def test_adding_to_a_router_logit_reroutes(tiny, clean) -> None:
    """The peers' failing case: +100 on one expert's logit does something, and exactly what it must."""
    run = tiny.run(IDS, capture="router", edits=[wb.add("router.logits", 100.0, layer=1, expert=0)])
    assert (run.tensor("router.experts", 1)[:, 0] == 0).all()
    torch.testing.assert_close(run.tensor("router.weights", 1)[:, 0], torch.ones(N))
    assert (run.logits - clean.logits).abs().max() > 0.01


def test_banned_experts_never_serve_and_weights_renormalise(tiny, clean) -> None:
    banned = [2, 5]
    run = tiny.run(IDS, capture="router", edits=[wb.ban_experts(layer=2, experts=banned)])
    experts, weights = run.tensor("router.experts", 2), run.tensor("router.weights", 2)
    logits = clean.tensor("router.logits", 2).clone()
    logits[:, banned] = -math.inf
    assert torch.equal(experts, logits.topk(4).indices)
    torch.testing.assert_close(weights, torch.softmax(logits.topk(4).values, -1))
    assert torch.equal(run.tensor("router.experts", 1), clean.tensor("router.experts", 1))


def test_banning_equals_a_model_without_the_expert(tiny, tmp_path) -> None:
    """Second source: the same checkpoint with the expert's router bias at -1e4, so that it is never chosen."""
    spoilt = tiny_model(seed=6)
    spoilt.tensors["model.layers.1.mlp.router.bias"][3] = -1e4
    without = wb.load(write_hf(tmp_path / "spoilt", spoilt), dtype="float32")
    run = tiny.run(IDS, edits=[wb.ban_experts(layer=1, experts=3)])
    torch.testing.assert_close(run.logits, without.run(IDS).logits, rtol=0, atol=SUM_F32)


def test_forced_experts_serve_every_token_with_their_true_weights(tiny, clean) -> None:
    run = tiny.run(IDS, capture="router", edits=[wb.force_experts(layer=0, experts=[6, 1])])
    experts, logits = run.tensor("router.experts", 0), clean.tensor("router.logits", 0)
    assert all({1, 6} <= set(row.tolist()) and len(set(row.tolist())) == 4 for row in experts)
    for token in range(N):
        best = [e for e in logits[token].argsort(descending=True).tolist() if e not in (1, 6)][:2]
        assert set(experts[token].tolist()) == {1, 6, *best}
    torch.testing.assert_close(run.tensor("router.weights", 0), torch.softmax(logits.gather(-1, experts), -1))
    with pytest.raises(EditError, match="at most 4"):
        tiny.run(IDS, edits=[wb.force_experts(layer=0, experts=range(5))])


def test_replayed_routes(tiny, other) -> None:
    run = tiny.run(IDS, capture="router", edits=[wb.replay_routes(other)])
    assert torch.equal(run.tensor("router.experts"), other.tensor("router.experts"))
    live = run.tensor("router.logits").gather(-1, run.tensor("router.experts"))
    torch.testing.assert_close(run.tensor("router.weights"), torch.softmax(live, -1))
    unchanged = tiny.run(OTHER, edits=[wb.replay_routes(other)])
    assert torch.equal(unchanged.hidden, other.hidden)


def test_cut_attention_removes_the_key_and_renormalises(tiny, clean) -> None:
    run = tiny.run(IDS, capture="attn.pattern", edits=[wb.cut_attention(layer=0, query=[5, 6], key=4, head=2)])
    pattern, before = run.tensor("attn.pattern", 0), clean.tensor("attn.pattern", 0)
    assert (pattern[2, [5, 6], 4] == 0).all()
    kept = before.clone()
    kept[2, 5:7, 4] = 0
    torch.testing.assert_close(pattern, kept / kept.sum(-1, keepdim=True))


def test_the_sink_can_be_edited_by_name(tiny, clean) -> None:
    run = tiny.run(IDS, capture="attn.pattern", edits=[wb.zero("attn.pattern", layer=1, key="sink")])
    want = clean.tensor("attn.pattern", 1).clone()
    want[..., -1] = 0
    assert torch.equal(run.tensor("attn.pattern", 1), want)
    assert torch.equal(run.hidden, clean.hidden)  # the sink adds nothing to the values


def test_steer_and_mean(tiny, clean) -> None:
    v = torch.linspace(-1, 1, 64)
    run = tiny.run(IDS, capture="resid_post", edits=[wb.steer("resid_post", layer=1, vector=v, scale=4, tokens=-1)])
    torch.testing.assert_close(run.tensor("resid_post", 1)[-1], clean.tensor("resid_post", 1)[-1] + 4 * v)
    run = tiny.run(IDS, capture="attn.out", edits=[wb.mean("attn.out", clean, layer=1)])
    torch.testing.assert_close(run.tensor("attn.out", 1), clean.tensor("attn.out", 1).mean(0).expand(N, -1))


def test_a_list_of_edits_acts_in_order(tiny, clean) -> None:
    first, then = wb.scale("mlp.out", 2.0, layer=1), wb.add("mlp.out", 1.0, layer=1)
    def out(edits):
        return tiny.run(IDS, capture="mlp.out", edits=edits).tensor("mlp.out", 1)
    x = clean.tensor("mlp.out", 1)
    assert torch.equal(out([first, then]), x * 2 + 1)
    assert torch.equal(out([then, first]), (x + 1) * 2)


def test_rows_of_a_batch_are_edited_apart(tiny, clean) -> None:
    edits = [wb.zero("attn.out", layer=0, tokens=-1, prompt=1), wb.zero("attn.out", layer=0, tokens=0, prompt=2)]
    batch = tiny.run([IDS, IDS[:7], IDS], capture="attn.out", edits=edits)
    assert (batch[1].tensor("attn.out", 0)[-1] == 0).all()
    assert (batch[2].tensor("attn.out", 0)[0] == 0).all()
    torch.testing.assert_close(batch[0].tensor("attn.out", 0), clean.tensor("attn.out", 0), rtol=0, atol=SITE_F32)
    alone = tiny.run(IDS[:7], edits=[wb.zero("attn.out", layer=0, tokens=-1)])
    torch.testing.assert_close(batch[1].hidden, alone.hidden, rtol=0, atol=SITE_F32)


@pytest.mark.parametrize("site", FLOATS)
def test_every_site_reaches_the_output(tiny, clean, site: str) -> None:
    """No edit is inert: a large change anywhere moves the logits, or the logits themselves."""
    layer = 1 if SITES[site].per_layer else None
    def shake(x):
        wave = 3.0 * torch.sin(torch.arange(x.numel()).view(x.shape))
        return torch.where(x.isfinite(), x + wave, x)

    edit = wb.apply(site, shake, layer=layer)
    assert (tiny.run(IDS, edits=[edit]).logits - clean.logits).abs().max() > 1e-3


def test_an_edit_that_never_fires_is_an_error(tiny) -> None:
    for edit in (wb.zero("resid_pre", tokens=slice(50, None)), wb.zero("attn.pattern", key=[25]),
                 wb.zero("mlp.out", tokens=[])):
        with pytest.raises(EditNeverFired, match="never fired"):
            tiny.run(IDS, edits=[edit])


@pytest.mark.parametrize("make, words", [
    (lambda: wb.zero("resid_pst"), "resid_post"),
    (lambda: wb.zero("resid_post", head=1), "no dimension 'head'"),
    (lambda: wb.zero("embed", layer=0), "has no layers"),
    (lambda: wb.zero("resid_post", layer="3"), "an index, a slice"),
    (lambda: wb.zero("resid_post", layer=4), "layer 0 to 3"),
    (lambda: wb.zero("resid_post", tokens=N), f"token 0 to {N - 1}"),
    (lambda: wb.zero("attn.z", head=8), "head 0 to 7"),
    (lambda: wb.ban_experts(layer=0, experts=[8]), "expert 0 to 7"),
    (lambda: wb.ban_experts(layer=0, experts=[]), "at least one expert"),
    (lambda: wb.ban_experts(layer=0, experts=range(5)), "at least 4 of 8"),
    (lambda: wb.zero("resid_post", prompt=1), "prompt 0 to 0"),
    (lambda: wb.set("resid_post", torch.zeros(3)), "broadcasts to"),
    (lambda: wb.apply("resid_post", 3), "a function"),
    (lambda: wb.cut_attention(layer=0, key="sink"), "an index, a slice|no sink"),
    (lambda: "ban", "takes edits"),
])
def test_mistakes_are_named(tiny, make, words) -> None:
    with pytest.raises((SiteError, EditError), match=words) as caught:
        tiny.run(IDS, edits=[make()])
    assert str(caught.value).count("\n") < 6


def test_nothing_stays(tiny, clean) -> None:
    """After errors and interrupts in an edit the next run has the same bits."""
    def interrupt(x):
        raise KeyboardInterrupt

    weights = {name: t.clone() for name, t in tiny.weights.tensors() if isinstance(t, torch.Tensor)}
    with pytest.raises(KeyboardInterrupt):
        tiny.run(IDS, edits=[wb.apply("attn.out", interrupt, layer=2)])
    with pytest.raises(EditError):
        tiny.run(IDS, edits=[wb.set("attn.out", torch.zeros(3), layer=3)])
    assert torch.equal(tiny.run(IDS).hidden, clean.hidden)
    assert all(torch.equal(weights[name], t) for name, t in tiny.weights.tensors() if isinstance(t, torch.Tensor))


def test_edits_print_what_they_do() -> None:
    assert repr(wb.add("router.logits", 100.0, layer=1, expert=0)) == \
        "wb.add('router.logits', 100.0, layer=1, expert=0)"
    assert repr(wb.ban_experts(layer=5, experts=[3, 7])) == "wb.ban_experts(layer=5, experts=(3, 7))"
