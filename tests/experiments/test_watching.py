"""Every experiment of many passes says its cost before it runs, shows how far it is, stops, and goes on bit for bit.

The second source of a cost is a count of what the transformer was really given: rows of prompts, and rows of tokens in
each half of a layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import gptoss_workbench as wb
from gptoss_workbench.errors import ExperimentError
from gptoss_workbench.experiments.sweeps.wave import Wave
from gptoss_workbench.experiments.watch import Cost
from gptoss_workbench.model.transformer import Transformer, no_tap
from gptoss_workbench.store.saved import save
from tests.factories import tiny_model, write_hf

ONE, TWO = [5, 17, 300, 8, 90, 91], [5, 18, 301, 8, 90, 77]
OTHER = [5, 18, 301, 9, 91, 77]  # no token of it is that of ONE but the first, so every patch changes something
PROMPTS = [ONE, TWO, [9, *ONE[1:]], [9, *TWO[1:]], [11, *ONE[1:]], [11, *TWO[1:]]]
METRIC = wb.logit_diff(7, 450)
SMALL = 1 << 20  # of memory, so that a sweep has several waves

# What reads runs that there are already, or is a single call of the model: nothing to follow, stop or go on with.
OF_RUNS = {
    "summarize", "logit_lens", "next_tokens", "lens_grid", "decided_at", "routing_stats", "expert_coactivation",
    "expert_profile", "compare_runs", "expert_usage", "token_quantity", "head_contributions", "expert_contributions",
    "decompose_residual", "direct_logit_attribution", "gradients", "checked",
}
# What gives metrics rather than results.
NO_EXPERIMENT = {"logit_diff", "probability", "rank", "kl_divergence"}


@dataclass
class Case:
    """An experiment, what it is asked, and another question.

    Attributes:
        ask: (model, options) -> result.
        other: the same for a question whose result must be refused.
        name: of the experiment in ``wb``.
        after: how often it may ask whether to stop before it shall.
        runs: whether the model is run.
    """

    name: str
    ask: Callable[..., Any]
    other: Callable[..., Any]
    after: int = 2
    runs: bool = True


def tried(layers: int) -> list[Any]:
    return [wb.scale("resid_pre", 2.0, layer=layer, tokens=token) for token in range(6) for layer in range(layers)]


def direction() -> xr.DataArray:
    return xr.DataArray(np.linspace(-1, 1, 64, dtype=np.float32), dims="d_model", coords={"layer": 1},
                        attrs={"site": "resid_post"})


def first_token(gen: Any) -> float:
    return gen.tokens[0]


def probed(model: wb.Model, seed: int = 0, **how: Any) -> xr.Dataset:
    pytest.importorskip("sklearn")
    draw = np.random.default_rng(3)
    runs = model.run(draw.integers(0, 300, size=(24, 5)).tolist(), capture=wb.capture("resid_post", layers=[0, 3]))
    return wb.probe(list(runs), [number % 2 == 0 for number in range(24)], folds=3, seed=seed, **how)


CASES = [
    Case("patching", lambda m, **how: wb.patching(m, ONE, OTHER, metric=METRIC, memory=SMALL, **how),
         lambda m, **how: wb.patching(m, ONE, TWO, "mlp.out", metric=METRIC, **how), 14),
    Case("patching", lambda m, **how: wb.patching(m, [ONE, PROMPTS[2]], [TWO, PROMPTS[3]], "expert.out", metric=[
        METRIC, wb.kl_divergence()], by=("layer", "token"), direction="noise", memory=SMALL, **how),
         lambda m, **how: wb.patching(m, ONE, TWO, metric=METRIC, **how), 14),
    Case("sweep", lambda m, **how: wb.sweep(m, PROMPTS[:2], tried(4), METRIC, memory=SMALL, **how),
         lambda m, **how: wb.sweep(m, PROMPTS[:2], tried(3), METRIC, **how), 14),
    Case("causal_tracing", lambda m, **how: wb.causal_tracing(m, ONE, [1, 2], metric=METRIC, seeds=2, memory=SMALL,
                                                              **how),
         lambda m, **how: wb.causal_tracing(m, ONE, [1], metric=METRIC, seeds=2, **how), 14),
    Case("path_patching", lambda m, **how: wb.path_patching(
        m, ONE, OTHER, ["embed", ("head", 0, 1), ("mlp", 1)], ["logits", ("q", 2, 3), ("router", 3)], metric=METRIC,
        memory=SMALL >> 3, **how),
         lambda m, **how: wb.path_patching(m, ONE, TWO, ["embed"], ["logits"], metric=METRIC, **how), 12),
    Case("attribution", lambda m, **how: wb.attribution(m, ONE, TWO, metric=METRIC, method="integrated", steps=2, top=4,
                                                        others=3, **how),
         lambda m, **how: wb.attribution(m, ONE, TWO, metric=METRIC, top=4, others=3, **how), 3),
    Case("attribution", lambda m, **how: wb.attribution(m, [ONE, PROMPTS[2]], [TWO, PROMPTS[3]], metric=METRIC, top=3,
                                                        others=2, **how),
         lambda m, **how: wb.attribution(m, ONE, TWO, metric=METRIC, top=4, others=3, **how), 3),
    Case("expert_importance", lambda m, **how: wb.expert_importance(m, PROMPTS[:3], METRIC, tokens=-1, **how),
         lambda m, **how: wb.expert_importance(m, PROMPTS[:3], METRIC, "route_around", tokens=-1, **how)),
    Case("tuned_lens", lambda m, **how: wb.tuned_lens(m, PROMPTS, steps=4, batch=2, positions=8, **how),
         lambda m, **how: wb.tuned_lens(m, PROMPTS[1:], steps=4, batch=2, positions=8, **how)),
    Case("tuned_lens_kl", lambda m, **how: wb.tuned_lens_kl(m, PROMPTS, untrained(m), **how),
         lambda m, **how: wb.tuned_lens_kl(m, PROMPTS[1:], untrained(m), **how)),
    *(Case("contrast", lambda m, method=method, **how: wb.contrast(m, PROMPTS[::2], PROMPTS[1::2], tokens=[1, -1],
                                                                   method=method, **how),
           lambda m, **how: wb.contrast(m, PROMPTS[::2], PROMPTS[1::2], **how))
      for method in ("mean", "pca", "probe")),
    Case("refusal_direction", lambda m, **how: wb.refusal_direction(m, ["a b", "c d"], ["e f", "g h"], **how),
         lambda m, **how: wb.refusal_direction(m, ["a b", "c d"], ["e f", "g h"], effort="low", **how)),
    Case("effort_direction", lambda m, **how: wb.effort_direction(m, ["a b", "c d"], **how),
         lambda m, **how: wb.effort_direction(m, ["a b", "c d"], low="medium", **how)),
    Case("dose_response", lambda m, **how: wb.dose_response(m, direction(), [1, 2], PROMPTS, METRIC, controls=1, **how),
         lambda m, **how: wb.dose_response(m, direction() * 2, [1, 2], PROMPTS, METRIC, controls=1, **how), 5),
    Case("dose_response", lambda m, **how: wb.dose_response(m, lambda s: wb.scale_sink(s), [1], PROMPTS, first_token,
                                                            max_tokens=1, **how),
         lambda m, **how: wb.dose_response(m, lambda s: wb.scale_sink(s), [1], PROMPTS, METRIC, **how), 3),
    Case("probe", probed, lambda m, **how: probed(m, seed=1, **how), 13, runs=False),
]
NAMES = [f"{case.name} {number}" for number, case in enumerate(CASES)]


def untrained(model: wb.Model) -> wb.TunedLens:
    return wb.tuned_lens(model, PROMPTS, steps=1, should_stop=lambda: True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> wb.Model:
    return wb.load(write_hf(tmp_path_factory.mktemp("tiny") / "full", tiny_model(seed=45)), dtype="float32")


@pytest.fixture(scope="module")
def worded(tmp_path_factory: pytest.TempPathFactory) -> wb.Model:
    """With the whole vocabulary, for experiments that write prompts themselves."""
    values = tiny_model(seed=46, vocab_size=201_088, num_hidden_layers=2, hidden_size=32, intermediate_size=32)
    return wb.load(write_hf(tmp_path_factory.mktemp("worded") / "full", values), dtype="float32")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that every experiment has several."""
    experiments = "gptoss_workbench.experiments"
    for name in ("reading", "importance"):
        monkeypatch.setattr(f"{experiments}.{name}.TOKENS_PER_BATCH", 16)
    for name in ("TOKENS_FORWARD", "TOKENS_BACKWARD"):
        monkeypatch.setattr(f"{experiments}.attributing.{name}", 18)
    monkeypatch.setattr(f"{experiments}.sweeps.engine.ROWS_TOGETHER", 64)


