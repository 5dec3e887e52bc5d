"""``%gptoss``: what it does, what it leaves in the namespace, and what it says when asked for nonsense."""

from __future__ import annotations

import pytest
from IPython.core.error import UsageError
from IPython.utils.capture import capture_output

import gptoss_workbench as wb
from gptoss_jupyter import commands, lifetime, magics

QUESTION = "What is 27 + 58?"


def run(shell, code):
    """Run a cell; what was printed, and what was displayed."""
    with capture_output() as captured:
        shell.run_cell(code).raise_error()
    return captured


def mistake(shell, code) -> str:
    """Run a cell that must end in a UsageError; its text."""
    with capture_output() as captured:
        result = shell.run_cell(code)
    assert isinstance(result.error_in_exec, UsageError), result.error_in_exec
    assert "Traceback" not in captured.stdout + captured.stderr
    return str(result.error_in_exec)


# loading and unloading ------------------------------------------------------------------------------------------


def test_a_second_load_and_a_reload_are_harmless(shell):
    manager = shell.extension_manager
    assert manager.load_extension("gptoss_workbench") == "already loaded"
    before = shell.magics_manager.registry["GptossMagics"]
    assert manager.load_extension("gptoss_jupyter") is None  # the face itself, under its own name
    assert shell.magics_manager.registry["GptossMagics"] is before
    manager.reload_extension("gptoss_workbench")
    assert "%gptoss ask" in run(shell, "%gptoss help").stdout


def test_unloading_leaves_nothing_behind(shell):
    matchers = list(shell.Completer.custom_matchers)
    shell.extension_manager.unload_extension("gptoss_workbench")
    assert "gptoss" not in shell.magics_manager.magics["line"]
    assert "gptoss" not in shell.magics_manager.magics["cell"]
    assert "GptossMagics" not in shell.magics_manager.registry
    assert len(shell.Completer.custom_matchers) == len(matchers) - 1


def test_explore_opens_a_dashboard_on_the_loaded_model_and_unloading_closes_it(shell, model, monkeypatch):
    class Dashboard:
        closed = False

        def close(self):
            self.closed = True

    def explore(model, **options):
        asked.append((model, options))
        made = Dashboard()
        lifetime.adopt(made)
        return made

    asked = []
    monkeypatch.setattr(wb, "explore", explore)
    shell.user_ns["model"] = model
    run(shell, 'opened = %gptoss explore "Hello there"')
    run(shell, "other = %gptoss explore")
    assert asked == [(model, {"prompt": "Hello there"}), (model, {})]
    shell.extension_manager.unload_extension("gptoss_workbench")
    assert shell.user_ns["opened"].closed and shell.user_ns["other"].closed


# help and doctor ------------------------------------------------------------------------------------------------


def test_help_names_every_command_and_every_option(shell):
    everything = run(shell, "%gptoss").stdout
    assert everything == run(shell, "%gptoss help").stdout
    for name, parser in commands.COMMANDS.items():
        assert f"%gptoss {name}" in everything
        details = run(shell, f"%gptoss help {name}").stdout
        assert details == run(shell, f"%gptoss {name} --help").stdout
        assert all(option in details for option in parser.options)
        assert parser.summary in details


def test_doctor_prints_the_same_rows_in_the_same_order(shell):
    def names(text):
        return [line.split("  ")[0] for line in text.splitlines()]

    first = run(shell, "%gptoss doctor").stdout
    assert names(first) == names(run(shell, "%gptoss doctor").stdout)
    assert names(first)[:3] == ["gptoss-workbench", "python", "torch"]
    assert "embedded model    there, sha256 right" in first
    assert "vocabulary        201088 ids, sha256 right" in first


# mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("line", "said"), [
    ("%gptoss lod", "it is one of load, ask, explore, doctor and help"),
    ("%gptoss help lod", "it is one of load, ask, explore, doctor and help"),
    ("%gptoss ask --efort low hi", "unrecognized arguments: --efort (options: --effort, --system"),
    ("%gptoss ask --effort max hi", "choose from"),
    ("%gptoss ask --max-tokens none hi", "'none' is not a whole number of at least 1"),
    ("%gptoss ask --max-tokens 0 hi", "'0' is not a whole number of at least 1"),
    ("%gptoss ask --temperature warm hi", "--temperature"),
    ("%gptoss ask --as 3x hi", "'3x' is not a name for a variable"),
    ("%gptoss ask --as class hi", "'class' is not a name for a variable"),
    ("%gptoss ask", "there is no question"),
    ("%gptoss ask '  '", "there is no question"),
    ("%gptoss ask what's up", "a quote has no partner"),
    ("%gptoss load --dtype int8", "choose from"),
    ("%gptoss doctor now", "unrecognized arguments: now"),
    ("%%gptoss load\nhi", "'load' cannot stand on its first line"),
    ("%%gptoss --effort\nhi", "expected one argument"),
    ("%%gptoss\n   \n", "there is no question"),
])
def test_a_mistake_is_answered_in_one_line_that_says_what_is_possible(shell, line, said):
    text = mistake(shell, line)
    assert said in text
    assert "\n" not in text


