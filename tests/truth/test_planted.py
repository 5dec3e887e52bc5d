"""The planted truth is true: held to weights left out, other windows, and text the models write, by no method."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import gptoss_workbench as wb
from gptoss_workbench.errors import ExperimentError
from gptoss_workbench.planted import Pair, Planted
from gptoss_workbench.planted.alphabet import DIGITS, END, UPPER

CIRCUITS = {**wb.planted.MAKERS, "faithful reasoning": partial(wb.planted.reasoning, faithful=True)}
PAIRS, SEEDS = 6, (0, 7)


def made(name: str, seed: int) -> Planted:
    return CIRCUITS[name](seed, pairs=PAIRS)


def leanings(model, pair: Pair) -> tuple[float, float]:
    """Logit of the answer minus logit of the other token, clean and corrupt."""
    found = []
    for ids in (pair.clean, pair.corrupt):
        logits = model.run(list(ids)).logits[-1]
        found.append(float(logits[pair.answer] - logits[pair.other]))
    return found[0], found[1]


def says(model, ids: tuple[int, ...]) -> int:
    return int(model.run(list(ids)).logits[-1].argmax())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CIRCUITS)
def test_the_circuit_answers_with_its_background_and_alone(name: str, seed: int) -> None:
    planted = made(name, seed)
    for model in (planted.model, planted.bare(), planted.without(*planted.decoys)):
        for pair in planted.pairs:
            clean, corrupt = leanings(model, pair)
            assert says(model, pair.clean) == pair.answer and clean - corrupt > 3
    if name in ("fact", "route", "band", "unfaithful reasoning", "faithful reasoning"):
        assert all(says(planted.model, pair.corrupt) == pair.other for pair in planted.pairs)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", [name for name in CIRCUITS if name != "route"])
def test_without_any_part_of_it_nothing_is_known(name: str, seed: int) -> None:
    """The decoys of the part that is missing are still there; they don't help."""
    planted = made(name, seed)
    for place in planted.truth:
        right = [says(planted.without(place), pair.clean) == pair.answer for pair in planted.pairs]
        assert sum(right) <= len(right) / 2, place


def test_each_expert_of_a_route_answers_for_its_own_kind() -> None:
    planted = wb.planted.route(3, pairs=12)
    one, two = (planted.without(place) for place in sorted(planted.truth) if place.kind == "expert")
    lost = [{n for n, pair in enumerate(planted.pairs)
             if leanings(model, pair)[0] < 0.6 * leanings(planted.model, pair)[0]} for model in (one, two)]
    assert lost[0] | lost[1] == set(range(12)) and not lost[0] & lost[1]
    (mover,) = (place for place in planted.truth if place.kind == "head")
    assert all(leanings(planted.without(mover), pair)[0] < 4 for pair in planted.pairs)


def test_an_expert_serves_its_class_of_tokens_and_no_other() -> None:
    """Which experts serve, counted without a method: the subject has the fact's expert and its decoy."""
    planted = wb.planted.fact(5, pairs=PAIRS)
    experts = {place.index: place for place in planted.truth | planted.decoys if place.kind == "expert"}
    layer = next(iter(experts.values())).layer
    for pair in planted.pairs:
        chosen = planted.model.run(list(pair.clean), capture="router.experts").tensor("router.experts", layer)
        assert set(chosen[pair.roles["subject"]].tolist()) == set(experts)


def test_the_gate_is_the_sink() -> None:
    """The gated head's sink set to nothing in the weights: it copies whatever the switch says."""
    planted = wb.planted.sink_gate(2, pairs=PAIRS)
    assert planted.sink is not None
    layer, head = planted.sink
    for pair in planted.pairs:
        assert says(planted.model, pair.corrupt) != pair.answer
    open_ended = planted.build()
    open_ended.weights.layers[layer].sinks[head] = -torch.inf
    for pair in planted.pairs:
        assert says(open_ended, pair.corrupt) == pair.answer


def test_the_window_is_what_hides_the_far_letter() -> None:
    """Under a wider window the same weights see both letters and can't tell the two prompts apart."""
    for seed in SEEDS:
        planted = wb.planted.band(seed, pairs=8)
        assert {len(pair.clean) - 1 - pair.roles["far"] for pair in planted.pairs} >= {8}, "just beyond"
        assert {len(pair.clean) - 1 - pair.roles["near"] for pair in planted.pairs} >= {7}, "just within"
        wide = planted.with_window(64)
        for pair in planted.pairs:
            clean, corrupt = leanings(planted.model, pair)
            assert clean > 5 and corrupt < -5
            clean, corrupt = leanings(wide, pair)
            assert abs(clean - corrupt) < 5


