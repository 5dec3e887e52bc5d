"""The dashboard as still HTML: meaningful, escaped, and it loads nothing."""

from __future__ import annotations

from html.parser import HTMLParser

import gptoss_workbench as wb
from gptoss_jupyter import html

ALLOWED = {"div", "span", "p", "b", "table", "tr", "th", "td"}
HOSTILE = '<b>x</b></span><script>alert(1)</script> " onmouseover="a() &lt; <img src=x onerror=a()>\u202e'


class Seen(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.open.append(tag)
        for name, value in attrs:
            if name == "style":
                assert value and "url(" not in value and "expression" not in value

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(page: str) -> Seen:
    seen = Seen()
    seen.feed(page)
    seen.close()
    assert seen.open == []
    return seen


def test_snapshot_shows_what_the_dashboard_shows(model):
    dash = wb.explore(model)
    dash.banned = [(1, 3)]
    dash.answer()
    dash.patch()
    bundle = dash._repr_mimebundle_()
    state = dash.state
    dash.close()
    assert {"text/plain", "text/html", "application/vnd.jupyter.widget-view+json"} <= set(bundle)
    assert bundle["text/plain"] == "Explorer(embedded nano model, 'What is 27 + 58?')"
    seen = read(bundle["text/html"])
    assert seen.tags <= ALLOWED and seen.attributes <= {"style", "class", "title", "scope"}
    for part in ("coloured by surprisal (nats)", "analysis", "final", "layer 1 without expert 3", "·France",
                 f"E{state['routes'][0][1][0][0]}", "probability", "<|return|>"):
        assert part in seen.text, part
    assert len(bundle["text/html"]) < 60_000


def test_snapshot_escapes_everything(model):
    dash = wb.explore(model, prompt=HOSTILE, developer=HOSTILE)
    dash.flush()
    state = dash.state
    dash.close()
    page = html.snapshot(HOSTILE, state)
    seen = read(page)
    assert seen.tags <= ALLOWED and seen.attributes <= {"style", "class", "title", "scope"}
    assert "alert" in seen.text and "U+202E" in seen.text and "\u202e" not in page


def test_snapshot_of_nothing_is_short():
    assert "nano" in read(html.snapshot("nano", {"status": "no model"})).text