def test_what_the_library_refuses_is_said_in_its_own_words(shell, tmp_path):
    text = mistake(shell, f"%gptoss load {tmp_path}/nowhere")
    with pytest.raises(wb.errors.ModelNotFound) as refused:
        wb.load(tmp_path / "nowhere")
    assert text == str(refused.value)
    assert "model" not in shell.user_ns


def test_a_variable_that_holds_something_else_is_not_overwritten(shell):
    shell.user_ns["model"] = 3
    assert "the variable model holds no model but a int" in mistake(shell, "%gptoss ask hi")
    assert shell.user_ns["model"] == 3


# load and ask ---------------------------------------------------------------------------------------------------


def test_load_puts_the_model_where_it_is_told_to(shell):
    assert run(shell, "%gptoss load").stdout == f"model = {shell.user_ns['model']!r}\n"
    run(shell, "%gptoss load --as other --dtype bfloat16")
    assert shell.user_ns["other"].dtype == "bfloat16"
    assert "No model is loaded yet" not in run(shell, "%gptoss ask hi --max-tokens 1").stdout
    assert shell.user_ns["gen"].steps[0].logprob == next(iter(
        shell.user_ns["other"].generate(wb.chat("hi"), max_tokens=1))).logprob  # the model loaded last


def test_ask_without_a_model_takes_the_embedded_one_and_says_so(shell):
    said = run(shell, f'%gptoss ask "{QUESTION}" --max-tokens 3').stdout
    assert said.startswith("No model is loaded yet, so the embedded one is taken.\nmodel = <")
    assert isinstance(shell.user_ns["model"], wb.Model)


def test_ask_answers_as_the_library_does_and_keeps_the_generation(shell, model):
    shell.user_ns["model"] = model
    captured = run(shell, f'%gptoss ask "{QUESTION}" --effort high')
    expected = model.generate(wb.chat(QUESTION, effort="high")).finish()
    assert shell.user_ns["gen"].tokens == expected.tokens
    bundle = captured.outputs[-1].data
    for channel in ("analysis", "final"):
        assert f"{channel}: {expected.text(channel)}" in bundle["text/plain"]
        assert f">{channel}<" in bundle["text/html"]
    assert captured.stdout == ""


def test_every_option_of_ask_reaches_the_library(shell, model):
    shell.user_ns["model"] = model
    run(shell, "%gptoss ask Hello there --effort low --system 'You are X.' --developer \"Be brief.\" "
               "--max-tokens 7 --temperature 1.5 --seed 3 --capture router,resid_post --as other")
    found = shell.user_ns["other"]
    chat = wb.chat("Hello there", system="You are X.", developer="Be brief.", effort="low")
    expected = model.generate(chat, max_tokens=7, temperature=1.5, seed=3).finish()
    assert found.prompt == model.encode(chat)
    assert found.tokens == expected.tokens
    assert {"router.logits", "resid_post"} <= set(found.data)
    assert "gen" not in shell.user_ns


def test_the_body_of_a_cell_is_the_question_as_it_stands(shell, model):
    shell.user_ns["model"] = model
    body = "What's \"this\"?\n\n    $x {y} -- --effort\n"
    run(shell, f"%%gptoss --max-tokens 1\n{body}")
    assert shell.user_ns["gen"].prompt == model.encode(wb.chat(body.strip("\n")))
    run(shell, f"%%gptoss ask --max-tokens 1 --as again\n{body}")
    assert shell.user_ns["again"].prompt == shell.user_ns["gen"].prompt


def test_a_cut_answer_says_so(shell, model):
    shell.user_ns["model"] = model
    bundle = run(shell, f"%gptoss ask {QUESTION} --max-tokens 4").outputs[-1].data
    assert "cut off after 4 tokens; --max-tokens raises the limit" in bundle["text/plain"]
    assert "cut off after 4 tokens" in bundle["text/html"]


def test_a_running_answer_is_rewritten_in_place(shell, model, monkeypatch):
    monkeypatch.setattr(magics, "REFRESH", 0.0)
    shell.kernel = object()  # a front end that can rewrite an output, unlike a terminal
    shell.user_ns["model"] = model
    captured = run(shell, f'%gptoss ask "{QUESTION}" --effort low')
    first, *rest = captured.outputs
    assert not first.update
    assert rest and all(output.update for output in rest)
    assert {output.transient["display_id"] for output in captured.outputs} == {first.transient["display_id"]}
    assert shell.user_ns["gen"].text("final") in rest[-1].data["text/plain"]


def test_an_interrupt_stops_and_keeps_what_there_is(shell, model, monkeypatch):
    shown = magics.show

    def show_and_interrupt(generation, vocabulary, handle):
        if len(generation.steps) == 5 and generation.reason is None:
            raise KeyboardInterrupt
        return shown(generation, vocabulary, handle)

    monkeypatch.setattr(magics, "REFRESH", 0.0)
    monkeypatch.setattr(magics, "show", show_and_interrupt)
    shell.kernel = object()
    shell.user_ns["model"] = model
    captured = run(shell, f'%gptoss ask "{QUESTION}" --effort high')
    assert len(shell.user_ns["gen"].steps) == 5
    assert shell.user_ns["gen"].reason == "stopped"
    assert "stopped after 5 tokens" in captured.outputs[-1].data["text/plain"]
