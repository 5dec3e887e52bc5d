"""``%gptoss`` in a real notebook: what is printed, streamed, interrupted and completed."""

from __future__ import annotations

import time

from gptoss_jupyter.commands import overview


def test_help_and_an_answer_with_its_channels(lab_page):
    lab_page.notebook(["%load_ext gptoss_workbench", "%gptoss help", '%gptoss ask "What is 27 + 58?" --effort high'])
    lab_page.run_all()
    printed, _, answer = lab_page.outputs()
    assert printed.strip() == overview().strip()
    assert lab_page.value("gen.reason") == "stop_token"
    for channel in ("analysis", "final"):
        said = lab_page.value(f"gen.text({channel!r})")
        assert channel in answer and said.split("\n")[0] in answer
    lab_page.screenshot("ask")
    assert lab_page.errors == []


def test_a_usage_error_is_one_line_and_the_cell_fails(lab_page):
    lab_page.notebook(["%load_ext gptoss_workbench", "%gptoss nonsense"])
    lab_page.run_all()
    (said,) = lab_page.outputs()
    assert said.strip().startswith("UsageError: %gptoss has no command 'nonsense'")
    assert "Traceback" not in said
    # This is what stops Run All. Which of the later cells it stops depends on how many had reached the kernel.
    assert lab_page.execute("%gptoss nonsense") == "error"


def test_the_stop_button_of_the_toolbar_keeps_what_was_said(lab_page):
    """Sampled far too hot, the embedded model rambles until it is stopped."""
    lab_page.notebook(["%load_ext gptoss_workbench\n%gptoss load"])
    lab_page.run_all()
    ask = "%gptoss ask hello --temperature 20 --seed 1 --max-tokens 100000"
    lab_page.page.evaluate("(code) => { window.__done = null; window.__updates = 0;"
                           "const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;"
                           "const future = kernel.requestExecute({code});"
                           "future.onIOPub = m => { window.__updates += m.header.msg_type === 'update_display_data' };"
                           "future.done.then(reply => window.__done = reply.content.status); }", ask)
    lab_page.page.wait_for_function("() => window.__updates > 3")
    began = time.monotonic()
    lab_page.interrupt()
    lab_page.page.wait_for_function("() => window.__done")
    assert time.monotonic() - began < 5
    assert lab_page.page.evaluate("() => window.__done") == "ok"
    assert lab_page.value("gen.reason") in ("interrupted", "stopped")
    assert lab_page.value("len(gen.steps)") > 3


def test_tab_completes_commands(lab_page):
    lab_page.notebook(["%load_ext gptoss_workbench", ""])
    lab_page.run_all()
    cell = lab_page.page.locator(".jp-CodeCell").last
    cell.locator(".cm-content").click()
    lab_page.page.keyboard.type("%gptoss ask --effort ")
    lab_page.page.keyboard.press("Tab")
    lab_page.page.wait_for_selector(".jp-Completer-item")
    offered = lab_page.page.locator(".jp-Completer-match").all_inner_texts()
    assert offered[:3] == ["low", "medium", "high"]  # after them, JupyterLab offers words of the notebook
