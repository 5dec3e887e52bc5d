"""The dashboard as a person meets it: in JupyterLab, with mouse and keyboard.

Tests wait for what a view has painted (``data-seq``), never for time alone.
"""

from __future__ import annotations

import hashlib
import shutil

import pytest

CELLS = ["import gptoss_workbench as wb\nmodel = wb.load()", "dash = wb.explore(model)\ndash"]
ODD = ("<b>x</b> <img src=x onerror=window.__pwned=1> \U0001f9d1\u200d\U0001f680 \u202eabc\u202c \u05e9\u05dc "
       "a\u200bb\n$x$")
INK = "getComputedStyle(document.querySelector('.gptoss-title')).color"
# After some tokens it all but stands still, so that Stop comes in the middle on the slowest machine too.
SLOW = """
import itertools, time
def slowly(model):
    generate = model.generate
    def made(*args, **options):
        generation, steps = generate(*args, **options), itertools.count()
        advance = generation._driver.advance
        generation._driver.advance = lambda g: (time.sleep(0.15 if next(steps) < 10 else 3), advance(g))[1]
        return generation
    model.generate = made
slowly(model)
"""


class Dashboard:
    """The dashboard on the page, by what a person sees of it."""

    def __init__(self, lab) -> None:
        self.lab, self.page = lab, lab.page
        self.page.wait_for_selector(".gptoss-grid[data-seq]:not([data-seq='0'])")
        self.settle()

    def find(self, selector: str):
        return self.page.locator(f".gptoss-dashboard {selector}")

    def seq(self, view: str) -> int:
        return int(self.find(f".gptoss-{view}[data-seq]").first.get_attribute("data-seq"))

    def wait_painted(self, view: str, after: int) -> None:
        self.page.wait_for_function(
            "([view, after]) => Number(document.querySelector(`.gptoss-${view}`).dataset.seq) > after",
            arg=[view, after], timeout=30_000)

    def settle(self) -> None:
        """Until the kernel has nothing to compute and the page has painted its last state."""
        assert self.lab.execute("assert dash.flush(60)") == "ok"
        for view in ("strip", "grid", "routes", "lens", "next"):
            seq = self.lab.value(f"dash.board.{view}.seq")
            self.page.wait_for_function(
                "([view, seq]) => Number(document.querySelector(`.gptoss-${view}`).dataset.seq) >= seq",
                arg=[view, seq], timeout=30_000)

    def pixels(self) -> str:
        """A fingerprint of what the expert grid's canvas shows."""
        data = self.page.evaluate("document.querySelector('.gptoss-cells canvas').toDataURL()")
        return hashlib.sha256(data.encode()).hexdigest()

    def shown_text(self) -> str:
        return "".join(self.find(".gptoss-token").all_text_contents())


@pytest.fixture
def dashboard(lab_page):
    lab_page.notebook(CELLS, "dashboard.ipynb")
    lab_page.run_all()
    return Dashboard(lab_page)


def check_selection(dashboard, lab_page):
    """Every view follows the chosen token, by mouse and by keyboard."""
    titles = dashboard.find(".gptoss-next .gptoss-title")
    first, before = titles.inner_text(), dashboard.seq("next")
    dashboard.find(".gptoss-token[data-index='53']").click()
    dashboard.wait_painted("next", before)
    dashboard.settle()
    assert titles.inner_text() != first and lab_page.value("dash.selected") == 53
    detail = dashboard.find(".gptoss-strip .gptoss-detail")
    assert "token 53" in detail.inner_text() and "bytes" in detail.inner_text()
    dashboard.find(".gptoss-tokens").press("ArrowRight")
    dashboard.find(".gptoss-tokens").press("ArrowRight")
    dashboard.settle()
    assert lab_page.value("dash.selected") == 55
    dashboard.find(".gptoss-tokens").press("ArrowUp")
    dashboard.settle()
    above = lab_page.value("dash.selected")
    assert 0 < above < 53
    active = dashboard.find(".gptoss-tokens").get_attribute("aria-activedescendant")
    assert dashboard.page.locator(f"#{active}").get_attribute("aria-selected") == "true"
    dashboard.find(".gptoss-token[data-index='10']").hover()
    assert "token 10" in detail.inner_text()
    dashboard.find(".gptoss-tokens").press("End")
    dashboard.settle()
    assert lab_page.value("dash.selected == len(dash.state['ids']) - 1")


def check_typing(dashboard):
    before, pixels = dashboard.seq("grid"), dashboard.pixels()
    box = dashboard.find(".gptoss-user-box textarea")
    box.fill("")
    box.press_sequentially("How many apples are 3 + 4?", delay=40)
    during = dashboard.seq("grid")
    assert during > before + 2  # it moved while the keys came, not only afterwards
    dashboard.settle()
    assert dashboard.pixels() != pixels
    assert box.input_value() == "How many apples are 3 + 4?"
    assert "How·many·apples·are·3·+·4?" in dashboard.shown_text()


