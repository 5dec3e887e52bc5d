"""Two thousand of the mutants of ``make fuzz``, and the harness itself: it must see what it is to count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fuzz import run as harness
from tests.fuzz.bases import make_bases, sign
from tests.fuzz.mutants import KINDS, Mutant

COUNT, SEED = 2000, 0


@pytest.mark.slow
def test_no_mutant_loads_silently_hangs_or_crashes() -> None:
    found = harness.run(COUNT, SEED)
    assert [one["number"] for one in found] == list(range(COUNT))
    bad = [one for one in found if one["outcome"] in harness.BAD or one.get("unsigned") in harness.BAD[:2]]
    assert not bad, json.dumps(bad[:5], indent=1)
    assert {one["kind"] for one in found} == set(KINDS)
    refused = sum(one["outcome"] == "refused" for one in found)
    assert refused > 0.85 * COUNT  # the others changed nothing that counts: spaces, unused keys
    assert any(one.get("unsigned") == "silent" for one in found), "the manifest is what these are caught by"


def test_the_committed_run_is_of_this_harness() -> None:
    counted = json.loads((Path(__file__).parent / "results.json").read_text())
    assert counted["mutants"] == 10_000 and list(counted["kinds"]) == list(KINDS)
    assert {bad: counted[bad] for bad in harness.BAD} == dict.fromkeys(harness.BAD, 0)
    assert counted["slowest_seconds"] < harness.PATIENCE
    for name, counts in counted["kinds"].items():
        assert counts["mutants"] == 100 * KINDS[name].share == counts["refused"] + counts["same model"]


@pytest.mark.parametrize(("fault", "outcome"), [
    ("crash", "crash"), ("hang", "hang"), ("silent", "silent"), ("unclear", "unclear"), ("long_winded", "unclear"),
    ("greedy", "unclear"),
])
def test_a_planted_fault_is_counted(fault: str, outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the run goes on after it, to the last mutant."""
    monkeypatch.setattr(harness, "PATIENCE", 1.0 if fault == "hang" else 60.0)
    found = harness.run(2, first=3, loader=f"tests.fuzz.planted:{fault}")
    assert [(one["number"], one["outcome"]) for one in found] == [(3, outcome), (4, outcome)]
    assert harness.summary(found, 0)[outcome] == 2 and "all" in harness.table(harness.summary(found, 0))


def test_mutants_are_told_by_seed_and_number(tmp_path: Path) -> None:
    make_bases(tmp_path / "bases")
    for number in range(100):
        made = []
        for attempt in ("one", "two"):
            mutant = Mutant(5, number)
            folder = tmp_path / attempt / str(number) / mutant.base
            folder.mkdir(parents=True)
            for file in (tmp_path / "bases" / mutant.base).iterdir():
                large = file.stat().st_size > 1_000_000
                (folder / file.name).symlink_to(file.resolve()) if large else \
                    (folder / file.name).write_bytes(file.read_bytes())
            if KINDS[mutant.kind].signed:
                sign(folder)
            mutant.damage(folder, tmp_path / "bases")
            made.append({file.name: file.read_bytes() if file.is_file() and file.stat().st_size < 1_000_000 else b""
                         for file in folder.iterdir()})
        assert made[0] == made[1]
    assert {Mutant(5, number).kind for number in range(100)} == set(KINDS)
