"""Generating token by token: greedy against repeated full runs, Stop, seeds, batches, captures."""

from __future__ import annotations

import threading

import pytest
import torch

import gptoss_workbench as wb
from gptoss_workbench.errors import EditNeverFired, PromptError, WorkbenchError
from tests.factories import tiny_model, write_hf
from tests.tolerances import SITE_F32

IDS = [5, 17, 300, 8, 8, 91]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    return wb.load(write_hf(tmp_path_factory.mktemp("tiny"), tiny_model(seed=9)), dtype="float32")


def by_full_runs(model, ids: list[int], count: int, **options) -> list[int]:
    """Greedy continuation with no cache: the whole prompt again for every token."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(model.run(ids, **options).logits[-1].argmax()))
    return ids[-count:]


def test_greedy_equals_repeated_full_runs(tiny) -> None:
    gen = tiny.generate(IDS, max_tokens=30, stop=[])
    assert gen.tokens == by_full_runs(tiny, IDS, 30)
    assert gen.reason == "max_tokens"
    assert gen.ids == IDS + gen.tokens
    assert "".join(step.text for step in gen.steps) == "".join(tiny.vocabulary.token_text(t) for t in gen.tokens)
    logits = tiny.run(gen.ids).logits.log_softmax(-1)
    for step in gen.steps:
        assert step.logprob == pytest.approx(float(logits[step.position - 1, step.token]), abs=SITE_F32)


def test_edits_act_on_generated_tokens_too(tiny) -> None:
    edits = [wb.ban_experts(layer=1, experts=[0, 1]), wb.scale("attn.out", 0.3, layer=2, tokens=slice(4, None))]
    assert tiny.generate(IDS, edits=edits, max_tokens=15, stop=[]).tokens == by_full_runs(tiny, IDS, 15, edits=edits)


def test_an_edit_may_wait_for_its_token_but_must_fire(tiny) -> None:
    late = [wb.zero("mlp.out", layer=3, tokens=9)]
    gen = tiny.generate(IDS, edits=late, max_tokens=8, stop=[], capture="mlp.out")
    gen.finish()
    assert float(abs(gen.data["mlp.out"].sel(layer=3, token=9)).max()) == 0
    with pytest.raises(EditNeverFired):
        tiny.generate(IDS, edits=[wb.zero("mlp.out", layer=3, tokens=40)], max_tokens=8, stop=[]).finish()


def test_stop_tokens(tiny) -> None:
    said = tiny.generate(IDS, max_tokens=12, stop=[]).tokens
    gen = tiny.generate(IDS, max_tokens=12, stop=[said[4]])
    assert gen.tokens == said[: said.index(said[4]) + 1]
    assert gen.reason == "stop_token"
    with pytest.raises(PromptError, match="one token"):
        tiny.generate(IDS, stop="two tokens here")


def test_nothing_is_computed_before_it_is_asked_for(tiny) -> None:
    gen = tiny.generate(IDS, max_tokens=5, stop=[])
    assert gen.reason is None and gen.steps == [] and "not started" in repr(gen)
    first = next(iter(gen))
    assert (first.index, first.position, len(gen.tokens)) == (0, len(IDS), 1)
    assert len(gen.finish().tokens) == 5
    assert [step.index for step in gen] == list(range(5))


def test_stop_keeps_what_there_is(tiny) -> None:
    gen = tiny.generate(IDS, max_tokens=50, stop=[], capture="router")
    for step in gen:
        if step.index == 6:
            gen.stop()
    assert (len(gen.tokens), gen.reason) == (7, "stopped")
    assert gen.data.sizes["token"] == len(IDS) + 6
    gen.stop()
    assert len(gen.finish().tokens) == 7


def test_stop_from_another_thread(tiny) -> None:
    gen = tiny.generate(IDS, max_tokens=100_000, stop=[])
    worker = threading.Thread(target=gen.finish)
    worker.start()
    while len(gen.steps) < 3:
        pass
    gen.stop()
    worker.join(60)
    assert not worker.is_alive()
    assert gen.reason == "stopped" and len(gen.tokens) >= 3


def test_an_interrupt_is_a_stop(tiny) -> None:
    def interrupt_at_the_fifth(x, count=[0]):  # noqa: B006
        count[0] += 1
        if count[0] == 5:
            raise KeyboardInterrupt
        return x

    gen = tiny.generate(IDS, max_tokens=20, stop=[], edits=[wb.apply("embed", interrupt_at_the_fifth)])
    assert len(gen.tokens) == 4
    assert gen.reason == "interrupted"
    assert gen.tokens == by_full_runs(tiny, IDS, 4)


def test_captures_of_steps_equal_one_full_run(tiny) -> None:
    capture = ["resid_post", "router", "attn.pattern", "logits"]
    gen = tiny.generate(IDS, max_tokens=14, stop=[], capture=capture)
    read = gen.finish().ids[:-1]  # the last token was chosen, not read
    whole = tiny.run(read, capture=capture).data
    assert gen.data["id"].values.tolist() == read
    for site in gen.data.data_vars:
        assert gen.data[site].dims == whole[site].dims
        assert float(abs(gen.data[site] - whole[site]).max()) < SITE_F32, site
    steps = list(gen)
    assert steps[0].data["token"].values.tolist() == list(range(len(IDS)))
    assert steps[3].data["token"].values.tolist() == [len(IDS) + 2]
    assert steps[3].data["attn.pattern"].sizes["query"] == 1
    assert tiny.generate(IDS, max_tokens=4, stop=[], capture=capture).tokens == gen.tokens[:4]


def test_seeds(tiny) -> None:
    def draw(seed, prompt=IDS):
        return tiny.generate(prompt, max_tokens=12, stop=[], temperature=1.0, seed=seed)

    assert draw(1).tokens == draw(1).tokens != draw(2).tokens
    rows = draw(5, [IDS, IDS, IDS])
    assert [g.tokens for g in rows] == [draw(s).tokens for s in (5, 6, 7)]
    assert [g.tokens for g in draw([1, 2], [IDS, IDS])] == [draw(1).tokens, draw(2).tokens]
    with pytest.raises(WorkbenchError, match="one for each prompt"):
        draw([1], [IDS, IDS])


def test_a_batch_equals_its_rows(tiny) -> None:
    prompts = [IDS, IDS[:2], [7] * 15]
    stop = tiny.generate(IDS, max_tokens=9, stop=[]).tokens[5:6]  # so that rows end at different times
    batch = tiny.generate(prompts, max_tokens=9, stop=stop, capture="router")
    for gen, prompt in zip(batch, prompts, strict=True):
        alone = tiny.generate(prompt, max_tokens=9, stop=stop, capture="router")
        assert gen.tokens == alone.tokens
        assert gen.reason == alone.reason
        torch.testing.assert_close(gen.run().tensor("router.logits"), alone.run().tensor("router.logits"),
                                   rtol=0, atol=SITE_F32)


def test_one_row_of_a_batch_can_stop(tiny) -> None:
    one, two = tiny.generate([IDS, IDS[:3]], max_tokens=10, stop=[])
    for step in one:
        if step.index == 2:
            one.stop()
    assert (len(one.tokens), one.reason) == (3, "stopped")
    assert two.finish().tokens == by_full_runs(tiny, IDS[:3], 10)


def test_spans_and_channels_of_an_answer(model) -> None:
    gen = model.generate(wb.chat("What is 27 + 58?", effort="high"), max_tokens=120)
    assert [id for span in gen.spans for id in span.ids] == gen.tokens
    assert gen.reason == "stop_token"
    assert gen.text("final") and gen.text("analysis")
    assert gen.text() == gen.text("analysis") + "\n" + gen.text("final")
    assert gen.text("commentary") == ""


@pytest.mark.parametrize("prompt", ["", [], [512], [-1], [1.5], None, 3.0, {"a": 1}, [True]])
def test_prompts_that_are_none(tiny, prompt) -> None:
    with pytest.raises(PromptError):
        tiny.run(prompt)
