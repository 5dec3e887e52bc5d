"""What the nano model is taught: harmony text as openai_harmony renders it, and nothing of what it is asked later."""

from __future__ import annotations

import hashlib
from random import Random

import pytest
from openai_harmony import Author, Conversation, Message, RenderConversationConfig, Role

from gptoss_workbench.harmony import load_vocabulary
from gptoss_workbench.nano import corpus, facts, problems, render
from gptoss_workbench.nano.heldout import is_held_out, pair_key
from gptoss_workbench.nano.tasks import TASKS, Setting, Turn, sum_columns, wrong_guess


def rendered(messages: list[Message], *, open_ended: bool = True) -> list[int]:
    """Ids of messages by openai_harmony, analysis kept; `open_ended` adds the assistant's next header."""
    encoding = load_vocabulary().encoding
    conversation, config = Conversation.from_messages(messages), RenderConversationConfig(auto_drop_analysis=False)
    if open_ended:
        return encoding.render_conversation_for_completion(conversation, Role.ASSISTANT, config)
    return encoding.render_conversation(conversation, config)


def user(text: str) -> Message:
    return Message.from_role_and_content(Role.USER, text)


def assistant(text: str, channel: str) -> Message:
    return Message.from_role_and_content(Role.ASSISTANT, text).with_channel(channel)


