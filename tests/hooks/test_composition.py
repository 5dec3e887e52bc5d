"""How edits go together: identities do nothing, lists are sequences, disjoint ones commute, batches agree."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import gptoss_workbench as wb
from gptoss_workbench.errors import EditError, EditNeverFired
from gptoss_workbench.hooks.sites import SITES
from tests.hooks.strategies import FLOATS, N, edits, for_prompt, layers, looks_ahead, selections, tensors, tokens
from tests.tolerances import SITE_F32

IDS = torch.randint(512, (N,), generator=torch.Generator().manual_seed(4)).tolist()
ONE_LAYER = st.integers(0, 3)


@pytest.fixture(scope="module")
def clean(small):
    return small.run(IDS, capture=list(SITES))


@pytest.fixture(scope="module")
def clean_bf16(small_bf16):
    return small_bf16.run(IDS, capture=list(SITES))


@pytest.fixture(scope="module")
def other(small):
    return small.run(IDS[::-1], capture=list(SITES))


def run(model, some, **options):
    """A run under random edits; a list that never fires or leaves too few experts is another example's business."""
    try:
        return model.run(IDS, edits=some, **options)
    except EditNeverFired:
        assume(False)
    except EditError as error:
        assume("Too many experts" not in str(error) and "More experts are forced" not in str(error))
        raise


@st.composite
def identities(draw, clean):
    """Edits that put back what is there."""
    site = draw(st.sampled_from(FLOATS))
    at = {"layer": draw(layers) if SITES[site].per_layer else None, "tokens": draw(tokens)}
    within = {**at, **draw(selections(site))}
    routed = {"layer": draw(layers), "tokens": draw(tokens)}
    seen = {"layer": routed["layer"], "query": routed["tokens"]}
    vector = draw(tensors(64))
    return draw(st.sampled_from([
        wb.scale(site, 1.0, **within), wb.apply(site, lambda x: x, **within), wb.apply(site, torch.clone, **within),
        wb.add(site, 0.0, **within), wb.noise("embed", 0.0, seed=1, tokens=at["tokens"]),
        wb.steer("resid_mid", vector=vector, scale=0.0, **routed), wb.router_temperature(1.0, **routed),
        wb.scale_sink(1.0, **seen), wb.replay_routes(clean, **routed), wb.pin_attention(clean, **seen),
        *([] if "key" in SITES[site].dims else [wb.patch(site, clean, **within)]),
        wb.patch("router.experts", clean, **routed),
    ]))


@given(st.data())
@settings(max_examples=80)
def test_identity_edits_change_no_bit(small, small_bf16, clean, clean_bf16, data) -> None:
    for model, plain in ((small, clean), (small_bf16, clean_bf16)):
        some = data.draw(st.lists(identities(plain), min_size=1, max_size=3))
        after = run(model, some, capture=["logits", "router.experts"])
        for site in ("logits", "router.experts"):
            assert torch.equal(after.tensor(site), plain.tensor(site)), some


@given(st.data())
@settings(max_examples=80)
def test_a_list_is_one_edit_after_the_other(small, clean, data) -> None:
    """At one place: the values after a list are those of its last edit, applied to what the others left."""
    site, layer = data.draw(st.sampled_from(FLOATS)), data.draw(ONE_LAYER)
    at = layer if SITES[site].per_layer else None
    verbs = {"set": lambda x, v: torch.full_like(x, v), "add": lambda x, v: x + v, "scale": lambda x, v: x * v}
    some, want = [], clean.tensor(site, at)
    for _ in range(data.draw(st.integers(2, 4))):
        verb, value = data.draw(st.sampled_from(sorted(verbs))), data.draw(st.sampled_from([0.5, -1.5, 2.0]))
        positions = data.draw(st.none() | st.lists(st.integers(0, N - 1), min_size=1, max_size=5, unique=True))
        some.append(getattr(wb, verb)(site, value, layer=at, tokens=positions))
        axis = SITES[site].dims.index(SITES[site].token_dim)
        mask = torch.zeros(N, dtype=torch.bool)
        mask[list(range(N)) if positions is None else positions] = True
        want = torch.where(mask.view([-1 if a == axis else 1 for a in range(want.dim())]),
                           verbs[verb](want, value), want)
    found = run(small, some, capture=site).tensor(site, at)
    torch.testing.assert_close(found, want, rtol=0, atol=0, equal_nan=True)


