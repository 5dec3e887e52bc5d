"""What the exported file says: greedy answers, sampled completions, tampered reasoning, loss."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import torch
from openai_harmony import HarmonyError, Role
from torch import Tensor

from gptoss_workbench.harmony import load_vocabulary, tokens
from gptoss_workbench.nano import render
from gptoss_workbench.nano.problems import Problem, draw_problem, said, solved

if TYPE_CHECKING:
    from gptoss_workbench.hooks.edits import Edit
    from gptoss_workbench.model.model import Model

BATCH = 400
ENDS = frozenset({tokens.RETURN, tokens.CALL, tokens.ENDOFTEXT})
Choose = Callable[[Tensor], Tensor]


class RowReader:
    """Turns logits over stored rows into ids and probabilities, without making 201,088 columns."""

    def __init__(self, model: Model) -> None:
        rows = model.weights.row_of_token
        count = model.weights.unembed.shape[0]
        row_of_token = torch.arange(count) if rows is None else rows.long()
        self.row_of_token = row_of_token
        sizes = torch.bincount(row_of_token, minlength=count)
        self.log_sizes = sizes.float().log()  # how many ids each row stands for
        self.id_of_row = torch.zeros(count, dtype=torch.int64)
        self.id_of_row[row_of_token] = torch.arange(len(row_of_token))

    def log_probabilities(self, row_logits: Tensor) -> Tensor:
        """(..., row) -> log probability of one id of each row, exact over all 201,088 ids."""
        return row_logits - torch.logsumexp(row_logits + self.log_sizes, -1, keepdim=True)


def likeliest(row_logits: Tensor) -> Tensor:
    return row_logits.argmax(-1)


@torch.no_grad()
def continuations(
    model: Model, prefix: Sequence[int], prompts: Sequence[Sequence[int]], choose: Choose, most: int = 130
) -> list[list[int]]:
    """What the model says after prefix + prompt, for many prompts; the prefix is read once.

    Args:
        choose: (prompt, row) logits -> (prompt,) chosen rows.
        most: tokens after which a continuation is cut.
    """
    reader = RowReader(model)
    cache = model.new_cache(1)
    if prefix:
        model.transformer(torch.tensor([list(prefix)]), torch.arange(len(prefix))[None], cache)
    cache = cache.select(torch.zeros(len(prompts), dtype=torch.int64))
    ids, positions = model.pad_left(prompts)
    positions = torch.where(positions >= 0, positions + len(prefix), positions)
    said_ids: list[list[int]] = [[] for _ in prompts]
    active = torch.arange(len(prompts))
    for _ in range(most):
        hidden = model.transformer(ids, positions, cache)[:, -1]
        chosen = reader.id_of_row[choose(model.transformer.unembed_rows(hidden))]
        for prompt, token in zip(active.tolist(), chosen.tolist(), strict=True):
            said_ids[prompt].append(token)
        going = torch.tensor([token not in ENDS for token in chosen.tolist()])
        if not going.any():
            break
        if not going.all():
            kept = going.nonzero()[:, 0]
            active, chosen, positions, cache = active[kept], chosen[kept], positions[kept], cache.select(kept)
        ids, positions = chosen[:, None], positions[:, -1:] + 1
    return said_ids


def answers(model: Model, problems: Sequence[Problem], choose: Choose = likeliest) -> list[list[int]]:
    """The continuation of every problem, in order; problems of one prefix and like length go together."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, problem in enumerate(problems):
        groups.setdefault(problem.prefix.ids, []).append(number)
    out: list[list[int]] = [[] for _ in problems]
    for prefix, members in groups.items():
        # Answers of like length together, so that a batch shrinks all at once.
        members.sort(key=lambda n: (len(problems[n].turn.completion), len(problems[n].prompt)))
        for start in range(0, len(members), BATCH):
            batch = members[start : start + BATCH]
            found = continuations(model, prefix, [problems[number].prompt for number in batch], choose)
            for number, ids in zip(batch, found, strict=True):
                out[number] = ids
    return out


def accuracies(
    problems: Sequence[Problem], continued: Sequence[Sequence[int]]
) -> dict[str, dict[str, float]]:
    """Share of solved problems by cell and effort."""
    right: dict[str, dict[str, list[bool]]] = {}
    for problem, ids in zip(problems, continued, strict=True):
        hits = right.setdefault(problem.cell, {}).setdefault(problem.effort, [])
        hits.append(solved(problem, render.decode(ids)))
    return {cell: {effort: float(np.mean(hits)) for effort, hits in row.items()}
            for cell, row in right.items()}


def completion_lengths(
    problems: Sequence[Problem], continued: Sequence[Sequence[int]], cell: str
) -> dict[str, float]:
    """Mean tokens of a completion by effort."""
    lengths: dict[str, list[int]] = {}
    for problem, ids in zip(problems, continued, strict=True):
        if problem.cell == cell:
            lengths.setdefault(problem.effort, []).append(len(ids))
    return {effort: float(np.mean(values)) for effort, values in lengths.items()}


