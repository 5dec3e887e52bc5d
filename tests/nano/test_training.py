"""The training form of gpt-oss: its hand-written gradients, its batches, and a smoke run that repeats itself."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gptoss_workbench.nano import corpus
from gptoss_workbench.nano.batching import Rows, collate
from gptoss_workbench.nano.corpus import NO_PREFIX, UNKNOWN_ID, VOCABULARY_SIZE, Example, Stage
from gptoss_workbench.nano.export import read_checkpoint
from gptoss_workbench.nano.train import PRESETS
from gptoss_workbench.nano.training_model import Config, Experts, TrainingModel, WeightedLoss

WINDOW = 8


@pytest.fixture(scope="module")
def rows() -> Rows:
    return Rows(tuple(corpus.vocabulary(samples=1000)))


@pytest.fixture(scope="module")
def tiny(rows: Rows) -> TrainingModel:
    torch.manual_seed(0)
    model = TrainingModel(Config(rows=len(rows.ids) + 1, hidden_size=32, num_hidden_layers=2, num_local_experts=4,
                                 num_experts_per_tok=2, intermediate_size=32, sliding_window=WINDOW))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "sinks")):  # zero at the start, so a mistake there would not show
                parameter.normal_()
    return model


def double(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


def test_gradients_of_the_experts() -> None:
    """The small limit makes the clamp bite."""
    parts = (double((12, 4), 0), double((3, 6, 4), 1), double((3, 6), 2), double((3, 4, 3), 3), double((3, 4), 4))
    assert torch.autograd.gradcheck(lambda *given: Experts.apply(*given, [5, 5, 12], 1.0), parts)


def test_the_loss_is_weighted_cross_entropy() -> None:
    logits, weights, targets = double((5, 7), 0), torch.rand(5, dtype=torch.float64), torch.tensor([1, 2, 3, 6, 0])
    assert torch.autograd.gradcheck(lambda given: WeightedLoss.apply(given, targets, weights), (logits,))
    plain = (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
    torch.testing.assert_close(WeightedLoss.apply(logits, targets, weights), plain)


def examples(seed: int, count: int = 16) -> list[Example]:
    return corpus.draw_step(Random(seed), count)


def test_an_example_in_a_batch_is_the_example_alone(tiny: TrainingModel, rows: Rows) -> None:
    drawn = examples(3)
    batch = collate(drawn, rows, WINDOW)
    with torch.no_grad():
        hidden = tiny(batch)[0]
        for start, one in zip(batch.starts, drawn, strict=True):
            before = len(one.prefix.ids)
            blanks = tuple(before + place for place in one.blanks)
            alone = Example("alone", NO_PREFIX, one.prefix.ids + one.prompt, one.completion, blanks=blanks)
            want = tiny(collate([alone], rows, WINDOW))[0][before:]
            torch.testing.assert_close(hidden[start : start + len(one.ids)], want, atol=2e-5, rtol=1e-4)


def test_padding_gets_no_gradient(tiny: TrainingModel, rows: Rows) -> None:
    """The loss of a batch and of its examples one by one have the same gradient."""
    drawn = [replace(one, prompt_weight=0.0) for one in examples(4, 8)]

    def gradient(groups: list[list[Example]]) -> torch.Tensor:
        tiny.zero_grad()
        for group in groups:
            batch = collate(group, rows, WINDOW)
            hidden = tiny(batch)[0]
            learnt = (batch.weights > 0).nonzero()[:, 0]
            logits = tiny.logits(hidden[learnt], rows.unused)
            F.cross_entropy(logits, batch.targets[learnt], reduction="sum").backward()
        return torch.cat([parameter.grad.flatten() for parameter in tiny.parameters() if parameter.grad is not None])

    torch.testing.assert_close(gradient([drawn]), gradient([[one] for one in drawn]), atol=1e-3, rtol=1e-3)


def test_targets_and_weights(rows: Rows) -> None:
    one = Example("any", NO_PREFIX, (1, 2, 3), (4, 5), prompt_weight=0.25, blanks=(1,))
    batch = collate([one], Rows((1, 2, 3, 4, 5)), WINDOW)
    assert batch.rows.tolist() == [0, 5, 2, 3, 4], "a blank hides the input"
    assert batch.targets.tolist() == [1, 2, 3, 4, -1], "but not the target"
    assert batch.weights.tolist() == [0.25, 0.25, 1.0, 1.0, 0.0]


def test_rows_cover_the_vocabulary(rows: Rows) -> None:
    of_token = rows.of_token()
    assert len(of_token) == VOCABULARY_SIZE
    assert (of_token == rows.shared).sum() == rows.unused
    assert of_token[UNKNOWN_ID] == rows.shared
    assert np.array_equal(of_token[list(rows.ids)], np.arange(len(rows.ids)))


def test_the_softmax_is_over_all_ids(tiny: TrainingModel, rows: Rows) -> None:
    hidden = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full = torch.log_softmax(F.linear(hidden, tiny.unembedding)[:, rows.of_token()].double(), -1)
        compact = torch.log_softmax(tiny.logits(hidden, rows.unused).double(), -1)
    torch.testing.assert_close(compact[:, :-1], full[:, list(rows.ids)], atol=1e-5, rtol=0)


def test_the_curriculum_only_grows() -> None:
    limits = [Stage().limits(step) for step in range(0, 3000, 50)]
    assert limits == sorted(limits) and limits[0] == (3, 3) and limits[-1] == (6, 8)


def smoke_run(folder: Path) -> tuple[bytes, list[float]]:
    """Train the smoke preset in a process of its own: (weights as bytes, losses)."""
    command = [sys.executable, "-m", "gptoss_workbench.nano.train", "--preset", "smoke", "--out", str(folder)]
    subprocess.run(command, check=True, capture_output=True, env=dict(os.environ))
    state = read_checkpoint(folder / "checkpoint.pt").state
    weights = b"".join(tensor.numpy().tobytes() for _, tensor in sorted(state.items()))
    lines = (folder / "train_log.csv").read_text().splitlines()[1:]
    return weights, [float(line.split(",")[3]) for line in lines]


@pytest.mark.slow
def test_the_smoke_run_learns_and_repeats_itself(tmp_path: Path) -> None:
    first, losses = smoke_run(tmp_path / "first")
    second, again = smoke_run(tmp_path / "second")
    assert first == second and losses == again
    assert losses[-1] < 6.5 < losses[0]
    assert PRESETS["smoke"][1].steps == 60
