"""Sampling against plain definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptoss_workbench.errors import WorkbenchError
from gptoss_workbench.model.sampling import Sampling, probabilities, sample
from tests.tolerances import PROBABILITY, SAMPLING_Z

LOGITS = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 2


def kept(how: Sampling) -> set[int]:
    return set((probabilities(LOGITS, how) > 0).nonzero()[:, 0].tolist())


def by_rank() -> list[int]:
    return LOGITS.argsort(descending=True).tolist()


@given(st.floats(0.05, 4), st.integers(0, 60), st.floats(0.01, 1), st.floats(0, 1))
def test_what_is_left_is_a_distribution_in_proportion(temperature, top_k, top_p, min_p) -> None:
    p = probabilities(LOGITS, Sampling(temperature, top_k, top_p, min_p))
    assert abs(float(p.sum()) - 1) < 10 * PROBABILITY
    assert p[LOGITS.argmax()] > 0
    plain = torch.softmax(LOGITS / temperature, 0)
    alive = p > 0
    torch.testing.assert_close(p[alive], plain[alive] / plain[alive].sum(), rtol=1e-4, atol=PROBABILITY)


def test_each_cut_by_hand() -> None:
    p = torch.softmax(LOGITS, 0)
    order = by_rank()
    assert kept(Sampling(1.0, top_k=7)) == set(order[:7])
    total, nucleus = 0.0, []
    for token in order:
        if total >= 0.8:
            break
        nucleus.append(token)
        total += float(p[token])
    assert kept(Sampling(1.0, top_p=0.8)) == set(nucleus)
    assert kept(Sampling(1.0, min_p=0.1)) == {t for t in range(50) if p[t] >= 0.1 * p.max()}


def test_frequencies_follow_the_distribution() -> None:
    how, rng, draws = Sampling(0.8, top_k=5), torch.Generator().manual_seed(3), 4000
    counts = torch.zeros(50)
    for _ in range(draws):
        counts[sample(LOGITS, how, rng)[0]] += 1
    p = probabilities(LOGITS, how)
    sigma = (draws * p * (1 - p)).sqrt()
    assert ((counts - draws * p).abs() <= SAMPLING_Z * sigma + 1e-9).all()


def test_greedy_and_log_probability() -> None:
    token, logprob = sample(LOGITS, Sampling())
    assert token == by_rank()[0]
    assert logprob == pytest.approx(math.log(float(torch.softmax(LOGITS, 0).max())), abs=1e-6)


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": 2}])
def test_out_of_range(bad) -> None:
    with pytest.raises(WorkbenchError, match=f"{next(iter(bad))} is out of range"):
        Sampling(**bad)