def check_odd_tokens(dashboard):
    """Inert, visible, and copied exactly."""
    requests: list[str] = []
    dashboard.page.on("request", lambda request: requests.append(request.url))
    dashboard.find(".gptoss-user-box textarea").fill(ODD)
    dashboard.settle()
    shown = dashboard.shown_text()
    for part in ("<b>x</b>", "<img·src=x", "U+202C", "U+200B", "\\xF0\\x9F", "↵", "$x$"):
        assert part in shown, part
    assert dashboard.find(".gptoss-strip :is(b, img, script, a)").count() == 0
    assert dashboard.page.evaluate("window.__pwned") is None
    assert not [url for url in requests if url.endswith("/x")]
    copied = dashboard.page.evaluate("""() => {
      const list = document.querySelector('.gptoss-tokens'), range = document.createRange();
      range.selectNodeContents(list.querySelector('.gptoss-user'));
      getSelection().removeAllRanges(); getSelection().addRange(range);
      const event = new ClipboardEvent('copy', {clipboardData: new DataTransfer(), bubbles: true, cancelable: true});
      list.dispatchEvent(event);
      getSelection().removeAllRanges();
      return event.clipboardData.getData('text/plain');
    }""")
    assert copied == f"<|start|>user<|message|>{ODD}<|end|>"


def check_long_prompt(dashboard):
    """It scrolls inside its box and leaves the rest where it was."""
    height = dashboard.find(".gptoss-grid").bounding_box()["height"]
    dashboard.find(".gptoss-user-box textarea").fill(" ".join(f"word{i}" for i in range(150)))
    dashboard.settle()
    assert dashboard.find(".gptoss-token").count() > 300
    box = dashboard.page.evaluate("""() => { const list = document.querySelector('.gptoss-tokens');
      return [list.clientHeight, list.scrollHeight, list.scrollWidth - list.clientWidth]; }""")
    assert box[0] < 230 < box[1] and box[2] <= 0
    assert dashboard.find(".gptoss-grid").bounding_box()["height"] == pytest.approx(height, abs=20)
    chosen = dashboard.find(".gptoss-token[aria-selected='true']").bounding_box()
    outer = dashboard.find(".gptoss-tokens").bounding_box()
    assert outer["y"] <= chosen["y"] and chosen["y"] + chosen["height"] <= outer["y"] + outer["height"] + 1


def test_typing_and_selecting(dashboard, lab_page):
    check_selection(dashboard, lab_page)
    check_typing(dashboard)
    check_odd_tokens(dashboard)
    check_long_prompt(dashboard)
    assert lab_page.errors == []


def check_bans(dashboard, lab_page):
    """By mouse and by keyboard, and let back in by the list."""
    used = lab_page.value("[slots[0][0] for _, slots in dash.state['routes']]")
    canvas = dashboard.find(".gptoss-grid .gptoss-cells canvas")
    box = canvas.bounding_box()
    experts, layers = lab_page.value("[model.config.num_local_experts, model.config.num_hidden_layers]")
    canvas.click(position={"x": box["width"] * (used[0] + 0.5) / experts, "y": box["height"] * 0.5 / layers})
    dashboard.settle()
    assert lab_page.value("dash.banned") == [[0, used[0]]]
    assert dashboard.find(".gptoss-next-head").inner_text().split() == ["token", "edited", "clean"]
    cells = dashboard.find(".gptoss-grid .gptoss-cells")
    for key in ("ArrowDown", "Enter"):
        cells.press(key)
    dashboard.settle()
    assert lab_page.value("dash.banned") == [[0, used[0]], [1, used[0]]]
    assert "banned" in dashboard.find(".gptoss-grid .gptoss-detail").inner_text()
    chips = dashboard.find(".gptoss-chip:not(.gptoss-clear)")
    assert [text.split(":")[0] for text in chips.all_inner_texts()] == ["layer 0", "layer 1"]
    chips.first.click()
    dashboard.settle()
    assert lab_page.value("dash.banned") == [[1, used[0]]]
    dashboard.find(".gptoss-clear").click()
    dashboard.settle()
    assert lab_page.value("dash.banned") == [] and dashboard.find(".gptoss-next-head").count() == 0