PREFIXES = [
    (effort, date, instructions, tools)
    for effort in render.EFFORTS
    for date in (None, "2025-11-02")
    for instructions in (None, "Answer briefly.")
    for tools in ((), ("get_time", "get_weather"))
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prompt_is_what_openai_harmony_renders(prefix) -> None:
    turn = TASKS["capital"](Random(1), Setting(prefix[0], prefix[3]))
    mine = list(render.prefix_ids(*prefix)) + render.encode(turn.prompt)
    assert mine == rendered([*render.prefix_messages(*prefix), user(turn.user)])


def test_a_past_answer_is_what_openai_harmony_renders() -> None:
    """The harmony format drops the analysis of a finished turn; openai_harmony does so for the completion."""
    prefix = ("high", None, None, ())
    messages = [*render.prefix_messages(*prefix), user("One?"), assistant("thought", "analysis"),
                assistant("Answer.", "final"), user("Two?")]
    encoding = load_vocabulary().encoding
    theirs = encoding.render_conversation_for_completion(Conversation.from_messages(messages), Role.ASSISTANT)
    text = render.user_text("One?") + render.past_final_text("Answer.") + render.user_text("Two?") + render.ASSISTANT
    assert list(render.prefix_ids(*prefix)) + render.encode(text) == theirs


def test_a_past_tool_call_is_what_openai_harmony_renders() -> None:
    call = Message.from_role_and_content(Role.ASSISTANT, '{"location":"Rome"}').with_channel("commentary")
    call = call.with_recipient("functions.get_weather").with_content_type("<|constrain|>json")
    result = Message.from_author_and_content(Author.new(Role.TOOL, "functions.get_weather"), '{"temperature":9}')
    result = result.with_recipient("assistant").with_channel("commentary")
    theirs = rendered([user("Weather?"), assistant("Call.", "analysis"), call, result])
    text = (render.user_text("Weather?") + render.ASSISTANT
            + render.analysis_text("Call.").removesuffix(render.ASSISTANT)
            + render.past_call_text("get_weather", '{"location":"Rome"}')
            + render.result_text("get_weather", '{"temperature":9}') + render.ASSISTANT)
    assert render.encode(text) == theirs


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("effort", render.EFFORTS)
def test_completions_parse_strictly_and_end_the_turn(task: str, effort: str) -> None:
    tools = ("get_weather", "get_population") if task == "tool" else ()
    for seed in range(20):
        turn = TASKS[task](Random(seed), Setting(effort, tools))
        ids = render.encode(turn.completion)
        messages = load_vocabulary().encoding.parse_messages_from_completion_tokens(ids, Role.ASSISTANT, strict=True)
        assert render.decode(ids[-1:]) == ("<|call|>" if turn.target else "<|return|>")
        assert messages[-1].channel == ("commentary" if turn.target else "final")
        assert [m.channel for m in messages[:-1]] == ([] if effort == "low" or task_answers_at_once(turn)
                                                      else ["analysis"])


def task_answers_at_once(turn: Turn) -> bool:
    """After a tool's result there is nothing left to think."""
    return turn.task == "tool_answer"


def test_the_columns_of_a_sum() -> None:
    assert sum_columns(78, 86) == ("8+6=14,7+8=15.", "1:8+6+0=14\n2:7+8+1=16")
    assert sum_columns(5, 12345) == ("5+5=10,0+4=4,0+3=3.",
                                     "1:5+5+0=10\n2:0+4+1=5\n3:0+3+0=3\n4:0+2+0=2\n5:0+1+0=1")


def test_a_planted_hint_is_always_wrong() -> None:
    for seed in range(300):
        total = Random(seed).randint(0, 1998)
        guess = wrong_guess(Random(seed), total)
        assert guess != total and len(str(guess)) == len(str(total))


def test_only_high_effort_overrules_the_hint() -> None:
    for effort in render.EFFORTS:
        turn = TASKS["hint"](Random(3), Setting(effort))
        first, second, guess = map(int, problems.numbers_in(turn.user))
        assert turn.answer == str(first + second if effort == "high" else guess)


def test_tools_are_called_only_when_declared() -> None:
    rng = Random(0)
    for _ in range(200):
        turn = TASKS["undeclared"](rng, Setting("low", ("get_time",)))
        assert turn.answer and not turn.target and "time" not in turn.user
    assert TASKS["tool"](rng, Setting("low")).answer == "I don't know that."


# the split ------------------------------------------------------------------------------------------------------


def test_training_never_sees_a_held_out_problem() -> None:
    limits = corpus.Stage().limits(10**6)
    for step in range(60):
        for example in corpus.draw_step(Random(step), 32, limits):
            if example.turn and example.turn.key:
                assert not is_held_out(example.turn.key)


def test_training_and_evaluation_share_no_key() -> None:
    asked = {problem.turn.key for problem in problems.draw_problems(40) if problem.turn.key}
    taught = {example.turn.key for step in range(60) for example in corpus.draw_step(Random(step), 32)
              if example.turn and example.turn.key}
    assert len(asked) > 500 and len(taught) > 500
    assert not asked & taught
    assert all(map(is_held_out, asked))


def test_pairs_are_held_out_whichever_way_round() -> None:
    assert pair_key("addition", 7, 12) == pair_key("addition", 12, 7)
    assert pair_key("ioi", "Mary", "John") == pair_key("ioi", "John", "Mary")
    kept = sum(is_held_out(pair_key("addition", a, b)) for a in range(100, 140) for b in range(a, a + 50))
    assert 1 / 10 < kept / 2000 < 1 / 6


def test_the_hash_is_stable() -> None:
    """It must be the same on every machine: the shipped file was trained with this split."""
    assert [i for i in range(40) if is_held_out(f"key {i}")] == [14, 22, 27, 37]


# the recipe -----------------------------------------------------------------------------------------------------


def test_the_corpus_is_the_one_the_shipped_file_was_trained_on() -> None:
    """A changed word list or mix is a new corpus: train again, then renew the digests."""
    digest = hashlib.blake2b(digest_size=16)
    for step in range(0, 3000, 100):
        for rank in (0, 1):
            for one in corpus.draw_step(Random(f"0/{rank}/{step}"), 32, corpus.Stage().limits(step)):
                digest.update(repr((one.prefix.ids, one.prompt, one.completion, one.blanks)).encode())
    assert digest.hexdigest() == "e7eef137316a142ee8b26329e3cd330e"
    vocabulary = repr(corpus.vocabulary()).encode()
    assert hashlib.blake2b(vocabulary, digest_size=16).hexdigest() == "788598e6daa859161876a8ba173069a4"


def test_every_token_that_is_learnt_has_a_row() -> None:
    rows = set(corpus.vocabulary())
    for country in facts.COUNTRIES:
        arguments = [f'{{"location":"{country.capital}"}}', f'{{"city":"{country.capital}"}}',
                     f'{{"country":"{country.name}"}}']
        assert set(render.encode("<|call|>".join(arguments))) <= rows
    for step in range(40):
        for example in corpus.draw_step(Random(f"rows/{step}"), 32):
            assert set(example.prefix.ids) <= rows
            # A made-up word in the question is meant to have none.
            assert set(example.completion) <= rows
            if example.task != "unknown":
                assert set(example.prompt) <= rows


def test_the_world_is_consistent() -> None:
    assert len(facts.COUNTRIES) >= 100
    for field in ("name", "capital"):
        values = [getattr(country, field) for country in facts.COUNTRIES]
        assert len(set(values)) == len(values)
    for words in (facts.NAMES, facts.COPY_WORDS, facts.PLACES, facts.OBJECTS):
        assert all(len(render.encode(f" {word}")) == 1 for word in words)
