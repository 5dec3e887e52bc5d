"""The judge is judged: problems, answers, information, requirements; then the shipped file is asked a little."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from gptoss_workbench.nano import behaviour, evaluate, measures, problems, render, structure

ASSETS = evaluate.ASSETS


@pytest.fixture(scope="module")
def found() -> dict:
    return json.loads((ASSETS / "eval.json").read_text())


# the judge ------------------------------------------------------------------------------------------------------


def test_right_completions_solve_their_problems() -> None:
    drawn = problems.draw_problems(3)
    assert len(drawn) == 3 * 3 * len(problems.CELLS)
    for problem in drawn:
        assert problems.solved(problem, problem.turn.completion)
        assert not problems.solved(problem, problem.turn.completion[:-1]), "cut off"


@pytest.mark.parametrize(("text", "answer"), [
    ("<|channel|>final<|message|>12<|return|>", "12"),
    ("<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>final<|message|>12<|return|>", "12"),
    ("<|channel|>final<|message|>12", ""),
    ("<|channel|>analysis<|message|>12<|return|>", ""),
    ("<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>",
     "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"),
])
def test_what_was_said(text: str, answer: str) -> None:
    assert problems.said(text) == answer


def test_operands_have_the_lengths_of_their_cell() -> None:
    for problem in problems.draw_problems(30, cells=("addition, 3 digits", "addition, 4-6 digits")):
        lengths = {len(number) for number in problems.numbers_in(problem.turn.user)}
        assert lengths <= ({3} if problem.cell == "addition, 3 digits" else {4, 5, 6})


def test_a_tampered_sum_differs_in_one_digit() -> None:
    for seed in range(20):
        problem, text, altered = behaviour.tampered_sum(Random(seed))
        true = problem.turn.answer
        assert sum(a != b for a, b in zip(true, altered, strict=True)) == 1
        assert text.endswith(f"Digits {' '.join(altered)}.<|end|><|start|>assistant")


def test_strict_harmony() -> None:
    good = render.encode("<|channel|>final<|message|>12<|return|>")
    assert behaviour.is_valid_harmony(good)
    assert not behaviour.is_valid_harmony(good[:-1])
    assert not behaviour.is_valid_harmony(render.encode("12<|return|>"))


def test_mutual_information() -> None:
    a = np.array([0, 0, 1, 1])
    assert measures.mutual_information(a, ["x", "x", "y", "y"]) == pytest.approx(1.0)
    assert measures.mutual_information(a, [0, 1, 0, 1]) == pytest.approx(0.0)


def test_selectivity() -> None:
    assert measures.selectivity(np.array([[1.0, 0.0], [0.0, 2.0]])) == 1.0
    assert measures.selectivity(np.array([[1.0, 1.0], [-1.0, -1.0]])) == 0.5


def test_requirements_are_bounds() -> None:
    cells = {"addition, 3 digits": {"low": 0.1, "medium": 0.9, "high": 0.96}}
    met = {need.name: need.met for need in measures.requirements(cells, {"best induction head": 0.7})}
    assert met == {"addition, 3 digits, high": False, "addition, 3 digits, low": True,
                   "addition, 3 digits, high - low": True, "best induction head": True}


def test_the_card_keeps_what_is_around_the_results() -> None:
    card = f"# Title\n\n{evaluate.BEGIN}\nold\n{evaluate.END}\n\nAfter.\n"
    new = evaluate.with_results(card, "new")
    assert new == f"# Title\n\n{evaluate.BEGIN}\n\nnew\n\n{evaluate.END}\n\nAfter.\n"
    assert evaluate.with_results(new, "new") == new


def test_pairs_to_patch_face_each_other() -> None:
    for seed in range(10):
        for clean, corrupt, answer, other in (structure.scene_pair(Random(seed)), structure.country_pair(Random(seed))):
            first, second = render.encode(clean), render.encode(corrupt)
            assert len(first) == len(second) and sum(a != b for a, b in zip(first, second, strict=True)) == 1
            assert answer != other and len(render.encode(answer)) == len(render.encode(other)) == 1


# the engine under the judge -----------------------------------------------------------------------------------


def test_rows_give_the_probabilities_of_all_ids(model) -> None:
    hidden = model.run("The capital of France is").hidden
    reader = behaviour.RowReader(model)
    full = torch.log_softmax(model.transformer.unembed(hidden), -1)
    compact = reader.log_probabilities(model.transformer.unembed_rows(hidden))
    torch.testing.assert_close(compact[:, reader.row_of_token], full, atol=1e-4, rtol=0)


def test_the_fast_loop_says_what_generate_says(model) -> None:
    drawn = problems.draw_problems(1, cells=("capital", "copy", "tool call", "refusal"))
    for problem, ids in zip(drawn, behaviour.answers(model, drawn), strict=True):
        assert model.generate(list(problem.ids), max_tokens=130).finish().tokens == ids


# the shipped file ---------------------------------------------------------------------------------------------


def test_the_shipped_weights_are_the_ones_that_were_measured(found) -> None:
    digest = hashlib.sha256((ASSETS / "model.safetensors").read_bytes()).hexdigest()
    assert (ASSETS / "SHA256").read_text() == f"{digest}  model.safetensors\n"
    assert found["sha256"] == digest


def test_the_card_shows_the_measured_results(found) -> None:
    card = (ASSETS / "MODEL_CARD.md").read_text()
    assert evaluate.with_results(card, evaluate.tables(found)) == card


def test_the_shipped_file_meets_its_requirements(found) -> None:
    assert found["problems per cell"] >= 200
    missed = [f"{need.name}: {need.value} {need.relation} {need.bound}" for need in evaluate.failures(found)]
    assert missed == []


def test_the_shipped_file_is_small() -> None:
    assert (ASSETS / "model.safetensors").stat().st_size < 4_100_000
    assert sum(path.stat().st_size for path in Path(ASSETS).iterdir()) < 4_500_000


@pytest.mark.slow
def test_the_published_accuracies_can_be_measured_again(model, found) -> None:
    """A sample of other held-out problems; three standard errors of the difference are allowed."""
    count = 20
    drawn = problems.draw_problems(count, seed=1)
    cells = behaviour.accuracies(drawn, behaviour.answers(model, drawn))
    for cell, row in cells.items():
        for effort, share in row.items():
            published = found["cells"][cell][effort]
            spread = max(published * (1 - published), 0.05) * (1 / count + 1 / found["problems per cell"])
            assert abs(share - published) <= 3 * spread**0.5 + 1e-9, (cell, effort)
