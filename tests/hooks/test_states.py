"""Whatever happens, in whatever order, a model stays as it was loaded: nothing is installed, nothing is left behind.

A state machine loads models, runs and generates under random edits, interrupts at a random line of the library's code,
lets functions of the user fail, stops, goes on, and lets models go. ``make test-long`` runs it 500 times with 30 steps.
"""

from __future__ import annotations

import gc
import linecache
import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import gptoss_workbench as wb
from gptoss_workbench.errors import WorkbenchError
from gptoss_workbench.hooks.sites import POOLED, SITES
from tests.factories import tiny_model, write_hf
from tests.hooks.strategies import N, edits, for_prompt
from tests.tolerances import SITE_F32

LONG = os.environ.get("GPTOSS_TEST_LONG") == "1"
IDS = torch.randint(512, (N,), generator=torch.Generator().manual_seed(4)).tolist()
ALL = [*SITES, *POOLED]
FOLDER: Any = None  # made once by the test below


@contextmanager
def interrupted_after(lines: int) -> Iterator[None]:
    """KeyboardInterrupt when so many lines of the library have run: what Ctrl-C does, at a place that can be chosen.

    Never at a ``with``: its line comes by once more between the end of the block and the release of what it holds,
    where Python lets no signal in, but a tracing function.
    """
    left = lines

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal left
        code = frame.f_code
        if "/gptoss_workbench/" not in code.co_filename and "/gptoss_kernels/" not in code.co_filename:
            return None
        if event == "line":
            left -= 1
            if left <= 0 and not linecache.getline(code.co_filename, frame.f_lineno).lstrip().startswith("with "):
                left = sys.maxsize
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """Every tensor of a model by name, packed ones in their parts."""
    found = {}
    for name, tensor in model.weights.tensors():
        parts = {name: tensor} if isinstance(tensor, torch.Tensor) else {
            f"{name}.blocks": tensor.blocks, f"{name}.scales": tensor.scales}
        found |= parts
    return found


