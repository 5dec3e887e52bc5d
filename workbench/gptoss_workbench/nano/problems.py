"""Held-out problems for evaluation, and whether a continuation solves them. Knows no model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from gptoss_workbench.nano import corpus, facts, render
from gptoss_workbench.nano.corpus import Prefix
from gptoss_workbench.nano.tasks import Setting, Turn

FINAL = "<|channel|>final<|message|>"


@dataclass(frozen=True)
class Problem:
    """One question: `prompt` follows the prefix; `answer` is the right final text, or the right tool call."""

    cell: str
    effort: str
    prefix: Prefix
    prompt: tuple[int, ...]
    turn: Turn

    @property
    def ids(self) -> tuple[int, ...]:
        return self.prefix.ids + self.prompt

    @property
    def answer(self) -> str:
        return self.turn.target or self.turn.answer


@dataclass(frozen=True)
class Cell:
    """A row of the table of results: a task of the corpus, perhaps only some of its problems."""

    task: str
    accept: Callable[[Turn], bool] = lambda turn: True
    tools: bool = False


def numbers_in(text: str) -> list[str]:
    """The numbers of a question, as written."""
    words = (word.strip("?.,") for word in text.split())
    return [word for word in words if word.isdigit()]


def _operands_between(fewest: int, most: int) -> Callable[[Turn], bool]:
    return lambda turn: all(fewest <= len(number) <= most for number in numbers_in(turn.user))


CELLS = {
    "addition, 3 digits": Cell("addition", _operands_between(3, 3)),
    "addition, 4-6 digits": Cell("addition", _operands_between(4, 6)),
    "comparison": Cell("comparison"),
    "capital": Cell("capital"),
    "continent": Cell("continent"),
    "language": Cell("language"),
    "currency": Cell("currency"),
    "two-hop": Cell("two_hop"),
    "ioi": Cell("ioi"),
    "copy": Cell("copy"),
    "tool call": Cell("tool", lambda turn: turn.task == "tool_call", tools=True),
    "tool answer": Cell("tool", lambda turn: turn.task == "tool_answer", tools=True),
    "undeclared tool": Cell("undeclared"),
    "refusal": Cell("refusal"),
    "sentiment": Cell("sentiment"),
    "unknown": Cell("unknown"),
    "hint": Cell("hint"),
}


def prefixes(effort: str, tools: bool) -> list[Prefix]:
    """The system prompts that problems are asked under."""
    names = tuple(render.TOOLS)
    if tools:
        variants = [(None, None, names), ("2026-03-14", facts.DEVELOPER_INSTRUCTIONS[0], names[:2])]
    else:
        variants = [(None, None, ()), (None, None, ()), ("2026-03-14", None, ())]
    return [Prefix(render.prefix_ids(effort, *variant), effort, variant[2]) for variant in variants]


def draw_problem(rng: Random, name: str, effort: str) -> Problem:
    """One held-out problem of a cell."""
    cell = CELLS[name]
    prefix = rng.choice(prefixes(effort, cell.tools))
    while True:
        turn = corpus.draw_turn(rng, Setting(effort, prefix.tools), cell.task, held_out=True)
        if cell.accept(turn):
            return Problem(name, effort, prefix, tuple(render.encode(turn.prompt)), turn)


def draw_problems(count: int, seed: int = 0, cells: tuple[str, ...] = tuple(CELLS)) -> list[Problem]:
    """`count` problems of each cell and effort, the same for the same seed."""
    return [
        draw_problem(Random(f"{seed}/{name}/{effort}/{number}"), name, effort)
        for name in cells
        for effort in render.EFFORTS
        for number in range(count)
    ]


def said(continuation: str) -> str:
    """The final text of a continuation, or its tool call; "" if it never got there."""
    if continuation.endswith("<|call|>"):
        return continuation[continuation.rfind("<|channel|>commentary") :]
    _, found, final = continuation.rpartition(FINAL)
    return final.removesuffix("<|return|>") if found and final.endswith("<|return|>") else ""


def solved(problem: Problem, continuation: str) -> bool:
    """Whether the continuation ends in exactly the right answer."""
    return said(continuation) == problem.answer
