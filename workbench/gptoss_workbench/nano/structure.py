"""What the exported file does inside: where information moves, what experts and heads are for."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import torch

from gptoss_workbench.experiments.metrics import logit_diff
from gptoss_workbench.experiments.patching import patching
from gptoss_workbench.hooks.routing import ban_experts
from gptoss_workbench.nano import facts, render, tasks
from gptoss_workbench.nano.behaviour import completion_losses
from gptoss_workbench.nano.heldout import is_held_out
from gptoss_workbench.nano.measures import mutual_information, selectivity
from gptoss_workbench.nano.problems import Problem

if TYPE_CHECKING:
    from gptoss_workbench.hooks.edits import Edit
    from gptoss_workbench.model.model import Model

START = "<|startoftext|>"


def one_token(word: str) -> bool:
    return len(render.encode(f" {word}")) == 1


def scene_pair(rng: Random) -> tuple[str, str, str, str]:
    """(clean, corrupt, clean answer, corrupt answer): the same scene with the giver exchanged."""
    while True:
        scene = tasks.giving_scene(rng)
        if is_held_out(scene.key):
            break
    head, _, _ = scene.opening.rpartition(scene.tail)
    corrupt = head + scene.tail.replace(scene.giver, scene.receiver, 1)
    return START + scene.opening, START + corrupt, f" {scene.receiver}", f" {scene.giver}"


def country_pair(rng: Random) -> tuple[str, str, str, str]:
    """The same for two countries whose names and capitals are one token each."""
    known = [country for country in facts.COUNTRIES if one_token(country.name) and one_token(country.capital)]
    first, second = rng.sample(known, 2)
    clean, corrupt = (f"{START}The capital of {country.name} is" for country in (first, second))
    return clean, corrupt, f" {first.capital}", f" {second.capital}"


def mean_recovery(
    model: Model, pairs: Sequence[tuple[str, str, str, str]]
) -> tuple[np.ndarray, list[str], float]:
    """Patching of the residual stream, averaged: (fraction (layer, token), texts, clean logit difference)."""
    grids = [patching(model, clean, corrupt, "resid_pre", metric=logit_diff(answer, other))
             for clean, corrupt, answer, other in pairs]
    texts = [str(text) for text in grids[0]["text"].values]
    clean = float(np.mean([grid.attrs["clean"] for grid in grids]))
    return np.mean([grid.values for grid in grids], 0), texts, clean


def ioi_numbers(model: Model, count: int) -> dict[str, float]:
    """How the second mention of the giver decides, and where it is carried to."""
    grid, _, clean = mean_recovery(model, [scene_pair(Random(f"ioi/{number}")) for number in range(count)])
    # "... , GIVER gave a THING to": the second mention is the fifth token from the end.
    subject, last = grid.shape[1] - 5, grid.shape[1] - 1
    elsewhere = np.delete(grid, [subject, last], axis=1)
    return {
        "ioi, clean logit difference": clean,
        "ioi, recovered at the second subject": float(grid[:, subject].max()),
        "ioi, recovered at the last token after the move": float(grid[:, last].max()),
        "ioi, recovered elsewhere": float(np.abs(elsewhere).max()),
        **{f"ioi, layer {layer}, second subject": float(row[subject]) for layer, row in enumerate(grid)},
        **{f"ioi, layer {layer}, last token": float(row[last]) for layer, row in enumerate(grid)},
    }


def capital_numbers(model: Model, count: int) -> dict[str, float]:
    """How long the fact stays at the country before the last token has it."""
    pairs = [country_pair(Random(f"capital/{number}")) for number in range(count)]
    grid, _, clean = mean_recovery(model, pairs)
    country = grid.shape[1] - 2  # "... COUNTRY is"
    return {
        "capital, clean logit difference": clean,
        "capital, recovered at the country, layers 0 and 1": float(grid[:2, country].min()),
        "capital, recovered at the country, last layer": float(grid[-1, country]),
        **{f"capital, layer {layer}, country": float(row[country]) for layer, row in enumerate(grid)},
        **{f"capital, layer {layer}, last token": float(row[-1]) for layer, row in enumerate(grid)},
    }


def attention_and_routing(model: Model, problems: Sequence[Problem]) -> dict[str, float]:
    """Sink mass by band, information between top expert and token or task, balance of the experts."""
    texts = [list(problem.ids) + render.encode(problem.turn.completion) for problem in problems]
    layers = model.config.num_hidden_layers
    sinks: list[list[float]] = [[] for _ in range(layers)]
    experts: list[list[np.ndarray]] = [[] for _ in range(layers)]
    seen, labels = [], []
    for ids, problem in zip(texts, problems, strict=True):
        run = model.run(ids, capture=["attn.pattern", "router.experts"])
        own = slice(len(problem.prefix.ids), None)  # the prefix is everywhere the same
        for layer in range(layers):
            sinks[layer].append(float(run.tensor("attn.pattern", layer)[:, own, -1].mean()))
            experts[layer].append(run.tensor("router.experts", layer)[own, 0].numpy())
        seen += ids[own]
        labels += [problem.turn.task] * len(ids[own])
    bands = np.array([str(band) for band in model.config.bands])
    mass = np.array([np.mean(values) for values in sinks])
    chosen = [np.concatenate(values) for values in experts]
    token_bits = [mutual_information(expert, seen) for expert in chosen]
    task_bits = [mutual_information(expert, labels) for expert in chosen]
    count = model.config.num_local_experts
    shares = [np.bincount(expert, minlength=count) / len(expert) for expert in chosen]
    return {
        "sink mass, sliding": float(mass[bands == "sliding"].mean()),
        "sink mass, full": float(mass[bands == "full"].mean()),
        "sink mass, sliding / full": float(mass[bands == "sliding"].mean() / mass[bands == "full"].mean()),
        "information between expert and token, bits": float(np.mean(token_bits)),
        "information between expert and task, bits": float(np.mean(task_bits)),
        "most used expert, share": float(np.max(shares)),
        "least used expert, share": float(np.min(shares)),
    }


def knock_out_selectivity(model: Model, problems: Sequence[Problem]) -> dict[str, float]:
    """Ban each expert of each layer in turn: does it hurt one task or all?"""
    names = sorted({problem.cell for problem in problems})
    cells = np.array([problem.cell for problem in problems])

    def by_task(edits: Sequence[Edit] = ()) -> np.ndarray:
        losses = completion_losses(model, problems, edits)
        return np.array([losses[cells == name].mean() for name in names])

    whole = by_task()
    damage = np.array([
        by_task([ban_experts(layer=layer, experts=[expert])]) - whole
        for layer in range(model.config.num_hidden_layers)
        for expert in range(model.config.num_local_experts)
    ])
    return {"knock-out selectivity": selectivity(damage), "knock-out selectivity by chance": 1 / len(names)}


@torch.no_grad()
def induction_numbers(model: Model, count: int, length: int = 8) -> dict[str, float]:
    """On random words said twice: how much each head looks at what followed the word the first time."""
    layers, scores = model.config.num_hidden_layers, []
    right = []
    for number in range(count):
        rng = Random(f"induction/{number}")
        ids = render.encode(START + "".join(f" {word}" for word in rng.sample(tasks.REPEATABLE, length)) * 2)
        run = model.run(ids, capture=["attn.pattern"])
        query = torch.arange(length + 1, 2 * length)
        patterns = [run.tensor("attn.pattern", layer) for layer in range(layers)]
        scores.append(np.array([p[:, query, query - length + 1].mean(-1).numpy() for p in patterns]))
        guess = model.transformer.unembed(run.hidden[length + 1 : 2 * length]).argmax(-1)
        right.append((guess == torch.tensor(ids[length + 2 :])).float().mean().item())
    mean = np.mean(scores, 0)
    layer, head = np.unravel_index(mean.argmax(), mean.shape)
    return {
        "best induction head": float(mean.max()),
        "best induction head, layer": float(layer),
        "best induction head, head": float(head),
        "repeated words predicted": float(np.mean(right)),
    }
