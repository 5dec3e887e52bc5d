"""The parity report: its functions pass here on a part of what ``make parity`` runs, they fail when they should, and
what is committed is what they said."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gptoss_workbench as wb
from gptoss_kernels.mxfp4 import Mxfp4Tensor
from gptoss_workbench.model.model import Model
from tests.parity import cases, formats, forward, pieces, report, rounding, table, yarn
from tests.parity.cases import CLAMPS, EMBEDDED, SHAPES, Pair
from tests.parity.rows import Row, bits_differ, max_abs, max_of_largest, rel_l2, worst


def failed(rows: list[Row]) -> list[str]:
    return [f"{row.case}, {row.what}, {row.against}, {row.metric}: {row.value}" for row in rows if row.passed is False]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return cases.tiny_pair("tiny", tmp_path_factory.mktemp("tiny"))


# the measurements -----------------------------------------------------------------------------------------------


def test_every_site_of_a_tiny_model(tiny: Pair) -> None:
    rows = forward.sites(tiny) + forward.hooks(tiny) + formats.loaded(tiny)
    assert {row.what for row in rows} >= set(wb.SITES)
    assert failed(rows) == []


def test_bfloat16_of_a_tiny_model(tiny: Pair) -> None:
    teachers = rounding.exact(tiny)
    rows = rounding.sublayers(tiny, teachers) + rounding.replayed(tiny, teachers) + rounding.flips(tiny, teachers)
    assert failed(rows) == []
    assert any(row.value > 1e-3 for row in rows)  # else nothing was rounded


def test_pieces_of_a_tiny_model(tiny: Pair) -> None:
    rows = pieces.pieces(tiny)
    assert failed(rows) == []
    assert {f"chunks of {size}" for size in (1, 7, 8, 9, 24)} <= {row.what for row in rows}


@pytest.mark.parametrize("name", CLAMPS)
def test_both_clamps_bite(name: str, tmp_path: Path) -> None:
    pair = cases.tiny_pair(name, tmp_path)
    assert failed(forward.sites(pair) + forward.clamps(pair)) == []
    free = Model(replace(pair.ours().config, swiglu_limit=1e9), pair.ours().weights)  # the clamps are not idle
    pair._loaded["ours", "float32"] = free
    assert any(row.what == "expert.act" for row in forward.sites(pair) if row.passed is False)


def test_what_is_equal_bit_for_bit(tmp_path: Path) -> None:
    rows = formats.mxfp4() + formats.layouts(tmp_path) + yarn.frequencies() + yarn.tables()
    assert failed(rows) == []
    assert sum(row.count or 0 for row in rows if row.what == "MXFP4 decoding") == 4 * 256 * 512


# the report can fail --------------------------------------------------------------------------------------------


def other_weights(model: Model, layer: int, **changed: object) -> Model:
    """The model with some tensors of one layer changed; the one given stays as it is."""
    layers = list(model.weights.layers)
    layers[layer] = replace(layers[layer], **changed)
    return Model(model.config, replace(model.weights, layers=layers))


def added(tensor: torch.Tensor, index: int, amount: float) -> torch.Tensor:
    changed = tensor.clone()
    changed[index] += amount
    return changed


def next_scale(experts: Mxfp4Tensor) -> Mxfp4Tensor:
    scales = experts.scales.clone()
    scales[:, 5, 1] += 1  # of each expert, one block of one row
    return Mxfp4Tensor(experts.blocks, scales)


DAMAGE = {  # name -> (a model from a model, first site that must fail, its layer)
    "a sink by 1e-3": (
        lambda m: other_weights(m, 2, sinks=added(m.weights.layers[2].sinks, 3, 1e-3)), "attn.pattern", 2),
    "a router bias by 1e-3": (
        lambda m: other_weights(m, 3, router_bias=added(m.weights.layers[3].router_bias, 0, 1e-3)), "router.logits", 3),
    "a scale byte by 1": (
        lambda m: other_weights(m, 1, down=next_scale(m.weights.layers[1].down)), "expert.out", 1),
    "a window one shorter": (
        lambda m: Model(replace(m.config, sliding_window=7), m.weights), "attn.pattern", 0),
    "YaRN rounded": (lambda m: Model(replace(m.config, rope_truncate=True), m.weights), "attn.q", 0),
    "epsilon 1e-6": (lambda m: Model(replace(m.config, rms_norm_eps=1e-6), m.weights), "attn.norm", 0),
    "alpha 1.7": (lambda m: Model(replace(m.config, swiglu_alpha=1.7), m.weights), "expert.act", 0),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_seen_where_it_is(name: str, tiny: Pair) -> None:
    damage, site, layer = DAMAGE[name]
    pair = Pair(tiny.name, tiny.folder, tiny.ours_from, tiny.prompts, dict(tiny._loaded))
    pair._loaded["ours", "float32"] = damage(tiny.ours())
    rows = {row.what: row for row in forward.sites(pair) if row.metric == "rel L2"}
    assert rows[site].passed is False and rows["logits"].passed is False
    limit = rows[site].limit or 0
    assert max(rows[site].by_layer[:layer], default=0) <= limit < rows[site].by_layer[layer]
    before = list(wb.SITES)[:list(wb.SITES).index(site)]
    assert all(row.by_layer[layer] <= limit for what, row in rows.items() if what in before and len(row.by_layer) > 1
               and (name, what) != ("a window one shorter", "attn.scores"))  # hidden keys count as zero there


def test_the_command_fails_and_says_where(tiny: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def once(pair: Pair, name: str) -> None:
        monkeypatch.setattr(cases, "pair", lambda *arguments: pair)
        monkeypatch.setattr(report, "of_pair", lambda pair: iter(forward.sites(pair)))
        (tmp_path / name).mkdir()

    once(tiny, "sound")
    assert report.main(["--only", "tiny", "--folder", str(tmp_path / "sound")]) == 0
    assert "fail" not in (tmp_path / "sound" / report.PAGE).read_text()
    damaged = Pair(tiny.name, tiny.folder, tiny.ours_from, tiny.prompts, dict(tiny._loaded))
    damaged._loaded["ours", "float32"] = DAMAGE["a sink by 1e-3"][0](tiny.ours())
    once(damaged, "damaged")
    capsys.readouterr()
    assert report.main(["--only", "tiny", "--folder", str(tmp_path / "damaged")]) == 1
    said = capsys.readouterr()
    assert "FAIL float32 | tiny | attn.pattern | transformers" in said.err
    assert "attn.scores" not in said.err.splitlines()[0] and "**fail**" in said.out
    page = (tmp_path / "damaged" / report.PAGE).read_text()
    assert "## Failed" in page and "| tiny | attn.pattern |" in page


def test_metrics() -> None:
    one, two = torch.tensor([3.0, -4.0, 0.0]), torch.tensor([3.0, -4.0, -0.0])
    assert max_abs(one, two) == rel_l2(one, two) == 0 and bits_differ(one, two) == 1
    assert rel_l2(one * 1.5, two) == pytest.approx(0.5) and max_of_largest(one * 1.5, two) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="shape"):
        max_abs(one, two[:2])
    with pytest.raises(ValueError, match="bfloat16"):
        bits_differ(one, two.bfloat16())
    assert math.isnan(worst([1.0, math.nan, 2.0])) and math.isnan(worst([math.nan, 1.0]))
    assert Row("", "", "", "", "", "", math.nan, "TINY_LOGITS_F32").passed is False
    assert Row("", "", "", "", "", "", math.nan, "CLAMPED", at_least=True).passed is False
    assert Row("", "", "", "", "", "", 0.5).passed is None
    assert json.loads(json.dumps(Row("", "", "", "", "", "", math.nan, "NONE").as_json()))["value"] == "nan"


# what is committed ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def committed() -> dict:
    return json.loads((report.HERE / report.RESULTS).read_text())


def test_committed_results_are_whole_and_green(committed: dict) -> None:
    assert [row for row in committed["rows"] if row["passed"] is False] == []
    assert {row["case"] for row in committed["rows"]} >= {*SHAPES, EMBEDDED}
    assert {row["group"] for row in committed["rows"]} == set(table.ABOUT)
    weights = wb.model.model.EMBEDDED / "model.safetensors"
    assert committed["about"]["embedded_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest(), "make parity"


def test_committed_page_is_made_from_the_results(committed: dict) -> None:
    assert (report.HERE / report.PAGE).read_text() == table.page(committed), "make parity"


def test_the_readme_shows_the_results(committed: dict) -> None:
    text = report.README.read_text()
    assert text.count(table.START) == text.count(table.END) <= 1
    assert table.into_readme(text, table.short(committed)) == text, "make parity"


def test_only_what_is_between_the_markers_changes() -> None:
    text = f"a\n{table.START}\nold\n{table.END}\nb {table.END}\n"
    assert table.into_readme(text, "new") == f"a\n{table.START}\nnew\n{table.END}\nb {table.END}\n"
    for other in ("no markers", f"{table.START} alone", f"{table.END} then {table.START}"):
        assert table.into_readme(other, "new") == other
