"""Model text in a cell's output: escaped, and nothing in it invisible."""

from __future__ import annotations

from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from gptoss_jupyter import markup
from gptoss_workbench.plots.labels import pieces


class Reader(HTMLParser):
    """Collects tags, attributes and text as a browser would."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.update(name for name, _ in attrs)

    def handle_data(self, data):
        self.text += data


def message(text: str, label: str = "final") -> dict:
    return {"label": label, "kind": label, "pieces": pieces(text, spaces=False)}


@given(st.text(), st.sampled_from(["final", "analysis", "<i>odd</i>", "to functions.<x>"]), st.text(max_size=20))
def test_no_text_becomes_markup(text, label, note):
    read = Reader(markup.as_html([message(text, label)], note))
    assert set(read.tags) <= {"div", "span"}
    assert read.attributes <= {"class", "style"}
    shown = "".join(part for _, part in pieces(text, spaces=False))
    assert read.text.replace("\r", "\n") == (label + shown + note).replace("\r", "\n")


def test_hostile_text_stays_text():
    html = markup.as_html([message("</div><script>alert(1)</script><img src=x onerror=alert(1)>&lt;")])
    assert "<script" not in html and "<img" not in html
    assert "&amp;lt;" in html


def test_plain_text_has_one_line_a_message():
    said = [message("7+8", "analysis"), message("85")]
    assert markup.as_text(said) == "analysis: 7+8\nfinal: 85"
    assert markup.as_text(said, "stopped") == "analysis: 7+8\nfinal: 85\nstopped"
