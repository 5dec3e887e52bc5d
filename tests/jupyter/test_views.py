"""The views without a browser: what they send, what their files hold, how they print."""

from __future__ import annotations

import re
import threading
from itertools import pairwise

import numpy as np
import pytest
import xarray as xr

import gptoss_workbench as wb
from gptoss_jupyter import present, views
from gptoss_jupyter.views import base

VIEWS = [views.StripView, views.AnswerView, views.GridView, views.RoutesView, views.LensView, views.NextView,
         views.StatusView, views.EditsView, views.HeatView]


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_paints_once_for_each_show(view):
    made = view()
    sent: list[dict] = []
    made.send_state = lambda key=None: sent.append({name: getattr(made, name) for name in (key or ())})
    before = made.seq
    made.show(title="a", stale=True)
    assert made.seq == before + 1
    assert len(sent) == 1 and sent[0]["seq"] == made.seq and sent[0]["title"] == "a"
    made.close()


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_prints_without_an_address(view):
    made = view(title="What?")
    assert repr(made) == f"{view.__name__}('What?')"
    assert repr(view()) == f"{view.__name__}()"
    made.close()


@pytest.mark.parametrize("view", VIEWS)
def test_view_code_is_self_contained_and_builds_no_markup(view):
    code, style = str(view._esm), str(view._css)
    assert "export default" in code and code.startswith("const PALETTE = '")
    for risky in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "import(", "fetch(",
                  "http"):
        assert risky not in code, risky
    assert "@import" not in style and "url(" not in style
    assert not re.search(r"\bmodel\.(send|widget_manager)\b", code)  # keeps views exportable


def test_view_modules_parse(tmp_path):
    import shutil
    import subprocess

    node = shutil.which("node")
    if node is None:
        pytest.skip("no node to parse with; the browser tests run the same files")
    for name in ("strip", "answer", "grid", "routes", "lens", "next", "status", "edits", "heat"):
        path = tmp_path / f"{name}.mjs"
        path.write_text(base.module(name), encoding="utf-8")
        found = subprocess.run([node, "--check", str(path)], capture_output=True, text=True)
        assert found.returncode == 0, found.stderr


def test_show_and_what_the_page_sends_do_not_mix():
    view = views.StripView()
    stop = threading.Event()

    def page() -> None:
        value = 0
        while not stop.is_set():
            value += 1
            view.set_state({"selected": value % 7})

    thread = threading.Thread(target=page)
    thread.start()
    for i in range(300):
        view.show(low=float(i), high=float(i))
        assert view.low == view.high == i
    stop.set()
    thread.join()
    assert view.seq == 300


def test_bytes_of_the_grid_are_the_array():
    usage = xr.DataArray(np.random.default_rng(0).random((3, 4), dtype=np.float32), dims=("layer", "expert"))
    one = present.grid(usage, [[0], [1], [2]], whole_text=False, token="“a”")
    assert one["weights"] == usage.values.tobytes() and one["high"] == 1.0 and "“a”" in one["title"]
    turned = present.grid(usage.T, [[0], [1], [2]], whole_text=True, token="“a”")
    assert turned["weights"] == one["weights"] and turned["measure"].startswith("mean")


@pytest.mark.parametrize(("value", "ceiling"), [
    (0.0, 1.0), (float("nan"), 1.0), (0.2, 0.2), (0.21, 0.5), (1.0, 1.0), (7.3, 10.0), (35.5, 50.0), (0.0013, 0.002)])
def test_scales_end_at_round_numbers(value, ceiling):
    assert present.nice_ceiling(value) == pytest.approx(ceiling)


def test_strip_keeps_bytes_text_and_labels_of_every_token(model):
    conversation = wb.chat("<b>\u200b \U0001f9d1\u200d\U0001f680<|end|>")
    ids = model.encode(conversation)
    run = model.run(ids, capture=["router", "resid_post"])
    traits = present.strip(
        model.vocabulary, ids, run.spans, wb.token_quantity(model, run, "surprisal"), model.known(ids))
    assert [token["known"] for token in traits["tokens"]] == model.known(ids)
    tokens = traits["tokens"]
    assert b"".join(bytes.fromhex(token["hex"]) for token in tokens) == b"".join(
        model.vocabulary.token_bytes(token) for token in ids)
    assert [token["id"] for token in tokens] == ids
    ends = [token for token in tokens if token["hex"] == b"<|end|>".hex(" ").upper()]
    assert len(ends) == 2 and all(token["special"] for token in ends)  # typed by the user it is plain text
    assert [group["label"] for group in traits["groups"]] == ["system", "user", "assistant"]
    assert traits["groups"][0]["start"] == 0 and traits["groups"][-1]["stop"] == len(ids)
    for one, two in pairwise(traits["groups"]):
        assert one["stop"] == two["start"]
    values = np.frombuffer(traits["values"], dtype=np.float32)
    assert len(values) == len(ids) and np.isnan(values[0]) and traits["unit"] == "nats"


def test_answer_messages_join_what_belongs_together(model):
    text = ("<|start|>assistant<|channel|>analysis<|message|>a \U0001f9d1 b<|end|>"
            "<|start|>assistant<|channel|>commentary to=functions.f<|message|>{}<|call|>")
    spans = wb.harmony.parse(model.encode(text), model.vocabulary)
    found = present.messages(model.vocabulary, spans)
    assert [message["label"] for message in found] == ["analysis", "commentary to functions.f"]
    assert found[0]["pieces"] == [["text", "a \U0001f9d1 b"]]  # an emoji of several tokens is whole again
    assert [message["kind"] for message in found] == ["analysis", "commentary"]


def test_routes_are_the_runs_weights(model):
    run = model.run("The capital of France is", capture=["router"])
    rows = present.routes(run, 3)
    for layer, slots in rows:
        weights = [weight for _, weight in slots]
        assert weights == sorted(weights, reverse=True) and sum(weights) == pytest.approx(1, abs=1e-5)
        found = run.data["router.experts"].isel(layer=layer, token=3).values
        assert {expert for expert, _ in slots} == set(found.tolist())


def test_next_tokens_show_both_sides_and_never_lose_the_clean_best():
    def guesses(pairs: list[tuple[int, float]]) -> xr.Dataset:
        ids, probs = zip(*pairs, strict=True)
        return xr.Dataset({"id": ("rank", list(ids)), "text": ("rank", [f"t{i}" for i in ids]),
                           "prob": ("rank", list(probs))})

    class Vocabulary:
        def token_bytes(self, token: int) -> bytes:
            return f"t{token}".encode()

    edited, clean = guesses([(1, 0.6), (2, 0.3), (3, 0.1)]), guesses([(9, 0.8), (2, 0.15), (1, 0.05)])
    traits = present.next_tokens(Vocabulary(), edited, clean, top=2)  # type: ignore[arg-type]
    assert [(row["id"], row["prob"], row["clean"]) for row in traits["rows"]] == [(1, 0.6, 0.05), (9, None, 0.8)]
    assert traits["below"] == pytest.approx(0.05) and traits["edited"]
    alone = present.next_tokens(Vocabulary(), edited, None, top=2)  # type: ignore[arg-type]
    assert [row["id"] for row in alone["rows"]] == [1, 2] and not alone["edited"]


def test_the_shared_row_is_described_not_decoded(model):
    words = "⟨any of 9 unused tokens⟩"
    assert present.token_pieces(model.vocabulary, -1, words) == [["mark", words]]
