"""Edits are values: they print as the call that makes them, compare and hash by content, and go to JSON and back."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gptoss_workbench as wb
from gptoss_workbench.errors import EditError, SiteError
from gptoss_workbench.hooks.changes import KINDS
from gptoss_workbench.hooks.sites import SITES
from tests.hooks.strategies import N, edits

IDS = torch.randint(512, (N,), generator=torch.Generator().manual_seed(4)).tolist()


@pytest.fixture(scope="module")
def other(small):
    return small.run(IDS[::-1], capture=list(SITES))


@given(st.data())
@settings(max_examples=150)
def test_json_and_back(small, other, data) -> None:
    edit = data.draw(edits(other))
    text = edit.to_json()
    back = wb.edit_from_json(text)
    assert back == edit and hash(back) == hash(edit) and repr(back) == repr(edit)
    assert back.to_json() == text and "\n" not in text
    json.loads(text, parse_constant=pytest.fail)  # no NaN or Infinity, which JSON does not have


@given(st.data())
@settings(max_examples=150)
def test_print_and_back(other, data) -> None:
    """What does not hold a large tensor or a run prints as the call that makes it."""
    edit = data.draw(edits(other))
    text = repr(edit)
    assert text.startswith(f"wb.{edit.name}(") and text.endswith(")")
    if "<" not in text:
        assert eval(text, {"wb": wb}) == edit


@given(st.data())
@settings(max_examples=25)
def test_what_comes_back_does_the_same(small, other, data) -> None:
    edit = data.draw(edits(other))
    try:
        want = small.run(IDS, edits=edit).hidden
    except EditError:
        return
    assert torch.equal(small.run(IDS, edits=wb.edit_from_json(edit.to_json())).hidden, want)


def test_every_kind_is_tried() -> None:
    """The random edits above leave out only the functions of one's own."""
    source = (__import__("pathlib").Path(__file__).parent / "strategies.py").read_text()
    assert [name for name in KINDS if f"wb.{name}(" not in source] == ["apply"]


@pytest.mark.parametrize("text", [
    "wb.add('router.logits', 100.0, layer=1, expert=0)",
    "wb.zero('attn.pattern', layer=slice(2, None), key=(0, 'sink'))",
    "wb.set('attn.k', [0.5, -1.0], tokens=(1, 2), d_head=(0, 1), kv_head=1)", "wb.ban_experts(layer=5, experts=(3, 7))",
    "wb.cut_attention(query=wb.where(channel='final'), key=wb.where(channel=['analysis', None], matching='[0-9]'))",
    "wb.steer('resid_post', layer=3, vector=[1.0, 2.0], scale=4.0, keep_norm=True)",
    "wb.scale_sink(0.0, query=-1, head=2)", "wb.noise('embed', 0.5, tokens=slice(-3, None, 2), seed=7)",
    "wb.patch('resid_mid', None, layer=1, tokens=9, source=2)",
    "wb.swap_experts(experts=(1, 2))", "wb.router_temperature(2.0, layer=0)", "wb.force_experts(layer=0, experts=(1,))",
])
def test_printed_forms(text: str) -> None:
    edit = eval(text, {"wb": wb})
    assert repr(edit) == text


def test_equal_content_is_equal(other) -> None:
    v = torch.arange(64.0)
    same = [wb.steer("resid_post", layer=1, vector=form) for form in (v, v.clone(), v.tolist(), v.numpy())]
    assert len({*same}) == 1
    different = [wb.steer("resid_post", layer=1, vector=other) for other in (v.double(), v + 1e-4, v[:-1])]
    different += [wb.steer("resid_post", layer=2, vector=v), wb.steer("resid_post", layer=1, vector=v, scale=2.0),
                  wb.steer("resid_pre", layer=1, vector=v)]
    assert len({*same, *different}) == 7
    assert wb.patch("mlp.out", other) == wb.patch("mlp.out", other)
    assert wb.zero("attn.z", head=1, d_head=2) == wb.zero("attn.z", d_head=2, head=1)
    assert wb.apply("embed", torch.relu) == wb.apply("embed", torch.relu) != wb.apply("embed", torch.abs)


def test_an_edit_does_not_change_with_what_it_was_made_from() -> None:
    vector = torch.ones(64)
    edit = wb.add("embed", vector)
    before = hash(edit), edit.to_json()
    vector += 1
    assert (hash(edit), edit.to_json()) == before == (hash(wb.add("embed", torch.ones(64))), edit.to_json())
    with pytest.raises(AttributeError):
        edit.name = "zero"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.int64])
def test_tensors_of_every_dtype(dtype) -> None:
    value = torch.arange(64).view(1, 64).to(dtype)
    edit = wb.set("resid_post", value, layer=0)
    back = wb.edit_from_json(edit.to_json())
    assert back == edit and dict(back.args)["value"].tensor.dtype == dtype
    assert torch.equal(dict(back.args)["value"].tensor, value)
    special = wb.set("resid_post", torch.tensor([math.nan, math.inf, -0.0]), layer=0, d_model=[0, 1, 2])
    assert wb.edit_from_json(special.to_json()) == special
    assert wb.edit_from_json(wb.set("attn.scores", -math.inf).to_json()) == wb.set("attn.scores", -math.inf)


def test_functions_stay_behind() -> None:
    for edit in (wb.apply("embed", torch.relu), wb.zero("embed", tokens=str.isdigit)):
        with pytest.raises(EditError, match="A function can't be written"):
            edit.to_json()


@pytest.mark.parametrize("spoil, words", [
    ("{", "no edit"), ("[]", "no edit"), ({"version": 2}, "version 1"), ({"edit": "eval"}, "one of set, add"),
    ({"site": "resid_pst"}, "resid_post"), ({"place": {"head": 1}}, "no dimension"), ({"place": 3}, "no edit"),
    ({"args": {"change": 1}}, "arguments"), ({"args": {"value": {"function": "f"}}}, "unknown tag"),
    ({"args": {"value": {"tensor": {"dtype": "float32", "shape": [3], "base64": "AAAA"}}}}, "3 bytes"),
    ({"args": {"value": {"tensor": {"dtype": "object", "shape": [], "base64": ""}}}}, "KeyError"),
    ({"args": {}}, "misses value"),
])
def test_broken_json(spoil, words) -> None:
    said = json.loads(wb.add("resid_post", 1.0, layer=2).to_json())
    text = spoil if isinstance(spoil, str) else json.dumps({**said, **spoil})
    with pytest.raises((EditError, SiteError), match=words) as caught:
        wb.edit_from_json(text)
    assert str(caught.value).count("\n") < 6
