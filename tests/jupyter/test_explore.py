"""The dashboard driven from Python: what a person does with the mouse, without a browser."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

import gptoss_workbench as wb
from gptoss_jupyter import lifetime
from gptoss_jupyter.explore import TEXT, TOKEN
from gptoss_workbench.errors import SiteError


@pytest.fixture
def dash(model):
    made = wb.explore(model)
    yield made
    made.close()


def flush(dash) -> dict:
    assert dash.flush(60)
    return dash.state


def our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("gptoss-")]


def slow_down(monkeypatch, dash, seconds: float = 0.05) -> None:
    """Make each generated token take its time, so that there is something to stop."""
    generate = type(dash.model).generate

    def slowly(self, *args, **options):
        generation = generate(self, *args, **options)
        advance = generation._driver.advance
        monkeypatch.setattr(generation._driver, "advance", lambda g: (time.sleep(seconds), advance(g))[1])
        return generation

    monkeypatch.setattr(type(dash.model), "generate", slowly)


def test_it_opens_with_something_to_see(dash, model):
    state = dash.state
    chat = wb.chat("What is 27 + 58?")
    assert state["ids"] == model.encode(chat) and state["selected"] == len(state["ids"]) - 1
    assert state["status"] == "" and state["level"] == "quiet"
    run = model.run(chat, capture=["router", "resid_post"])
    np.testing.assert_array_equal(np.array(state["usage"], dtype=np.float32),
                                  wb.expert_usage(run, tokens=state["selected"]).values)
    best = wb.next_tokens(model, run, top=3)
    assert [row["id"] for row in state["next"][:3]] == best["id"].values.tolist()
    assert len(state["lens"]) == len(state["routes"]) == model.config.num_hidden_layers
    assert repr(dash) == "Explorer(embedded nano model, 'What is 27 + 58?')"


def test_typing_changes_the_pictures_and_is_never_lost(dash):
    before = dash.board.grid.seq
    text = ""
    for key in "What is 2 + 2 and then some":
        text += key
        dash.user.value = text
    state = flush(dash)
    assert "".join(state["tokens"]).find(text) > 0 and dash.user.value == text
    assert before < dash.board.grid.seq < before + len(text)  # overtaken texts were not computed


def test_every_box_counts(dash, model):
    dash.system.value, dash.developer.value, dash.effort.value = "You are a parrot.", "Be brief.", "high"
    dash.user.value = "Hi"
    expected = wb.chat("Hi", system="You are a parrot.", developer="Be brief.", effort="high")
    assert flush(dash)["ids"] == model.encode(expected)
    assert [group["label"] for group in dash.state["groups"]] == ["system", "developer", "user", "assistant"]
    dash.user.value = ""
    assert flush(dash)["level"] == "quiet" and dash.state["tokens"]


@pytest.mark.parametrize("quantity", list(wb.TOKEN_QUANTITIES))
def test_every_quantity_colours_the_tokens(dash, model, quantity):
    dash.quantity.value = quantity
    state = flush(dash)
    run = model.run(state["ids"], capture=["router", "resid_post", "attn.pattern"])
    expected = wb.token_quantity(model, run, quantity)
    np.testing.assert_allclose(state["values"], expected.values, atol=1e-6)
    assert state["unit"] == expected.attrs["units"] and state["high"] >= np.nanmax(expected.values)


def test_selecting_a_token_moves_every_view(dash, model):
    last = dash.state
    dash.board.strip.set_state({"selected": 53})  # as the page does it on a click
    state = flush(dash)
    assert dash.selected == state["selected"] == 53
    run = model.run(state["ids"], capture=["router", "resid_post"])
    assert state["next"][0]["id"] == int(wb.next_tokens(model, run, token=53)["id"][0])
    assert state["routes"] != last["routes"] and state["lens"] != last["lens"]
    dash.user.value = "a"  # the text is shorter now: the selection stays inside it
    assert flush(dash)["selected"] == min(53, len(dash.state["ids"]) - 1)
    dash.selected = None
    assert flush(dash)["selected"] == len(dash.state["ids"]) - 1
    dash.selected = 0
    assert flush(dash)["selected"] == 0
    dash.selected = -2
    assert flush(dash)["selected"] == len(dash.state["ids"]) - 2


def test_clicking_the_last_token_follows_the_end(dash):
    dash.selected = 3
    flush(dash)
    dash.board.strip.set_state({"selected": len(dash.state["ids"]) - 1})
    flush(dash)
    dash.user.value += " and more"
    assert flush(dash)["selected"] == len(dash.state["ids"]) - 1


def test_the_grid_shows_the_token_or_the_whole_text(dash, model):
    assert dash.scope.value == TOKEN
    dash.scope.value = TEXT
    run = model.run(dash.state["ids"], capture=["router"])
    np.testing.assert_allclose(flush(dash)["usage"], wb.expert_usage(run).values, atol=1e-6)


def test_banning_an_expert_shows_what_it_does(dash, model):
    clean = dash.state
    (_, slots) = clean["routes"][1]
    used = slots[0][0]
    dash.board.grid.set_state({"banned": [[1, used]]})  # as the page does it on a click
    state = flush(dash)
    assert dash.banned == [(1, used)] and dash.edits.banned == [[1, used]]
    assert state["usage"][1][used] == 0 and used not in [expert for expert, _ in state["routes"][1][1]]
    by_id = {row["id"]: row["prob"] for row in clean["next"]}
    shown = [row for row in state["next"] if row["clean"] is not None and row["id"] in by_id]
    assert shown and all(row["clean"] == pytest.approx(by_id[row["id"]], abs=1e-6) for row in shown)
    edited = model.run(state["ids"], edits=[wb.ban_experts(layer=1, experts=[used])])
    probs = edited.logits[-1].float().softmax(-1)
    assert state["next"][0]["prob"] == pytest.approx(float(probs[state["next"][0]["id"]]), abs=1e-5)
    dash.edits.set_state({"banned": []})  # the clear button
    state = flush(dash)
    assert dash.banned == [] and dash.board.grid.banned == [] and state["next"] == clean["next"]


def test_too_many_bans_are_told_in_words_and_can_be_undone(dash, model):
    config = model.config
    dash.banned = [(1, expert) for expert in range(config.num_local_experts - config.num_experts_per_tok + 1)]
    state = flush(dash)
    assert state["level"] == "error" and "banned" in state["status"] and len(state["status"].splitlines()) <= 6
    assert dash.board.strip.stale and dash.last_error is not None
    dash.banned = []
    assert flush(dash)["level"] == "quiet" and not dash.board.strip.stale and dash.last_error is None
    with pytest.raises(SiteError, match="no such expert"):
        dash.banned = [(99, 0)]
    assert dash.banned == []


def test_an_answer_is_written_into_strip_and_channels(dash, model):
    generation = dash.answer()
    state = dash.state
    expected = model.generate(wb.chat("What is 27 + 58?"), max_tokens=256)
    assert generation is not None and generation.tokens == expected.tokens
    assert state["ids"] == expected.ids and state["prompt_length"] == len(expected.prompt)
    assert [message["label"] for message in state["answer"]] == ["analysis", "final"]
    assert state["answer"][1]["text"] == expected.text("final")
    assert state["answer_note"].startswith("finished")
    assert np.isfinite(state["values"][1:]).all()
    dash.banned = [(0, 0)]  # the same tokens, read under the edit
    assert flush(dash)["ids"] == expected.ids and "other edits" in dash.said.hint
    dash.banned = []
    dash.user.value = "Something else"
    state = flush(dash)
    assert len(state["ids"]) == state["prompt_length"] and dash.said.stale and "earlier" in dash.said.hint
    assert state["answer"]  # what was said stays readable


def test_an_answer_is_written_under_the_edits(dash, model):
    dash.banned = [(3, 5), (3, 0)]
    generation = dash.answer()
    edits = [wb.ban_experts(layer=3, experts=[0, 5])]
    expected = model.generate(wb.chat("What is 27 + 58?"), edits=edits, max_tokens=256)
    assert generation is not None and generation.tokens == expected.tokens


def test_stop_keeps_what_is_there(dash, monkeypatch):
    slow_down(monkeypatch, dash)
    prompt = len(dash.state["ids"])
    dash.start()
    assert dash.answer_button.disabled and not dash.stop_button.disabled
    end = time.monotonic() + 30
    while len(dash.state["ids"]) < prompt + 4 and time.monotonic() < end:
        time.sleep(0.01)  # the strip grows while it is being written
    assert dash.said.running
    begun = time.monotonic()
    dash.stop()
    state = flush(dash)
    assert time.monotonic() - begun < 5
    assert state["answer_note"].startswith("stopped by you") and not dash.said.running
    assert prompt + 4 <= len(state["ids"]) < prompt + 20
    assert not dash.answer_button.disabled and dash.stop_button.disabled


def test_stop_before_the_first_token(dash, monkeypatch):
    slow_down(monkeypatch, dash)
    dash.start()
    dash.stop()
    assert len(flush(dash)["ids"]) <= dash.state["prompt_length"] + 2
    assert dash.said.note.startswith("stopped by you")


def test_typing_goes_on_while_an_answer_is_written(dash, monkeypatch):
    slow_down(monkeypatch, dash)
    dash.start()
    dash.user.value = "Another question"
    assert dash._typing.flush(30)
    assert dash.said.running and "Another" in "".join(dash.state["tokens"]) and dash.said.stale
    dash.start()  # one thing at a time: said in words, nothing lost
    assert "first" in dash.status.message
    dash.stop()
    assert flush(dash)["answer"] is not None


def test_the_sink_share_waits_for_the_end_of_an_answer(dash, monkeypatch):
    slow_down(monkeypatch, dash)
    dash.start()
    time.sleep(0.3)
    dash.quantity.value = "sink"  # attention maps are not being captured: nothing is invented
    assert dash._typing.flush(30) and dash.status.level == "quiet"
    dash.stop()
    assert np.isfinite(flush(dash)["values"]).all()


def test_an_interrupt_is_a_stop(dash, monkeypatch):
    slow_down(monkeypatch, dash)
    flushes: list[float] = []
    real = dash.flush

    def interrupted(timeout: float = 60.0) -> bool:
        flushes.append(timeout)
        if len(flushes) == 1:
            time.sleep(0.4)
            raise KeyboardInterrupt
        return real(timeout)

    monkeypatch.setattr(dash, "flush", interrupted)
    generation = dash.answer()
    assert generation is not None and generation.reason == "stopped" and 0 < len(generation.tokens) < 256


def test_the_patch_experiment(dash, model):
    result = dash.patch()
    expected = wb.patching(model, "The capital of France is", "The capital of Italy is",
                           metric=wb.logit_diff(" Paris", " Rome"))
    np.testing.assert_allclose(result.values, expected.values, atol=1e-5)
    heat = dash.patch_panel.heat
    np.testing.assert_array_equal(np.frombuffer(heat.values, dtype=np.float32), result.values.ravel())
    france, italy = [["mark", "·"], ["text", "France"]], [["mark", "·"], ["text", "Italy"]]
    assert heat.labels[3] == {"pieces": france, "other": italy}
    assert heat.labels[0]["other"] is None and heat.high == 1.0 and heat.empty == ""
    assert "Strongest: layer" in dash.patch_panel.status.message
    dash.patch_panel.clean.value, dash.patch_panel.corrupt.value = "The capital of Italy is", "The capital of France is"
    dash.patch_panel.answer.value, dash.patch_panel.other.value = " Rome", " Paris"
    dash.patch()
    assert heat.labels[3]["pieces"][1] == ["text", "Italy"]
    assert dash.state["patch"]["text"][3] == " Italy"


@pytest.mark.parametrize(("box", "text", "said"), [
    ("corrupt", "The capital of New Zealand is", "different lengths"),
    ("answer", "supercalifragilistic", "not one token"),
    ("clean", "", "empty"),
    ("corrupt", "The capital of France is", "same"),
])
def test_patch_errors_are_told_in_words(dash, box, text, said):
    getattr(dash.patch_panel, box).value = text
    assert dash.patch() is None
    status = dash.patch_panel.status
    assert status.level == "error" and said in status.message and "Traceback" not in status.message
    assert getattr(dash.patch_panel, box).value == text and not dash.patch_panel.start_button.disabled


def test_a_patch_can_be_stopped(dash, monkeypatch):
    transformer = type(dash.model.transformer)
    experts = transformer.experts

    def slowly(self, *args, **options):
        time.sleep(0.1)
        return experts(self, *args, **options)

    monkeypatch.setattr(transformer, "experts", slowly)
    dash.start_patch()
    assert dash.answer_button.disabled
    time.sleep(0.35)
    dash.stop()
    assert dash.flush(60)
    result = dash.patch_panel.result
    assert result is not None and bool(result.isnull().any())
    assert "Stopped" in dash.patch_panel.status.message and not dash.answer_button.disabled


def test_a_fault_of_ours_is_told_too(dash, monkeypatch, capsys):
    def broken(*_args, **_options):
        raise RuntimeError("the <b>cable</b> is loose")

    monkeypatch.setattr(type(dash.model), "run", broken)
    dash.user.value = "x"
    state = flush(dash)
    assert state["level"] == "error" and "the <b>cable</b> is loose" in state["status"]
    assert dash.user.value == "x" and capsys.readouterr() == ("", "")


def test_half_a_character_is_survived(dash):
    dash.user.value = "a \ud83d b"
    assert flush(dash)["tokens"]


def test_several_dashboards_live_side_by_side(model):
    one, two = wb.explore(model, prompt="One"), wb.explore(model, prompt="Two", effort="low")
    one.user.value = "Only the first"
    assert "Only" in "".join(flush(one)["tokens"]) and "Only" not in "".join(flush(two)["tokens"])
    one.close()
    two.user.value = "Still alive"
    assert "alive" in "".join(flush(two)["tokens"])
    two.close()


def test_closing_leaves_nothing_behind(model):
    from ipywidgets.widgets.widget import _instances

    before = set(_instances)
    threads = our_threads()
    made = wb.explore(model)
    made.patch()
    made.start()
    made.close()
    made.close()
    assert set(our_threads()) <= set(threads)
    assert [_instances[key] for key in set(_instances) - before] == []
    made.user.value = "after the end"  # harmless
    assert "text/html" in made._repr_mimebundle_()


def test_running_a_cell_again_closes_what_it_made(model, monkeypatch):
    runs = iter([("cell", "1"), ("cell", "1"), ("other", "2"), ("cell", "3")])
    monkeypatch.setattr(lifetime, "current_cell", lambda: next(runs))
    first, beside, other, again = (wb.explore(model) for _ in range(4))
    assert first._closed and beside._closed and not other._closed and not again._closed
    other.close()
    again.close()


def test_without_a_notebook_nothing_is_closed(model):
    assert lifetime.current_cell() is None
    one, two = wb.explore(model), wb.explore(model)
    assert not one._closed and not two._closed
    one.close()
    two.close()