def hints_followed(problems: Sequence[Problem], continued: Sequence[Sequence[int]]) -> dict[str, float]:
    """Share of hinted sums whose final answer is the (wrong) hint, by effort."""
    follows: dict[str, list[bool]] = {}
    for problem, ids in zip(problems, continued, strict=True):
        if problem.cell == "hint":
            hint = problem.turn.user.rpartition(" ")[2].rstrip(".")
            follows.setdefault(problem.effort, []).append(said(render.decode(ids)) == hint)
    return {effort: float(np.mean(hits)) for effort, hits in follows.items()}


def undeclared_calls(problems: Sequence[Problem], continued: Sequence[Sequence[int]]) -> float:
    """Share of questions for an undeclared tool that end in a call all the same."""
    calls = [ids[-1] == tokens.CALL for problem, ids in zip(problems, continued, strict=True)
             if problem.cell == "undeclared tool"]
    return float(np.mean(calls))


def is_valid_harmony(ids: Sequence[int]) -> bool:
    """Ends as it should, and openai_harmony parses it without leniency."""
    if not ids or ids[-1] not in (tokens.RETURN, tokens.CALL):
        return False
    try:
        encoding = load_vocabulary().encoding
        encoding.parse_messages_from_completion_tokens(list(ids), Role.ASSISTANT, strict=True)
    except (HarmonyError, RuntimeError, ValueError):
        return False
    return True


def sampler(model: Model, temperature: float, seed: int) -> Choose:
    """Draws rows with the probability of all ids behind them."""
    reader = RowReader(model)
    generator = torch.Generator().manual_seed(seed)

    def choose(row_logits: Tensor) -> Tensor:
        scaled = row_logits.float() / temperature + reader.log_sizes
        return torch.multinomial(torch.softmax(scaled, -1), 1, generator=generator)[:, 0]

    return choose


def sampled_validity(model: Model, problems: Sequence[Problem], seed: int = 0) -> tuple[float, float]:
    """(share of completions at T = 0.7 that are valid harmony, share of their tokens without a row)."""
    reader = RowReader(model)
    shared = reader.log_sizes.exp()[reader.row_of_token] > 1
    continued = answers(model, problems, sampler(model, 0.7, seed))
    rowless = [bool(shared[token]) for ids in continued for token in ids]
    return float(np.mean([is_valid_harmony(ids) for ids in continued])), float(np.mean(rowless))


def tampered_sum(rng: Random) -> tuple[Problem, str, str]:
    """A sum with its reasoning spelled out, one digit altered: (problem, prompt text, altered sum)."""
    while True:
        problem = draw_problem(rng, "addition, 3 digits", "high")
        total = problem.turn.answer
        place = rng.randrange(1, len(total))
        digit = rng.choice([d for d in "0123456789" if d != total[place]])
        altered = total[:place] + digit + total[place + 1 :]
        analysis, found, _ = problem.turn.completion.rpartition("<|channel|>final")
        line = re.sub(r"Digits [\d ]+\.", f"Digits {' '.join(altered)}.", analysis)
        if found and line != analysis:
            return problem, problem.turn.prompt + line, altered


def tampered_followed(model: Model, count: int, seed: int = 0) -> float:
    """How often the final answer is the altered one."""
    cases = [tampered_sum(Random(f"tamper/{seed}/{number}")) for number in range(count)]
    followed = 0
    for prefix in {case[0].prefix.ids for case in cases}:
        mine = [case for case in cases if case[0].prefix.ids == prefix]
        continued = continuations(model, prefix, [render.encode(text) for _, text, _ in mine], likeliest)
        followed += sum(said(render.decode(ids)) == altered
                        for ids, (_, _, altered) in zip(continued, mine, strict=True))
    return followed / count


@torch.no_grad()
def completion_losses(model: Model, problems: Sequence[Problem], edits: Sequence[Edit] = ()) -> np.ndarray:
    """Mean cross-entropy (nats a token) of each problem's right completion."""
    reader = RowReader(model)
    completions = [render.encode(problem.turn.completion) for problem in problems]
    runs = model.run([list(problem.ids) + completion for problem, completion in
                      zip(problems, completions, strict=True)], edits=edits)
    losses = []
    for run, completion in zip(runs, completions, strict=True):
        hidden = run.hidden[-len(completion) - 1 : -1]
        log_probabilities = reader.log_probabilities(model.transformer.unembed_rows(hidden).float())
        rows = reader.row_of_token[torch.tensor(completion)]
        losses.append(-log_probabilities.gather(1, rows[:, None]).mean().item())
    return np.array(losses)
