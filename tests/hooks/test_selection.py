"""Only what is asked for is kept: tokens by what they are, heads, experts and prompts; and its size is known before."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import gptoss_workbench as wb
from gptoss_workbench.errors import CaptureTooLarge, SiteError, WorkbenchError
from gptoss_workbench.hooks import budget
from gptoss_workbench.hooks.sites import EVERY, SITES
from tests.tolerances import SITE_F32

CHAT = dict(effort="high", developer="Be brief.")


@pytest.fixture(scope="module")
def answered(model) -> list[int]:
    """A whole answer of the embedded model: every channel occurs."""
    return model.generate(wb.chat("What is 27 + 58?", **CHAT), max_tokens=150).ids


@pytest.fixture(scope="module")
def everything(small, ids):
    return small.run(ids, capture=list(SITES))


def by_hand(model, ids: list[int], keep) -> list[int]:
    """Positions whose label in a plain run satisfies ``keep(text, channel, role, field)``."""
    labels = model.run(ids).token_coords("token")
    return [t for t in range(len(ids)) if keep(*(labels[name][1][t] for name in ("text", "channel", "role", "field")))]


SELECTIONS = {
    "channel": (wb.where(channel="analysis"), lambda text, channel, role, field: channel == "analysis"),
    "channel and field": (wb.where(channel=["analysis", "final"], field="content"),
                          lambda text, channel, role, field: channel in ("analysis", "final") and field == "content"),
    "role": (wb.where(role="user"), lambda text, channel, role, field: role == "user"),
    "no channel": (wb.where(channel=None, field="content"),
                   lambda text, channel, role, field: channel is None and field == "content"),
    "text": (wb.where(text=["user", "analysis"]), lambda text, channel, role, field: text in ("user", "analysis")),
    "expression": (wb.where(matching=r"\d"), lambda text, channel, role, field: re.search(r"\d", text) is not None),
    "function": (str.isdigit, lambda text, channel, role, field: text.isdigit()),
    "function and channel": (wb.where(test=str.isdigit, channel="final"),
                             lambda text, channel, role, field: text.isdigit() and channel == "final"),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_tokens_by_what_they_are(model, answered, name) -> None:
    selection, keep = SELECTIONS[name]
    expected = by_hand(model, answered, keep)
    whole = model.run(answered, capture=["resid_mid", "attn.pattern"])
    run = model.run(answered, capture=wb.capture(["resid_mid", "attn.pattern"], tokens=selection))
    assert expected and run.positions == expected and run.data["token"].values.tolist() == expected
    assert torch.equal(run.tensor("resid_mid"), whole.tensor("resid_mid")[:, expected])
    assert torch.equal(run.tensor("attn.pattern"), whole.tensor("attn.pattern")[:, :, expected])


def test_tokens_by_span(model, answered) -> None:
    run = model.run(answered, capture="mlp.out")
    spans = [span for span in run.spans if span.field == "content"][-2:]
    one = model.run(answered, capture=wb.capture("mlp.out", tokens=spans[0]))
    assert one.positions == list(range(spans[0].start, spans[0].stop))
    two = model.run(answered, capture=wb.capture("mlp.out", tokens=spans))
    assert two.positions == [t for span in spans for t in range(span.start, span.stop)]
    assert torch.equal(two.tensor("mlp.out"), run.tensor("mlp.out")[:, two.positions])


def test_labels_of_generated_tokens_select_too(model) -> None:
    """The selection goes on while text is generated, and is what a run over the finished text would select."""
    chosen = wb.where(channel="analysis", field="content")
    gen = model.generate(wb.chat("What is 27 + 58?", **CHAT), capture=wb.capture("resid_post", tokens=chosen),
                         max_tokens=150).finish()
    whole = model.run(gen.ids[:-1], capture=wb.capture("resid_post", tokens=chosen))
    assert len(whole.positions) > 1 and gen.run().positions == whole.positions
    torch.testing.assert_close(gen.run().tensor("resid_post"), whole.tensor("resid_post"), rtol=0, atol=1e-3)
    assert gen.data["channel"].values.tolist() == ["analysis"] * len(whole.positions)


def test_each_prompt_of_a_batch_has_its_own_tokens(model) -> None:
    prompts = [model.encode(wb.chat(text)) for text in ("What is 27 + 58?", "Name the capital of France, please.")]
    chosen = wb.capture(["resid_post", "attn.pattern"], tokens=wb.where(role="user", field="content"))
    batch = model.run(prompts, capture=chosen)
    for run, prompt in zip(batch, prompts, strict=True):
        alone = model.run(prompt, capture=chosen)
        assert run.positions == alone.positions
        torch.testing.assert_close(run.tensor("attn.pattern"), alone.tensor("attn.pattern"), rtol=0, atol=SITE_F32)
    assert batch.data.sizes["token"] == max(len(run.positions) for run in batch)


@pytest.mark.parametrize("site", [site for site in SITES if "head" in SITES[site].dims])
@pytest.mark.parametrize("heads", [3, [1, 6], slice(5, None), -1])
def test_heads(small, ids, everything, site, heads) -> None:
    run = small.run(ids, capture=wb.capture(site, heads=heads, layers=[1, 2], tokens=slice(3, 9)))
    expected = [heads % 8] if isinstance(heads, int) else list(range(8))[heads] if isinstance(heads, slice) else heads
    assert run.data["head"].values.tolist() == expected
    whole = everything.tensor(site)[1:3]
    axis = 1 + SITES[site].dims.index("head")
    token_axis = 1 + SITES[site].dims.index(SITES[site].token_dim)
    want = whole.index_select(axis, torch.tensor(expected)).narrow(token_axis, 3, 6)
    assert torch.equal(run.tensor(site), want)


def test_key_heads_and_what_a_selection_leaves_whole(small, ids, everything) -> None:
    run = small.run(ids, capture=wb.capture(["attn.q", "attn.k", "attn.v", "mlp.out"], heads=2, kv_heads=1))
    assert torch.equal(run.tensor("attn.k"), everything.tensor("attn.k")[:, :, [1]])
    assert torch.equal(run.tensor("attn.q"), everything.tensor("attn.q")[:, :, [2]])
    assert torch.equal(run.tensor("mlp.out"), everything.tensor("mlp.out"))
    assert run.data["kv_head"].values.tolist() == [1] and run.data["head"].values.tolist() == [2]


def test_experts_of_the_router(small, ids, everything) -> None:
    run = small.run(ids, capture=wb.capture("router.logits", experts=[5, 0]))
    assert torch.equal(run.tensor("router.logits"), everything.tensor("router.logits")[..., [5, 0]])
    assert run.data["expert"].values.tolist() == [5, 0]


@pytest.mark.parametrize("site", [site for site in SITES if "slot" in SITES[site].dims])
def test_experts_of_the_slots(small, ids, everything, site) -> None:
    """The slot of each token that an expert had, by a loop; blank where it had none."""
    experts = [2, 7]
    run = small.run(ids, capture=wb.capture(site, experts=experts, layers=2, tokens=[0, 3, 4, 11]))
    served, values = everything.tensor("router.experts", 2), everything.tensor(site, 2)
    assert run.data[site].dims[:3] == ("layer", "token", "expert")
    hits = 0
    for row, token in enumerate([0, 3, 4, 11]):
        for column, expert in enumerate(experts):
            found = run.tensor(site, 2)[row, column]
            if expert in served[token].tolist():
                assert torch.equal(found, values[token, served[token].tolist().index(expert)])
                hits += 1
            else:
                assert (found == -1).all() if site == "router.experts" else found.isnan().all()
    assert 0 < hits < 8


def test_experts_follow_the_edits(small, ids) -> None:
    edits = [wb.force_experts(layer=1, experts=[6])]
    run = small.run(ids, capture=wb.capture("router.weights", experts=6, layers=1), edits=edits)
    whole = small.run(ids, capture="router", edits=edits)
    at = (whole.tensor("router.experts", 1) == 6).nonzero()[:, 1]
    assert torch.equal(run.tensor("router.weights", 1)[:, 0], whole.tensor("router.weights", 1)[range(len(ids)), at])


def test_prompts_of_a_batch(small, ids) -> None:
    batch = small.run([ids, ids[:5], ids[3:9]], capture=wb.capture(["resid_post", "attn.entropy"], prompts=[0, 2]))
    whole = small.run([ids, ids[:5], ids[3:9]], capture=["resid_post"])
    assert batch.data["prompt"].values.tolist() == [0, 2]
    for row in (0, 2):
        assert torch.equal(batch[row].tensor("resid_post"), whole[row].tensor("resid_post"))
    with pytest.raises(SiteError, match="holds no 'resid_post'"):
        batch[1].tensor("resid_post")
    both = (batch.data["resid_post"].sel(prompt=2), whole.data["resid_post"].sel(prompt=2))
    np.testing.assert_array_equal(*(data.values[:, -6:] for data in both))


# memory -----------------------------------------------------------------------------------------------------------


def bytes_held(runs) -> int:
    """Bytes of the memory behind what some runs keep. Two sites may share theirs: resid_post is the next resid_pre."""
    memory = [(place, tensor.untyped_storage()) for run in runs for place, tensor in run._kept.items()]
    return sum({(place, storage.data_ptr()): storage.nbytes() for place, storage in memory}.values())


CAPTURES = {
    "all sites": dict(names=list(SITES)),
    "all statistics": dict(names=["attn.pooled"], spans=[(0, 2), (3, 5)]),
    "one half of a split tensor": dict(names="expert.gate"),
    "one token": dict(names=list(SITES), tokens=-1),
    "some tokens and layers": dict(names=["resid", "attn.pattern", "router"], tokens=[0, 2, 3], layers=[1, 3]),
    "heads": dict(names=["attn.q", "attn.pattern", "attn.z"], heads=[2, 5], tokens=slice(2, 4)),
    "key heads": dict(names=["attn.k", "attn.v"], kv_heads=0),
    "experts": dict(names=["router.logits", "router.experts", "expert"], experts=[1, 3, 6]),
    "top": dict(names="attn.top", top=3, heads=1),
}


@pytest.mark.parametrize("name", CAPTURES)
@pytest.mark.parametrize("how", ["alone", "batch", "padded batch", "some prompts", "chunks", "bfloat16"])
def test_the_plan_is_what_is_kept(small, small_bf16, ids, name, how) -> None:
    capture = wb.capture(**CAPTURES[name], **({"prompts": [1, 2]} if how == "some prompts" else {}))
    prompts = {"alone": [ids], "bfloat16": [ids], "chunks": [ids], "batch": [ids, ids[::-1]]}.get(
        how, [ids, ids[:7], ids[2:11]])
    model = small_bf16 if how == "bfloat16" else small
    runs = model.run(prompts, capture=capture, chunk=6 if how == "chunks" else None)
    plan = model.plan(prompts, capture)
    assert {item.name for item in plan.items} == {*capture.names}
    assert plan.nbytes == bytes_held(runs), str(plan)
    assert plan.fits and plan.free > plan.nbytes


def test_the_plan_of_a_generation(small, ids) -> None:
    capture = wb.capture(["resid", "router", "attn.z"], tokens=slice(2, None))
    gen = small.generate(ids, capture=capture, max_tokens=7, stop=[]).finish()
    last = small.plan([*ids, 0], capture).nbytes - small.plan(ids, capture).nbytes  # chosen, but not read
    assert small.plan(ids, capture, max_tokens=7).nbytes - last == bytes_held([gen.run()])


def test_a_plan_prints(small, ids) -> None:
    text = str(small.plan(ids, wb.capture(["attn.pattern", "resid_post"], layers=[0, 1])))
    assert "attn.pattern            26.9 kB  2 layers x 8 head x 20 query x 21 key" in text
    assert "together" in text and "free" in text


@pytest.mark.parametrize("capture, part", [
    (dict(names=["attn.pattern", "resid_post", "logits"]), 0.6), (dict(names=["attn.pattern", "resid_post"]), 0.1),
    (dict(names=["resid_post", "logits"]), 0.05), (dict(names="attn.pattern", layers=[2]), 0.5),
])
def test_a_capture_that_does_not_fit_says_what_does(small, ids, capture, part, monkeypatch) -> None:
    """The selections that it offers are tried: each fits, and with one layer or token more it does not."""
    asked = wb.capture(**capture)
    room = int(small.plan(ids, asked).nbytes * part)
    monkeypatch.setattr(wb.model.model, "available", lambda device: room)
    monkeypatch.setattr(wb.model.model, "WORTH_CHECKING", 0)
    with pytest.raises(CaptureTooLarge, match="would not fit") as caught:
        small.run(ids, capture=asked)
    with pytest.raises(CaptureTooLarge):
        small.generate(ids, capture=asked)
    assert str(caught.value).count("\n") < 6
    offered, hint = 0, str(caught.value.hint)
    for number in re.findall(r"layers=slice\((\d+), None\)", hint):
        smaller = dict(capture, layers=slice(int(number), None))
        assert small.plan(ids, wb.capture(**smaller)).fits
        assert not small.plan(ids, wb.capture(**dict(capture, layers=slice(int(number) - 1, None)))).fits
        offered += 1
    for number in re.findall(r"tokens=slice\((-\d+), None\)", hint):
        assert small.plan(ids, wb.capture(**dict(capture, tokens=slice(int(number), None)))).fits
        assert not small.plan(ids, wb.capture(**dict(capture, tokens=slice(int(number) - 1, None)))).fits
        small.run(ids, capture=wb.capture(**dict(capture, tokens=slice(int(number), None))))
        offered += 1
    assert offered


def test_a_size_that_nothing_fits() -> None:
    plan = budget.CapturePlan((budget.Item("resid_post", (("token", 1), ("d_model", 64)), 1, 256),), 1, 1, 100)
    with pytest.raises(CaptureTooLarge, match="nothing smaller fits"):
        budget.check(wb.capture("resid_post"), plan)


# what does not exist ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, words", [
    (lambda: wb.capture("attn.patern"), "attn.pattern"),
    (lambda: wb.capture("attn.entropi"), "attn.entropy"),
    (lambda: wb.capture("resid_post", heads=0), "No site of this capture has a dimension 'head'"),
    (lambda: wb.capture("attn.q", heads=8), "head 0 to 7"),
    (lambda: wb.capture("attn.k", kv_heads=2), "kv_head 0 to 1"),
    (lambda: wb.capture("router", experts=[0, 8]), "expert 0 to 7"),
    (lambda: wb.capture("router", prompts=1), "prompt 0 to 0"),
    (lambda: wb.capture("attn.q", heads=wb.where(role="user")), "can't be chosen by the labels"),
    (lambda: wb.capture("router", tokens="analysis"), "wb.where"),
    (lambda: wb.capture("router", tokens=slice(50, None)), "selects no token"),
    (lambda: wb.capture("router", tokens=[]), "selects no token"),
    (lambda: wb.capture("router", tokens=wb.where(channel="final")), r"channel here: None"),
    (lambda: wb.capture("router", tokens=slice(None, None, -1)), "forwards"),
    (lambda: wb.capture("attn.top", top=0), "1 or more"),
    (lambda: wb.capture("attn.span_mass", spans=[(0, 4), (3, 6)]), "overlap"),
    (lambda: wb.where(speaker="user"), "no label 'speaker'"),
    (lambda: wb.where(), "not told"),
    (lambda: wb.where(matching="("), "no regular expression"),
    (lambda: wb.where(test=3), "no function"),
])
def test_captures_of_what_does_not_exist(small, ids, make, words) -> None:
    with pytest.raises(WorkbenchError, match=words) as caught:
        small.run(ids, capture=make())
    assert str(caught.value).count("\n") < 6


def test_a_capture_is_a_value() -> None:
    def made():
        return wb.capture(["router", "attn.top"], layers=slice(2, None), tokens=wb.where(channel=["a", "b"]), top=3)

    assert made() == made() and hash(made()) == hash(made())
    assert made() != wb.capture(["router", "attn.top"], layers=slice(2, 3), tokens=wb.where(channel=["a", "b"]), top=3)
    assert {*EVERY} == {*wb.SITES, *wb.POOLED}


def test_the_table_of_sites_has_every_tap() -> None:
    """No tap of the forward pass is missing from the table, and no site is without its tap."""
    source = Path(wb.model.transformer.__file__).read_text() + Path(wb.model.model.__file__).read_text()
    assert {*re.findall(r'taps?\(\s*"([a-z_.]+)"', source)} == {*SITES}


@pytest.mark.parametrize("mask", [[True, False] * 10, torch.ones(20, dtype=torch.bool), np.ones(20, dtype=bool)])
def test_a_mask_is_refused(small, ids, mask) -> None:
    """Read as indices it would mean the tokens 0 and 1."""
    for make in (lambda: wb.capture("router", tokens=mask), lambda: wb.zero("mlp.out", tokens=mask)):
        with pytest.raises(SiteError, match="A mask is no selection"):
            make()


@pytest.mark.parametrize("call, words", [
    (lambda model, ids: model.run(ids, capture=wb.capture("attn.z", heads=[])), "selects no head"),
    (lambda model, ids: model.run(ids, capture=wb.capture("router", experts=[])), "selects no expert"),
    (lambda model, ids: model.run(ids, capture=wb.capture("attn.span_mass", spans=[3])), r"pairs \(start, stop\)"),
    (lambda model, ids: model.run(ids, capture=wb.capture("attn.span_mass", spans=["ab"])), r"pairs \(start, stop\)"),
    (lambda model, ids: model.run(ids, capture=[["router"]]), "named by a string"),
    (lambda model, ids: model.run(ids, edits=wb.zero(["mlp.out"])), "named by a string"),
    (lambda model, ids: model.run(ids, edits=5), "takes edits"),
    (lambda model, ids: model.generate(ids, edits="ban"), "takes edits"),
    (lambda model, ids: wb.gradients(model, ids, wb.logit_diff(1, 2), edits=5), "takes edits"),
    (lambda model, ids: model.run(ids, chunk=0), "1 or more"),
    (lambda model, ids: model.run(ids, chunk=-3), "1 or more"),
    (lambda model, ids: model.run(ids, chunk=2.5), "1 or more"),
])
def test_odd_arguments_are_named(small, ids, call, words) -> None:
    with pytest.raises(WorkbenchError, match=words) as caught:
        call(small, ids)
    assert str(caught.value).count("\n") < 6


def test_where_neither_a_layer_nor_a_token_is_little_enough_both_together_are(small, ids, monkeypatch) -> None:
    asked = wb.capture("resid_post")
    both = small.plan(ids, wb.capture("resid_post", layers=-1, tokens=slice(-2, None))).nbytes
    monkeypatch.setattr(wb.model.model, "available", lambda device: both)
    monkeypatch.setattr(wb.model.model, "WORTH_CHECKING", 0)
    with pytest.raises(CaptureTooLarge, match=r"fits: layers=-1, tokens=slice\(-2, None\)"):
        small.run(ids, capture=asked)
    small.run(ids, capture=wb.capture("resid_post", layers=-1, tokens=slice(-2, None)))
    with pytest.raises(CaptureTooLarge):
        small.run(ids, capture=wb.capture("resid_post", layers=-1, tokens=slice(-3, None)))