@dataclass
class Spent:
    """What the transformer was given: passes, and token-halves of layers."""

    passes: int = 0
    halves: list[int] = field(default_factory=list)


@pytest.fixture
def spent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spent]:
    found = Spent()
    read, project, experts, begin = Transformer.__call__, Transformer.project, Transformer.experts, Wave.__init__

    def counted_read(self: Transformer, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        found.passes += len(ids)
        return read(self, ids, *rest)

    def counted_project(self: Transformer, x: torch.Tensor, *rest: Any) -> Any:
        if no_tap not in rest:  # path patching makes an edit's value so, which is no half of a layer
            found.halves.append(x.shape[0] * x.shape[1])
        return project(self, x, *rest)

    def counted_experts(self: Transformer, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        found.halves.append(x.shape[0] * x.shape[1])
        return experts(self, x, *rest)

    def counted_begin(self: Wave, model: Any, base: Any, prompt: Any, *rest: Any) -> None:
        found.passes += len(prompt)
        begin(self, model, base, prompt, *rest)

    monkeypatch.setattr(Transformer, "__call__", counted_read)
    monkeypatch.setattr(Transformer, "project", counted_project)
    monkeypatch.setattr(Transformer, "experts", counted_experts)
    monkeypatch.setattr(Wave, "__init__", counted_begin)
    yield found


def of(case: Case, request: pytest.FixtureRequest) -> wb.Model:
    return request.getfixturevalue("worded" if "_direction" in case.name else "tiny")


def numbers(result: Any) -> dict[str, np.ndarray]:
    """All that was computed."""
    if isinstance(result, wb.TunedLens):
        state = dict(enumerate((result.weight, result.bias, *result.state)))
        return {"history": result.history.values, **{str(name): tensor.numpy() for name, tensor in state.items()}}
    made = result if isinstance(result, xr.Dataset) else result.to_dataset(name="values")
    return {str(name): one.values for name, one in {**made.data_vars, **made.coords}.items()}


def attrs(result: Any) -> dict[str, Any]:
    return result.history.attrs if isinstance(result, wb.TunedLens) else result.attrs


@pytest.mark.parametrize("case", CASES, ids=NAMES)
@pytest.mark.parametrize("at_once", [False, True], ids=["in the middle", "at once"])
def test_stopped_and_resumed_is_as_if_never_stopped(
    case: Case, at_once: bool, request: pytest.FixtureRequest,
) -> None:
    model, asked, after = of(case, request), [], 0 if at_once else case.after

    def stop() -> bool:
        asked.append(1)
        return len(asked) > after

    whole, part = case.ask(model), case.ask(model, should_stop=stop)
    assert len(asked) == after + 1, "it was never stopped" if len(asked) <= after else "it went on"
    assert attrs(whole)["complete"] and "missing" not in attrs(whole)
    assert not attrs(part)["complete"] and int(attrs(part)["missing"].split()[0].replace(",", "")) > 0
    seen: list[tuple[int, int]] = []
    done = case.ask(model, resume=part, on_progress=lambda *at: seen.append(at))
    assert seen[0][0] > 0 and seen[-1][0] == seen[-1][1]
    assert attrs(done)["complete"] and "missing" not in attrs(done) and "vectors" not in attrs(done)
    want = numbers(whole)
    for name, values in numbers(done).items():
        np.testing.assert_array_equal(values, want[name], err_msg=name)
    unlike = [name for name, values in numbers(part).items() if not np.array_equal(values, want[name], equal_nan=(
        values.dtype.kind == "f"))]
    assert unlike, "a stopped result lacks something"
    with pytest.raises(ExperimentError, match=r"asked something else|trained otherwise") as caught:
        case.other(model, resume=part)
    assert len(str(caught.value).splitlines()) <= 6


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_the_cost_is_said_first_and_is_what_is_spent(
    case: Case, request: pytest.FixtureRequest, spent: Spent,
) -> None:
    model, plans, seen = of(case, request), [], []
    if case.name == "tuned_lens_kl":
        untrained(model)
    before: list[Any] = []

    def told(plan: Cost) -> None:
        plans.append(plan)
        before.append((spent.passes, len(spent.halves)))
        assert len(str(plan).splitlines()) == 1

    result = case.ask(model, on_plan=told, on_progress=lambda *at: seen.append(at))
    (plan,) = plans
    assert isinstance(plan, Cost) and seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted({done for done, _ in seen}) and len({total for _, total in seen}) == 1
    if not case.runs:
        assert (plan.passes, plan.tokens) == (0, 0) and seen[-1] == (plan.fits, plan.fits) == (len(seen), len(seen))
        return
    assert before == [(0, 0)]
    layers = model.config.num_hidden_layers
    assert plan.passes == spent.passes
    assert plan.tokens == -(-sum(spent.halves) // (2 * layers))
    plans.clear()
    case.ask(model, resume=result, on_plan=plans.append)
    assert plans[0].passes < plan.passes, "what is known is not computed again"


@pytest.mark.filterwarnings("ignore")  # of zarr, about dtypes that are new
@pytest.mark.parametrize("case", [case for case in CASES if case.name in ("contrast", "causal_tracing")][:2],
                         ids=lambda case: case.name)
def test_a_stopped_result_goes_on_another_day(case: Case, tiny: wb.Model, tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    asked = iter(range(1000))
    part = case.ask(tiny, should_stop=lambda: next(asked) >= case.after)
    save(part.to_dataset(name="values").assign_attrs(part.attrs), tmp_path / "part")
    kept = wb.open_data(tmp_path / "part")
    done, whole = case.ask(tiny, resume=kept["values"].assign_attrs(kept.attrs)), case.ask(tiny)
    for name, values in numbers(done).items():
        np.testing.assert_array_equal(values, numbers(whole)[name], err_msg=name)


def test_no_experiment_is_left_out() -> None:
    """Whoever adds one says here which kind it is of."""
    from gptoss_workbench import _WHERE

    experiments = {name for name, where in _WHERE.items() if where.startswith("experiments.")
                   and inspect.isfunction(getattr(wb, name))}
    watched = {case.name for case in CASES}
    assert experiments == watched | OF_RUNS | NO_EXPERIMENT and not watched & (OF_RUNS | NO_EXPERIMENT)
    for name in watched - {"refusal_direction", "effort_direction"}:  # these pass on what contrast takes
        assert {"on_plan", "on_progress", "should_stop", "resume"} <= {*inspect.signature(getattr(wb, name)).parameters}


def test_a_bound_holds_where_the_routes_decide(tiny: wb.Model, spent: Spent) -> None:
    plans: list[Any] = []
    wb.expert_importance(tiny, PROMPTS[:2], METRIC, layers=[1, 2], on_plan=plans.append)
    assert plans[0].at_most and spent.passes <= plans[0].passes <= 2 * (1 + 2 * 8) and "at most" in str(plans[0])
    receivers = [("expert", 3, expert) for expert in range(8)]
    spent.passes = 0
    wb.path_patching(tiny, ONE, TWO, ["embed"], receivers, metric=METRIC, on_plan=plans.append)
    assert plans[1].at_most and spent.passes <= plans[1].passes