@pytest.mark.parametrize("faithful", [False, True])
def test_reasoning_is_written_and_read_only_when_faithful(faithful: bool) -> None:
    """The model writes the digit and the mark by itself; another digit in its place changes the answer or doesn't."""
    planted = wb.planted.reasoning(4, faithful=faithful, pairs=PAIRS)
    (works,) = (place for place in planted.decoys if place.kind == "expert")
    unable = planted.without(works)
    written = [says(unable, pair.clean[: pair.roles["reasoning"]]) for pair in planted.pairs]
    right = [pair.clean[pair.roles["reasoning"]] for pair in planted.pairs]
    assert sum(a == b for a, b in zip(written, right, strict=True)) <= PAIRS / 2, "the digit is worked out"
    for pair in planted.pairs:
        at = pair.roles["reasoning"]
        written = planted.model.generate(list(pair.clean[:at]), max_tokens=3).finish()
        assert list(written.tokens) == [*pair.clean[at:], pair.answer] and pair.clean[-1] == END
        answers = {says(planted.model, (*pair.clean[:at], digit, END)) for digit in DIGITS}
        if faithful:
            assert len(answers) == len(DIGITS) and answers <= set(UPPER)
        else:
            assert answers == {pair.answer}


def test_the_background_hides_the_basis_and_follows_the_seed() -> None:
    one, again, other = wb.planted.fact(1, pairs=2), wb.planted.fact(1, pairs=2), wb.planted.fact(2, pairs=2)
    assert torch.equal(one.model.weights.embed, again.model.weights.embed) and one.pairs == again.pairs
    assert not torch.equal(one.model.weights.embed, other.model.weights.embed)
    for _, tensor in one.model.weights.tensors():
        assert bool((tensor != 0).all()), "no weight gives a place away by being zero"


def test_turning_the_stream_changes_nothing() -> None:
    """The same parts without noise under two rotations."""
    bare = wb.planted.fact(0, pairs=3).bare()
    from gptoss_workbench.planted import blueprint

    flat = blueprint.SHAPES
    assert {name for name, _ in bare.weights.tensors() if name.startswith("layers.0.")} == \
        {f"layers.0.{name}" for name in flat}
    turn = torch.linalg.qr(torch.randn(blueprint.WIDTH, blueprint.WIDTH, generator=torch.Generator().manual_seed(5)))[0]
    layers = [type(layer)(**blueprint._turned(vars(layer), turn)) for layer in bare.weights.layers]
    w = bare.weights
    turned = wb.Model(bare.config, type(w)(w.embed @ turn, layers, w.final_norm, w.unembed @ turn, None))
    for pair in wb.planted.fact(0, pairs=3).pairs:
        torch.testing.assert_close(bare.run(list(pair.clean)).logits, turned.run(list(pair.clean)).logits,
                                   atol=1e-4, rtol=0)


def test_places_can_be_given() -> None:
    planted = wb.planted.induction(0, previous=(1, 2), match=(3, 0), pairs=1)
    assert {(place.layer, place.index) for place in planted.truth} == {(1, 2), (3, 0)}
    assert planted.path == ("first", "first", "second", "second")


@pytest.mark.parametrize("call, words", [
    (lambda: wb.planted.induction(previous=(2, 0), match=(1, 0)), "later layer"),
    (lambda: wb.planted.fact(expert=(0, 8)), "no such expert"),
    (lambda: wb.planted.band(head=(1, 0)), "band is full"),
    (lambda: wb.planted.route(expert=(0, 1), second_expert=(0, 1)), "two experts"),
    (lambda: wb.planted.no_circuit(like="grokking"), "no such circuit"),
    (lambda: wb.planted.fact(pairs=0), "pairs="),
    (lambda: wb.planted.fact(-1), "seed="),
])
def test_mistakes(call, words: str) -> None:
    with pytest.raises(ExperimentError, match=words) as caught:
        call()
    assert str(caught.value).count("\n") < 6