@given(st.data())
@settings(max_examples=60)
def test_two_lists_joined_are_the_first_and_then_the_second(small, clean, other, data) -> None:
    """Freezing the site after the first list and applying the second to it gives what both give together."""
    layer = data.draw(ONE_LAYER)
    def some(count):
        return [wb.add("resid_mid", data.draw(tensors(64)), layer=layer, tokens=data.draw(tokens))
                if data.draw(st.booleans()) else
                wb.patch("resid_mid", other, layer=layer, tokens=data.draw(tokens)) for _ in range(count)]
    first, second = some(2), some(2)
    between = run(small, first, capture="resid_mid")
    both = run(small, [*first, *second], capture=["resid_mid", "logits"])
    apart = run(small, [wb.patch("resid_mid", between, layer=layer), *second], capture=["resid_mid", "logits"])
    for site in ("resid_mid", "logits"):
        assert torch.equal(both.tensor(site), apart.tensor(site))


@given(st.data())
@settings(max_examples=80)
def test_edits_at_disjoint_places_commute(small, other, data) -> None:
    """Different layers, different sites, or different tokens of one site: the order of the list does not matter."""
    how = data.draw(st.sampled_from(["layers", "sites", "tokens", "experts"]))
    if how == "layers":
        a, b = data.draw(st.permutations(range(4)))[:2]
        pair = [wb.scale("attn.z", 0.5, layer=a, head=1), wb.cut_attention(layer=b, key=0, query=slice(3, None))]
        pair += [wb.force_experts(layer=a, experts=2), wb.ban_experts(layer=b, experts=2)]
    elif how == "sites":
        a, b = data.draw(st.permutations([site for site in FLOATS if SITES[site].per_layer]))[:2]
        pair = [wb.scale(a, 0.5, layer=2), wb.scale(b, 2.0, layer=2)]
    elif how == "tokens":
        cut = data.draw(st.integers(1, N - 1))
        pair = [wb.patch("resid_pre", other, layer=1, tokens=slice(0, cut)),
                wb.noise("resid_pre", 0.5, seed=3, layer=1, tokens=slice(cut, None))]
    else:
        pair = [wb.add("router.logits", 3.0, layer=1, expert=[0, 1]),
                wb.scale("router.logits", -1.0, layer=1, expert=[5])]
    order = data.draw(st.permutations(range(len(pair))))
    forward, backward = (run(small, some) for some in (pair, [pair[number] for number in order]))
    assert torch.equal(forward.hidden, backward.hidden)


@given(st.data())
@settings(max_examples=60)
def test_any_edits_act_alike_alone_in_chunks_and_in_a_batch(small, other, data) -> None:
    """Routes may flip where two experts are about equal, so only those examples count where they did not."""
    some = data.draw(st.lists(edits(other), min_size=1, max_size=3))
    within = any(edit.name == "patch" and dict(edit.args)["run"] is None for edit in some)
    whole = run(small, some, capture=["resid_post", "router.experts"])
    chunked = run(small, some, capture=["resid_post", "router.experts"], chunk=data.draw(st.integers(3, 7)))
    ways = [] if any(map(looks_ahead, some)) else [chunked]
    if not within:
        ways.append(small.run([IDS[:5] * 4, IDS], edits=[for_prompt(edit, 1) for edit in some],
                              capture=["resid_post", "router.experts"])[1])
    for way in ways:
        assume(torch.equal(way.tensor("router.experts"), whole.tensor("router.experts")))
        scale = max(1.0, float(whole.tensor("resid_post").nan_to_num().abs().max()) / 40)
        torch.testing.assert_close(way.tensor("resid_post"), whole.tensor("resid_post"), rtol=0, atol=SITE_F32 * scale,
                                   equal_nan=True)


@given(st.data())
@settings(max_examples=30)
def test_any_edits_act_alike_while_generating(small, other, data) -> None:
    """What a generation captured is what one run over its text captures under the same edits."""
    some = data.draw(st.lists(edits(other), min_size=1, max_size=2))
    assume(all(edit.place.tokens is None or not isinstance(edit.place.tokens, int | tuple) for edit in some))
    assume(not any(edit.name in ("mean", "patch", "pin_attention") for edit in some))
    assume(all("key" not in dict(edit.place.dims) for edit in some))
    run(small, some)
    gen = small.generate(IDS, edits=some, capture=["resid_post", "router.experts"], max_tokens=5, stop=[])
    steps = gen.finish().run()
    # Negative ends of slices count from the end of the prompt, which another run does not know.
    assume(all("-" not in repr(edit.place.tokens) for edit in some))
    again = small.run(gen.ids[:-1], edits=some, capture=["resid_post", "router.experts"])
    assume(torch.equal(steps.tensor("router.experts"), again.tensor("router.experts")))
    size = max(1.0, float(again.tensor("resid_post").nan_to_num().abs().max()) / 40)
    torch.testing.assert_close(steps.tensor("resid_post"), again.tensor("resid_post"), rtol=0, atol=SITE_F32 * size,
                               equal_nan=True)
