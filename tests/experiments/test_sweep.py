"""A sweep against one ``model.run`` after the other: the same numbers, the same mistakes, less work."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gptoss_workbench as wb
from gptoss_workbench.errors import EditError, EditNeverFired, ExperimentError, SiteError
from gptoss_workbench.experiments.sweeps.cones import cones, halves, touches
from gptoss_workbench.experiments.sweeps.engine import Case, Engine
from gptoss_workbench.hooks.prompts import Prompts
from tests.factories import tiny_model, write_hf
from tests.tolerances import SWEEP_F32

DRAW = torch.Generator().manual_seed(3)
PROMPTS = [torch.randint(512, (length,), generator=DRAW).tolist() for length in (24, 17, 9)]
OTHER = torch.randint(512, (24,), generator=DRAW).tolist()
METRIC = wb.logit_diff(7, 450)
RESIDUALS = ["embed", "resid_pre", "resid_mid", "resid_post"]
TOKENWISE = ["attn.norm", "attn.q", "attn.k", "attn.v", "attn.z", "attn.out", "mlp.norm", "mlp.out", "router.logits",
             "router.weights", "expert.act", "expert.out", "final_norm", "logits"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    return wb.load(write_hf(tmp_path_factory.mktemp("tiny") / "hf", tiny_model(seed=21)), dtype="float32")


@pytest.fixture(scope="module")
def other(tiny):
    return tiny.run(OTHER, capture=[*RESIDUALS, *TOKENWISE, "router.experts", "attn.pattern"])


def engine_logits(model, prompts, cases, always=None, **options) -> torch.Tensor:
    found = torch.full((len(cases), model.config.vocab_size), torch.nan)
    for numbers, logits in Engine(model, prompts, cases, always, **options).stream():
        found[numbers] = logits
    return found


def naive_logits(model, prompts, cases, always=None) -> torch.Tensor:
    return torch.stack([model.run(prompts[case.prompt], edits=[*(always[case.prompt] if always else ()), *case.edits])
                        .logits[-1] for case in cases])


def same(model, prompts, cases, always=None, **options) -> None:
    got, want = engine_logits(model, prompts, cases, always, **options), naive_logits(model, prompts, cases, always)
    worst = (got - want).abs().amax(1)
    assert worst.isfinite().all()
    assert worst.max() < SWEEP_F32, [cases[case].edits for case in worst.topk(3).indices]


def count_experts(model, monkeypatch: pytest.MonkeyPatch, tell) -> None:
    """Call ``tell(x, layer)`` whenever a layer of experts works."""
    whole = type(model.transformer).experts
    monkeypatch.setattr(type(model.transformer), "experts", lambda self, x, layer, tap: (
        tell(x, layer), whole(self, x, layer, tap))[1])


def test_every_site_equals_the_loop(tiny, other) -> None:
    edits = []
    for site in (*RESIDUALS, *TOKENWISE):
        layers = range(4) if wb.SITES[site].per_layer else [None]
        edits += [wb.patch(site, other, layer=layer, tokens=token) for layer in layers for token in (0, 5, -1)]
    same(tiny, PROMPTS, [Case(0, (edit,)) for edit in edits] + [Case(2, (edit,)) for edit in edits[::5]])


def test_heads_experts_routes_and_attention_equal_the_loop(tiny, other) -> None:
    edits = []
    for layer in range(4):
        edits += [wb.patch("attn.z", other, layer=layer, tokens=4, head=head) for head in (0, 7)]
        edits += [wb.patch("attn.v", other, layer=layer, kv_head=1), wb.zero("attn.z", layer=layer, head=[2, 3]),
                  wb.ban_experts(layer=layer, experts=[1, 3], tokens=4), wb.route_around(layer=layer, experts=0),
                  wb.force_experts(layer=layer, experts=[6], tokens=slice(2, 6)),
                  wb.silence_experts(layer=layer, experts=range(8), tokens=7),
                  wb.scale("expert.out", 0.5, layer=layer, expert=range(4)), wb.replay_routes(other, layer=layer),
                  wb.cut_attention(layer=layer, query=8, key=3), wb.scale_sink(0.0, layer=layer),
                  wb.pin_attention(torch.rand(8, 1, 10), layer=layer, query=8),
                  wb.noise("resid_mid", 1.0, seed=3, layer=layer), wb.router_temperature(2.0, layer=layer),
                  wb.apply("resid_post", lambda x: x.flip(0), layer=layer, tokens=[1, 4, 8]),
                  wb.patch("resid_pre", layer=layer, tokens=7, source=2)]
    same(tiny, PROMPTS, [Case(prompt, (edit,)) for prompt in (1, 2) for edit in edits])


EDITS = st.one_of(
    st.builds(lambda site, layer, token: wb.scale(site, -0.5, layer=layer, tokens=token),
              st.sampled_from([*RESIDUALS[1:], "attn.out", "attn.k", "mlp.out", "router.logits"]), st.integers(0, 3),
              st.integers(-9, 8)),
    st.builds(lambda layer, head, token: wb.zero("attn.z", layer=layer, head=head, tokens=token), st.integers(0, 3),
              st.integers(0, 7), st.sampled_from([None, slice(2, 5), 0, [1, 7]])),
    st.builds(lambda layer, experts: wb.ban_experts(layer=layer, experts=sorted(experts)), st.integers(0, 3),
              st.sets(st.integers(0, 3), min_size=1)),
    st.builds(lambda layer: wb.scale("resid_post", 1.1, layer=layer), st.sampled_from([None, [0, 2], 3])),
    st.builds(lambda token: wb.add("embed", 0.5, tokens=token), st.sampled_from([None, 3, -1])),
)


@settings(max_examples=12)
@given(lists=st.lists(st.lists(EDITS, min_size=1, max_size=3), min_size=1, max_size=6),
       prompts=st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=3),
       memory=st.sampled_from([1, 1 << 21, 1 << 30]))
def test_lists_of_edits_on_batches_equal_the_loop(tiny, lists, prompts, memory) -> None:
    cases = [Case(number, tuple(edits)) for number in range(len(prompts)) for edits in lists]
    same(tiny, prompts, cases, memory=memory)


@settings(max_examples=8)
@given(lists=st.lists(st.lists(EDITS, min_size=1, max_size=2), min_size=1, max_size=4),
       base=st.lists(EDITS, min_size=1, max_size=3))
def test_edits_of_the_starting_runs_equal_the_loop(tiny, lists, base) -> None:
    always = [base, [wb.noise("embed", 2.0, seed=1, tokens=[2, 3])]]
    cases = [Case(number, tuple(edits)) for number in range(2) for edits in lists]
    same(tiny, PROMPTS[1:], cases, always)


def test_an_edit_that_undoes_the_starting_runs_edit(tiny) -> None:
    clean = tiny.run(PROMPTS[0], capture=["resid_pre", "resid_post"])
    always = [[wb.zero("resid_pre", layer=1, tokens=5)]]
    same(tiny, PROMPTS[:1], [Case(0, (wb.patch("resid_pre", clean, layer=1, tokens=5),)),
                             Case(0, (wb.patch("resid_post", clean, layer=0, tokens=5),))], always)


def test_long_prompts_take_attention_in_blocks(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from gptoss_workbench.experiments.sweeps import wave
    monkeypatch.setattr(wave, "SCORES_AT_ONCE", 500)
    monkeypatch.setattr(wave, "SCORES_TOGETHER", 500)
    same(tiny, PROMPTS[:1], [Case(0, (wb.cut_attention(layer=2, query=[3, 20], key=3),)),
                             Case(0, (wb.scale_sink(0.5, layer=1),)),
                             Case(0, (wb.zero("resid_pre", layer=0, tokens=2),))])


def test_only_what_can_have_changed_is_computed(tiny) -> None:
    """Counted by hand for one patch: window 8, bands sliding, full, sliding, full."""
    def rows(edit):
        found = touches([edit], Prompts([PROMPTS[0]], None, False), tiny.config)
        return cones([found], [[]], [0], 24, tiny.config).rows[:, 0].tolist()

    assert rows(wb.zero("resid_pre", layer=1, tokens=5)) == [0, 0, 19, 19, 19, 19, 19, 1, 1]
    assert rows(wb.zero("resid_post", layer=2, tokens=5)) == [0] * 6 + [2, 1, 1]  # its key, and the last query
    assert rows(wb.zero("resid_mid", layer=0, tokens=5)) == [0, 1, 19, 19, 19, 19, 19, 1, 1]
    assert rows(wb.zero("resid_pre", layer=0, tokens=5))[:2] == [8, 8]  # the window of a sliding layer
    assert rows(wb.zero("attn.z", layer=1, tokens=5))[2:5] == [1, 1, 8]
    assert rows(wb.zero("resid_post", layer=3, tokens=5)) == [0] * 8 + [1]  # it must act, though nobody sees it
    assert halves(tiny.config) == 9


def test_the_plan_says_what_is_computed(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    edits = [wb.scale("resid_pre", 2.0, layer=layer, tokens=token) for layer in range(4) for token in range(24)]
    seen, count = [], [0]
    count_experts(tiny, monkeypatch, lambda x, layer: count.__setitem__(0, count[0] + x.shape[0] * x.shape[1]))
    engine = Engine(tiny, PROMPTS[:1], [Case(0, (edit,)) for edit in edits])
    list(engine.stream())
    expert_rows = sum(int(group.cones.rows[1:8:2].sum()) for group in engine._groups)
    assert count[0] == expert_rows + 4 * 24
    wb.sweep(tiny, PROMPTS[0], edits, METRIC, on_plan=seen.append, should_stop=lambda: True)
    assert seen[0] == replace(engine.plan.beside([24]), free=seen[0].free)  # and what the metric is without the edits
    assert seen[0].token_layers < 0.5 * seen[0].naive == 0.5 * 96 * 24 * 4 and "token-layers" in str(seen[0])


def test_less_memory_makes_more_waves(tiny) -> None:
    cases = [Case(0, (wb.scale("resid_pre", 2.0, layer=layer, tokens=token),))
             for layer in (0, 1) for token in range(9)]
    plans = [Engine(tiny, PROMPTS[:1], cases, memory=memory).plan for memory in (1 << 20, 1 << 22, 1 << 30)]
    assert plans[0].waves > plans[1].waves > plans[2].waves == 1
    assert plans[0].nbytes < plans[1].nbytes < plans[2].nbytes and plans[0].token_layers == plans[2].token_layers


def test_results_are_labelled_and_carry_their_origin(tiny) -> None:
    edits = [wb.zero("mlp.out", layer=1, tokens=2), [wb.zero("attn.out", layer=0), wb.zero("mlp.out", layer=0)]]
    found = wb.sweep(tiny, PROMPTS, edits, [METRIC, wb.probability(7)])
    assert found.dims == ("metric", "prompt", "edit") and found.shape == (2, 3, 2)
    assert found["what"].values[1] == f"{edits[1][0]!r}, {edits[1][1]!r}"
    one = wb.sweep(tiny, PROMPTS[1], edits, METRIC)
    assert one.dims == ("edit",)
    np.testing.assert_allclose(one, found.isel(metric=0, prompt=1), atol=SWEEP_F32)
    assert found.attrs["base"][0][1] == pytest.approx(one.attrs["base"]) == \
        pytest.approx(float(METRIC.of(tiny, tiny.run(PROMPTS[1]).logits[-1:])))
    assert '"sweep"' in one.attrs["provenance"]


def test_it_stops_and_goes_on(tiny) -> None:
    edits = [wb.scale("resid_pre", 2.0, layer=layer, tokens=token) for layer in range(4) for token in range(9)]
    seen: list[tuple[int, int]] = []
    options = {"memory": 1 << 20, "on_progress": lambda done, total: seen.append((done, total))}
    part = wb.sweep(tiny, PROMPTS[2], edits, METRIC, should_stop=lambda: len(seen) >= 2, **options)
    done = int(np.isfinite(part).sum())
    assert 0 < done < 36 and seen[-1] == (done, 36)
    plans = []
    whole = wb.sweep(tiny, PROMPTS[2], edits, METRIC, resume=part, on_plan=plans.append, **options)
    assert plans[0].cases == 36 - done and seen[-1] == (36, 36)
    kept = np.isfinite(part.values)
    np.testing.assert_array_equal(whole.values[kept], part.values[kept])
    np.testing.assert_allclose(whole, wb.sweep(tiny, PROMPTS[2], edits, METRIC), atol=SWEEP_F32)
    with pytest.raises(ExperimentError, match="asked something else"):
        wb.sweep(tiny, PROMPTS[1], edits, METRIC, resume=part)


def test_mistakes_are_those_of_a_run(tiny, other) -> None:
    served = {*tiny.run(PROMPTS[0], capture="router").tensor("router.experts", 1)[4].tolist()}
    absent = sorted({*range(8)} - served)
    for edit, error in [(wb.silence_experts(layer=1, experts=absent, tokens=4), EditNeverFired),
                        (wb.zero("resid_pre", layer=1, tokens=wb.where(channel="final")), EditNeverFired),
                        (wb.zero("resid_pre", layer=9), SiteError),
                        (wb.zero("resid_pre", layer=0, tokens=40), SiteError),
                        (wb.ban_experts(layer=0, experts=range(5)), EditError)]:
        with pytest.raises(error) as one:
            tiny.run(PROMPTS[0], edits=[edit])
        with pytest.raises(error) as many:
            wb.sweep(tiny, PROMPTS[0], [wb.zero("resid_pre", layer=0, tokens=1), edit], METRIC)
        assert str(one.value).splitlines()[0] == str(many.value).splitlines()[0]
    with pytest.raises(EditError, match="needs edits"):
        wb.sweep(tiny, PROMPTS[0], [], METRIC)


def test_a_patch_that_changes_no_bit_is_not_run(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny.run(PROMPTS[0], capture="resid_post")
    edits = [wb.patch("resid_post", run, layer=layer, tokens=token) for layer in range(4) for token in range(24)]
    layers: list[int] = []
    count_experts(tiny, monkeypatch, lambda x, layer: layers.append(layer))
    found = engine_logits(tiny, PROMPTS[:1], [Case(0, (edit,)) for edit in edits])
    assert layers == [0, 1, 2, 3]  # the prompt's own run alone
    assert (found == found[0]).all()


def test_the_line_of_progress(capsys) -> None:
    line = wb.ProgressLine()
    line(1, 4)
    line(4, 4)
    said = capsys.readouterr().err
    assert "1 of 4 runs" in said and "s left" in said and "memory" in said and said.endswith("\n")
