"""The page on hooks says what is: its tables are those of the code, its examples run, its picture is complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import gptoss_workbench as wb
from gptoss_workbench.hooks.changes import KINDS
from gptoss_workbench.hooks.table import as_markdown
from tests.hooks.sae_folders import tensors, write

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "hooks.md").read_text()
EXAMPLES = re.findall(r"^\| `(wb\.\w+\(.*\))` \|", PAGE, re.MULTILINE)
CAPTURES = [line for line in EXAMPLES if line.startswith("wb.capture")]
EDITS = [line for line in EXAMPLES if not line.startswith("wb.capture")]
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def names(model, tmp_path_factory):
    """What the examples speak of: another run of the same length, a direction, an expert that serves in layer 1, an SAE
    of the embedded model's width."""
    run = model.run(wb.chat(QUESTION.replace("France", "Italy")), capture=list(wb.SITES))
    expert = int(model.run(wb.chat(QUESTION), capture="router").tensor("router.experts", 1)[-1, 0])
    sae = wb.load_sae(write(tmp_path_factory.mktemp("page") / "sae", "standard", tensors("standard", width=128)))
    return {"wb": wb, "torch": torch, "run": run, "sae": sae, "v": torch.linspace(-1, 1, 128), "e": expert}


def test_the_tables_are_those_of_the_code() -> None:
    assert as_markdown(wb.SITES.values()) in PAGE
    assert as_markdown(wb.POOLED.values()) in PAGE
    assert as_markdown([wb.SITES["attn.z"]]).splitlines()[-1] == \
        "| `attn.z` | layer, token, head, d_head | values mixed by the pattern |"


def test_every_edit_has_an_example() -> None:
    assert {line.removeprefix("wb.").partition("(")[0] for line in EDITS} == {*KINDS, "route_around"}


@pytest.mark.parametrize("line", EDITS)
def test_the_edits_act(line: str, model, names) -> None:
    plain, run = (model.run(wb.chat(QUESTION), edits=edits) for edits in ((), eval(line, names)))
    assert not torch.equal(plain.hidden, run.hidden)


@pytest.mark.parametrize("line", CAPTURES)
def test_the_captures_capture(line: str, model, names) -> None:
    run = model.run(wb.chat(QUESTION, effort="high") if "analysis" not in line else model.generate(
        wb.chat("What is 27 + 58?", effort="high"), max_tokens=40).ids, capture=eval(line, names))
    assert run.data.data_vars and all(variable.size for variable in run.data.data_vars.values())


def test_the_picture_shows_every_site() -> None:
    picture = (ROOT / "docs" / "layer.svg").read_text()
    assert sorted(re.findall(r"monospace[^>]*>([a-z_.]+)<", picture)) == sorted(wb.SITES)


def test_links_lead_somewhere() -> None:
    anchors = {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")
               for title in re.findall(r"^## (.*)$", PAGE, re.MULTILINE)}
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        assert target[1:] in anchors if target.startswith("#") else (ROOT / "docs" / target).exists(), target


def test_the_hand_made_edit_of_the_page_does_the_same(tmp_path) -> None:
    """The comparison is fair: the plain hooks shown there, on transformers, give what the one line gives."""
    from tests.factories import tiny_model, write_hf
    from tests.oracle import transformers_model
    from tests.tolerances import TINY_LOGITS_F32

    folder, ids = write_hf(tmp_path / "hf", tiny_model(seed=2)), list(range(20))
    code = PAGE[PAGE.rindex("```python\n") + 10:PAGE.rindex("```")]
    names = {"model": transformers_model(folder), "torch": torch}
    exec(code, names)
    handle = names["route_around"](1, 3)
    with torch.no_grad():
        theirs = names["model"](torch.tensor([ids])).logits[0]
    handle.remove()
    run = wb.load(folder, dtype="float32").run(ids, edits=wb.route_around(layer=1, experts=3))
    torch.testing.assert_close(run.logits, theirs, rtol=0, atol=TINY_LOGITS_F32)