def check_answer(dashboard, lab_page):
    """It streams, stops half-way, and runs to its end."""
    assert lab_page.execute(SLOW) == "ok"
    prompt = dashboard.find(".gptoss-token").count()
    dashboard.find("button.gptoss-start").click()
    dashboard.page.wait_for_selector(".gptoss-answer[data-running='true'] .gptoss-channel-analysis", timeout=30_000)
    counts = set()
    for _ in range(200):
        counts.add(dashboard.find(".gptoss-token").count())
        if len(counts) == 3:
            break
        dashboard.page.wait_for_timeout(100)
    assert len(counts) == 3 and max(counts) > prompt  # it grows while it is written
    dashboard.find("button.gptoss-stop").click()
    dashboard.page.wait_for_selector(".gptoss-answer[data-running='false']", timeout=30_000)
    dashboard.settle()
    assert dashboard.find(".gptoss-answer .gptoss-legend").inner_text().startswith("stopped by you")
    assert lab_page.execute("del model.generate") == "ok"
    dashboard.find("button.gptoss-start").click()
    dashboard.page.wait_for_selector(".gptoss-channel-final", timeout=30_000)
    dashboard.settle()
    assert dashboard.find(".gptoss-answer .gptoss-legend").inner_text().startswith("finished")
    assert "<|channel|>final<|message|>" in dashboard.shown_text()
    labels = dashboard.find(".gptoss-message > .gptoss-label").all_inner_texts()
    assert labels == ["system", "user", "assistant analysis", "assistant final"]


def test_banning_answering_and_stopping(dashboard, lab_page):
    check_bans(dashboard, lab_page)
    check_answer(dashboard, lab_page)
    assert lab_page.errors == []


def test_the_patch_is_drawn_and_the_themes_are_followed(dashboard, lab_page):
    page = dashboard.page
    dashboard.find(".gptoss-patch-panel .jupyter-widget-Collapse-header").click()
    dashboard.find("button.gptoss-patch").click()
    page.wait_for_selector(".gptoss-heat .gptoss-token-axis .gptoss-guess", timeout=60_000)
    rows = dashboard.find(".gptoss-token-axis .gptoss-guess")
    assert rows.all_text_contents() == ["The", "·capital", "·of", "·France·Italy", "·is"]
    cells = dashboard.find(".gptoss-heat .gptoss-cells")
    for key in ("ArrowDown", "ArrowDown", "ArrowDown", "ArrowRight"):
        cells.press(key)
    found = lab_page.value("float(dash.patch_panel.result[1, 3])")
    said = dashboard.find(".gptoss-heat .gptoss-detail").inner_text()
    assert said.startswith("layer 1, token 3 “·France | ·Italy”:") and f"{found:.3g}"[:3] in said

    def look():
        canvases = "[...document.querySelectorAll('.gptoss-cells canvas')].map(c => [c.width, c.toDataURL()])"
        return page.evaluate(f"() => [{INK}, ...{canvases}]")

    light = look()
    lab_page.theme("dark")
    page.wait_for_function(f"ink => {INK} !== ink", arg=light[0])
    page.wait_for_timeout(500)
    dark = look()
    for before, after in zip(light[1:], dark[1:], strict=True):
        assert before[0] == after[0] and before[1] != after[1]  # the same size in other colours
    lab_page.theme("light")
    page.wait_for_function(f"ink => {INK} === ink", arg=light[0])
    page.wait_for_timeout(500)
    assert look() == light
    dashboard.find(".gptoss-corrupt-box input").fill("The capital of New Zealand is")
    dashboard.find("button.gptoss-patch").click()
    page.wait_for_selector(".gptoss-patch-body [data-level='error']", timeout=30_000)
    assert "different lengths" in dashboard.find(".gptoss-patch-body .gptoss-message-line").inner_text()
    assert lab_page.errors == []


def test_running_the_cell_again_closes_the_old_one(dashboard, lab_page):
    assert lab_page.execute("old = dash") == "ok"
    threads = "[t.name for t in __import__('threading').enumerate() if t.name.startswith('gptoss-')]"
    lab_page.run_all()
    dashboard.page.wait_for_selector(".gptoss-grid[data-seq]:not([data-seq='0'])")
    assert lab_page.value("old._closed and not dash._closed")
    assert len(lab_page.value(threads)) <= 2
    assert dashboard.find("").count() == 1 or dashboard.page.locator(".gptoss-dashboard").count() == 1
    assert lab_page.execute("a, b = wb.explore(model, prompt='A'), wb.explore(model, prompt='B')") == "ok"
    assert lab_page.value("not a._closed and not b._closed and not dash._closed")
    assert lab_page.errors == []


def test_the_first_notebook_opens_a_dashboard(lab_page, repository):
    notebook = repository / "notebooks" / "01_first_light.ipynb"
    if not notebook.exists():
        pytest.skip("notebooks/01_first_light.ipynb is not there")
    shutil.copy(notebook, lab_page.root / notebook.name)
    lab_page.open(notebook.name)
    lab_page.run_all(timeout=300)
    lab_page.page.wait_for_selector(".gptoss-grid[data-seq]:not([data-seq='0'])")
    assert lab_page.errors == []
