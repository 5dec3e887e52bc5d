"""Passes that are noted down and played again: the same bits as calls, on any number of threads, or an error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gptoss_kernels import cpu
from gptoss_kernels.cpu import matmul, recording, team
from gptoss_kernels.cpu.recording import NotRecordable, Recording
from tests.kernels.cpu_cases import drawn, packed, some

pytest.importorskip("numba")

CPU = torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
WIDTH, HEADS, SIZE = 96, 4, 32


class Step:
    """A layer's worth of kernels, and torch between them, from buffers to buffers."""

    def __init__(self, dtype: torch.dtype, rows: int = 2) -> None:
        self.rows, self.dtype = rows, dtype
        self.x = drawn(rows, 1, WIDTH, dtype=dtype)
        self.position, self.column = torch.full((rows, 1), 3), torch.tensor([3])
        self.keys, self.values = (drawn(rows, 9, 2, SIZE, dtype=dtype, seed=seed) for seed in (7, 8))
        self.columns = torch.arange(9).repeat(rows, 1)
        self.scale, self.sinks = drawn(WIDTH, seed=3) + 1, drawn(HEADS, dtype=dtype)
        self.qkv = [(drawn(heads * SIZE, WIDTH, dtype=dtype, seed=heads + 10), drawn(heads * SIZE, dtype=dtype))
                    for heads in (HEADS, 2, 2)]
        self.out = drawn(WIDTH, HEADS * SIZE, dtype=dtype, seed=4) / 10
        self.router = drawn(8, WIDTH, dtype=dtype, seed=5)
        self.experts = packed(8, 128, WIDTH), drawn(8, 128, dtype=dtype), packed(8, WIDTH, 64), drawn(8, WIDTH,
                                                                                                     dtype=dtype)
        self.frequencies = torch.logspace(0, -2, SIZE // 2)
        self.result = torch.zeros(rows, 1, WIDTH, dtype=dtype)

    def __call__(self) -> None:
        norm = cpu.rms_norm(self.x, self.scale, 1e-5)
        turn = cpu.rope_tables(self.position, self.frequencies, 1.3, self.dtype)  # torch's
        q, k, v = cpu.project_qkv(norm, *self.qkv, *turn)  # type: ignore[call-arg]  # three projections
        cpu.store_kv(self.keys, self.values, k, v, self.column)
        z = cpu.attention(q, self.keys, self.values, self.sinks, self.position, self.columns, 3)
        x, norm = cpu.add_norm(self.x, cpu.linear(z.flatten(2), self.out), self.scale, 1e-5)
        chosen, weights = cpu.route(cpu.linear(norm, self.router), 3)
        mixed = cpu.expert_mixture(norm.flatten(0, 1), chosen.flatten(0, 1), weights.flatten(0, 1), *self.experts,
                                   1.702, 7.0)
        self.result.copy_(torch.where(x > 100, x, x + mixed[:, None]))  # torch's again

    def fill(self, seed: int, column: int) -> None:
        """Another token."""
        self.x.copy_(drawn(self.rows, 1, WIDTH, dtype=self.dtype, seed=seed))
        self.position.fill_(column)
        self.column.fill_(column)


def outcomes(step: Step, go: Callable[[], None]) -> list[Tensor]:
    found = []
    for column in (4, 5, 8):
        step.fill(column, column)
        go()
        found += [step.result.clone(), step.keys.clone(), step.values.clone()]
    return found


@DTYPES
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("openmp", [True, False], ids=["OpenMP", "threads of Python"])
def test_played_is_called(dtype: torch.dtype, threads: int, openmp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """More threads than cores too: a thread that has to wait lets the others work."""
    if not openmp:
        monkeypatch.setattr(team, "parallel", lambda: None)
    step, before = Step(dtype), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        step()  # as recording does
        wanted = outcomes(step, step)
        played = Step(dtype)
        recorded = Recording(played, CPU)
        for got, want in zip(outcomes(played, recorded.play), wanted, strict=True):
            assert torch.equal(got, want)
    finally:
        torch.set_num_threads(before)


def test_tasks_that_follow_one_another_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(torch.bfloat16)
    recorded, calls = Recording(step, CPU), []
    run = team.run
    monkeypatch.setattr(team, "run", lambda *args: (calls.append(args), run(*args)))
    recorded.play()
    together = len(calls)
    step()
    assert together <= 3 and len(calls) - together > 15


def test_a_long_chain_waits_at_every_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each link reads what all threads wrote before it; a wait too short would show in one of 300."""
    matrix = drawn(WIDTH, WIDTH, dtype=torch.bfloat16, seed=4) / WIDTH**0.5
    x = drawn(1, WIDTH, dtype=torch.bfloat16)
    monkeypatch.setattr("gptoss_kernels.cpu.products.ITEM_BYTES", 4 * 2 * WIDTH)  # four rows at a time

    def body() -> None:
        y = x
        for _ in range(300):
            y = cpu.linear(y, matrix)
        ends.append(y)

    ends: list[Tensor] = []
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        body()
        torch.set_num_threads(4)
        recorded = Recording(body, CPU)
        for _ in range(20):
            ends[1].zero_()
            recorded.play()
            assert torch.equal(ends[1], ends[0])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("body", [
    lambda x: x.sum().item(), lambda x: x + torch.tensor(2.0), lambda x: x[x > 0], lambda x: bool((x > 0).all()),
], ids=["item", "a number of Python", "a mask", "a truth"])
def test_what_reads_back_is_refused(body: Callable[[Tensor], object]) -> None:
    x = drawn(4)
    with pytest.raises(NotRecordable):
        Recording(lambda: body(x), CPU)
    assert not recording.active()
    body(x)


@DTYPES
def test_experts_of_many_rows_are_refused(dtype: torch.dtype) -> None:
    many = matmul.many()
    weight, bias = packed(4, 8, 64), drawn(4, 8, dtype=dtype)
    for rows in (many - 1, many):
        x, chosen = drawn(rows, 64, dtype=dtype), some(rows, 2, 4)
        assert (cpu.not_recorded(dtype, rows) is None) == (rows < many)
        if rows < many:
            Recording(lambda x=x, chosen=chosen: cpu.expert_linear(x, chosen, weight, bias), CPU)
            continue
        with pytest.raises(NotRecordable, match=f"{many} tokens"):
            Recording(lambda x=x, chosen=chosen: cpu.expert_linear(x, chosen, weight, bias), CPU)


def test_without_compiled_code_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    with cpu.forced("torch"):
        assert "read back" in (cpu.not_recorded(torch.bfloat16, 1) or "")


@DTYPES
def test_experts_that_do_not_exist_are_left_out(dtype: torch.dtype) -> None:
    """Played, nobody can raise; nothing is read outside the matrices. Called, it is an error."""
    weight, bias, x = packed(4, 8, 64), drawn(4, 8, dtype=dtype), drawn(1, 64, dtype=dtype)
    chosen, out = torch.tensor([[0, 1, 2]]), []
    recorded = Recording(lambda: out.append(cpu.expert_linear(x, chosen, weight, bias)), CPU)
    wanted = out[0].clone()
    chosen.copy_(torch.tensor([[0, 1 << 40, -7]]))
    out[0].zero_()
    recorded.play()
    assert torch.equal(out[0][0, 0], wanted[0, 0]) and not out[0][0, 1:].any()
    with pytest.raises(IndexError, match="from 0 to 3"):
        cpu.expert_linear(x, chosen, weight, bias)