class Session(RuleBasedStateMachine):
    """What a person does in a notebook, with accidents."""

    def __init__(self) -> None:
        super().__init__()
        self.models: dict[int, Any] = {}
        self.first: dict[int, tuple[dict[str, torch.Tensor], torch.Tensor, list[str]]] = {}
        self.generations: dict[int, tuple[int, list[Any], list[Any]]] = {}  # model, generations of a batch, edits
        self.made = 0

    def teardown(self) -> None:
        self.models.clear()
        self.generations.clear()

    @initialize()
    def load_one(self) -> None:
        self.load("float32")

    @precondition(lambda self: len(self.models) < 2)
    @rule(dtype=st.sampled_from(["float32", "bfloat16"]))
    def load(self, dtype: str) -> None:
        model = wb.load(FOLDER, dtype=dtype)
        copies = {name: tensor.clone() for name, tensor in weights_of(model).items()}
        self.made += 1
        self.models[self.made] = model
        self.first[self.made] = copies, model.run(IDS).hidden, sorted(vars(model))

    def pick(self, data: st.DataObject) -> tuple[int, Any]:
        number = data.draw(st.sampled_from(sorted(self.models)))
        return number, self.models[number]

    def some(self, data: st.DataObject, prompts: int = 1) -> list[Any]:
        drawn = data.draw(st.lists(edits(), max_size=3))
        return drawn if prompts == 1 else [for_prompt(edit, data.draw(st.integers(0, prompts - 1))) for edit in drawn]

    @rule(data=st.data(), chunk=st.none() | st.integers(1, N), capture=st.none() | st.lists(st.sampled_from(ALL)))
    def run(self, data: st.DataObject, chunk: int | None, capture: list[str] | None) -> None:
        _, model = self.pick(data)
        some = self.some(data)
        try:
            run = model.run(IDS, capture=capture, edits=some, chunk=chunk)
        except WorkbenchError:
            return
        assert {*run.data.data_vars} == {*(capture or ())}

    @rule(data=st.data(), lines=st.integers(1, 4000))
    def interrupt_a_run(self, data: st.DataObject, lines: int) -> None:
        _, model = self.pick(data)
        some = self.some(data)
        try:
            with interrupted_after(lines):
                model.run(IDS, capture=ALL, edits=some)
        except (KeyboardInterrupt, WorkbenchError):
            pass

    @rule(data=st.data(), site=st.sampled_from(sorted(SITES)),
          error=st.sampled_from([ValueError, KeyboardInterrupt, SystemExit]))
    def fail_in_a_function(self, data: st.DataObject, site: str, error: type[BaseException]) -> None:
        _, model = self.pick(data)

        def fail(x: torch.Tensor) -> torch.Tensor:
            x.zero_()  # what it is given is its own
            raise error

        try:
            model.run([IDS, IDS[:5]], capture=[site], edits=[*self.some(data, 2), wb.apply(site, fail)])
        except (error, WorkbenchError):
            return
        raise AssertionError("the function was not called")

    @precondition(lambda self: len(self.generations) < 3)
    @rule(data=st.data(), batch=st.booleans(), capture=st.lists(st.sampled_from(ALL), min_size=1, max_size=4))
    def begin_to_generate(self, data: st.DataObject, batch: bool, capture: list[str]) -> None:
        number, model = self.pick(data)
        prompts = [IDS, IDS[:5]] if batch else [IDS]
        some = self.some(data, len(prompts))
        try:
            gens = model.generate(prompts, capture=capture, edits=some, max_tokens=8, stop=[])
        except WorkbenchError:
            return
        self.made += 1
        self.generations[self.made] = number, gens, some

    def one_generation(self, data: st.DataObject) -> tuple[int, Any]:
        number = data.draw(st.sampled_from(sorted(self.generations)))
        return number, data.draw(st.sampled_from(self.generations[number][1]))

    @precondition(lambda self: self.generations)
    @rule(data=st.data(), steps=st.integers(1, 4), lines=st.none() | st.integers(1, 6000), stop=st.booleans())
    def go_on(self, data: st.DataObject, steps: int, lines: int | None, stop: bool) -> None:
        """Some more steps, maybe with an interrupt on the way, maybe with a stop at the end."""
        number, gen = self.one_generation(data)
        begun = len(gen.steps)
        try:
            with interrupted_after(lines or sys.maxsize):
                for step in gen:
                    if step.index >= begun + steps:
                        break
        except KeyboardInterrupt:
            pass
        except WorkbenchError:
            del self.generations[number]  # an edit that can't act here; the model must not mind
            return
        if stop:
            gen.stop()
            gen.finish()
            assert gen.reason is not None

    @precondition(lambda self: self.generations)
    @rule(data=st.data())
    def look_at_a_generation(self, data: st.DataObject) -> None:
        """All that was captured belongs together, and the tokens are those of a generation without accidents."""
        number, gen = self.one_generation(data)
        owner, gens, some = self.generations[number]
        try:
            run = gen.run()  # one that was not begun runs to its end
        except WorkbenchError:
            del self.generations[number]
            return
        steps = [step.token for step in gen.steps]
        whole = len(gen.prompt) + len(steps)
        assert len(run.hidden) == len(run.positions)
        assert len(run.hidden) in ((whole - 1, whole) if steps else (0, whole))  # each step is read whole or not at all
        data_of = run.data
        assert all(sizes == len(run.positions) for dim, sizes in data_of.sizes.items() if dim in ("token", "query"))
        try:
            again = self.models[owner].generate([g.prompt for g in gens], edits=some, max_tokens=8, stop=[])
            for other in again:
                other.finish()
        except WorkbenchError:
            return
        same = again[gens.index(gen)]
        assert [step.token for step in same.steps][:len(steps)] == steps
        if len(run.hidden):
            torch.testing.assert_close(run.hidden, same.run().hidden[:len(run.hidden)], rtol=0, atol=SITE_F32,
                                       equal_nan=True)

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        """A model that nobody holds is freed at once: no run, generation or table of the library keeps it."""
        number, model = self.pick(data)
        if len(self.models) == 1:
            return
        self.generations = {n: kept for n, kept in self.generations.items() if kept[0] != number}
        watch = weakref.ref(model)
        del self.models[number], self.first[number], model
        gc.collect()
        assert watch() is None

    @invariant()
    def every_model_is_as_it_was_loaded(self) -> None:
        for number, model in self.models.items():
            copies, hidden, names = self.first[number]
            assert sorted(vars(model)) == names
            for name, tensor in weights_of(model).items():
                assert torch.equal(tensor, copies[name]), name
            assert torch.equal(model.run(IDS).hidden, hidden)


def test_a_session_with_accidents(tmp_path_factory) -> None:
    global FOLDER
    FOLDER = write_hf(tmp_path_factory.mktemp("states"), tiny_model(seed=6))
    warm = wb.load(FOLDER, dtype="float32")  # the library imports parts of itself on first use
    warm.generate(IDS, capture=ALL, max_tokens=2, stop=[]).finish().data.load()
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(Session, settings=settings(
        max_examples=500 if LONG else 6, stateful_step_count=30 if LONG else 12, deadline=None, derandomize=not LONG,
        suppress_health_check=list(HealthCheck), database=None,
    ))
