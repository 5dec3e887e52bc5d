"""A layer x token patching sweep done by several programs: the same numbers, each timed in every round.

The model is a random gpt-oss of 6 layers, 8 experts (4 a token), window 32, in float32; the prompts have 64 tokens and
differ in all, so that no patch is idle. Patched is ``resid_post`` of every layer at 16 tokens, one at a time, and read
is a logit difference after the last token. One thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import gptoss_workbench as wb
from gptoss_workbench.experiments.sweeps.engine import Case, Engine
from tests.factories import tiny_model, write_hf
from tests.oracle import transformers_model

LAYERS, TOKENS, PATCHED, VOCAB, ANSWERS = 6, 64, 16, 4096, (7, 450)
NAIVE = "transformers, hooks, one patch a forward"


def shape(hidden: int) -> dict[str, int]:
    return {"num_hidden_layers": LAYERS, "hidden_size": hidden, "intermediate_size": hidden, "head_dim": hidden // 8,
            "vocab_size": VOCAB, "sliding_window": 32}


def contenders(hidden: int) -> dict[str, Callable[[], Tensor]]:
    """By name, a function that gives the metric of every patch, (layer, token)."""
    folder = write_hf(Path(tempfile.mkdtemp(prefix="sweeps_")) / "hf", tiny_model(seed=5, **shape(hidden)))
    theirs, ours = transformers_model(folder), wb.load(folder, dtype="float32")
    theirs.set_experts_implementation("eager")
    draw = torch.Generator().manual_seed(1)
    clean, corrupt = (torch.randint(VOCAB, (TOKENS,), generator=draw).tolist() for _ in range(2))
    assert all(a != b for a, b in zip(clean, corrupt, strict=True))
    places = [(layer, token) for layer in range(LAYERS) for token in range(PATCHED)]
    run = ours.run(clean, capture="resid_post")
    values = [run.tensor("resid_post", layer) for layer in range(LAYERS)]
    edits = [wb.patch("resid_post", run, layer=layer, tokens=token) for layer, token in places]

    def metric(logits: Tensor) -> Tensor:
        return logits[..., ANSWERS[0]] - logits[..., ANSWERS[1]]

    def hooked(layer: int, tokens: list[int]) -> Tensor:
        """One forward of as many rows as tokens, each patched at its own."""
        def patch(module, inputs, output):
            output = output.clone()
            for row, token in enumerate(tokens):
                output[row, token] = values[layer][token]
            return output
        handle = theirs.model.layers[layer].register_forward_hook(patch)
        try:
            return metric(theirs(torch.tensor([corrupt] * len(tokens))).logits[:, -1])
        finally:
            handle.remove()

    def naive() -> Tensor:
        return torch.cat([hooked(layer, [token]) for layer, token in places])

    def batched() -> Tensor:
        return torch.cat([hooked(layer, list(range(PATCHED))) for layer in range(LAYERS)])

    def loop() -> Tensor:
        return torch.stack([metric(ours.run(corrupt, edits=edit).logits[-1]) for edit in edits])

    def sweep() -> Tensor:
        found = torch.empty(len(edits))
        for numbers, logits in Engine(ours, [corrupt], [Case(0, (edit,)) for edit in edits]).stream():
            found[numbers] = metric(logits)
        return found

    return {NAIVE: naive, "transformers, hooks, tokens as a batch": batched,
            "workbench, model.run, one edit a run": loop, "workbench, sweep": sweep}


def measure(hidden: int, rounds: int) -> dict[str, object]:
    """Seconds of every contender and ratios to the naive loop of the same round, medians and spread."""
    made = contenders(hidden)
    names = list(made)
    truth = {name: call() for name, call in made.items()}  # the first round warms up
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[number % len(names):] + names[:number % len(names)]:
            begun = time.perf_counter()
            made[name]()
            seconds[name].append(time.perf_counter() - begun)
    found = {}
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds[NAIVE], strict=True)]
        found[name] = {"seconds": round(statistics.median(times), 4), "ratio": round(statistics.median(ratios), 4),
                       "ratio_least": round(min(ratios), 4), "ratio_most": round(max(ratios), 4),
                       "largest_difference": float((truth[name] - truth[NAIVE]).abs().max())}
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("hidden", type=int)
    parser.add_argument("rounds", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    print(json.dumps(measure(arguments.hidden, arguments.rounds)))
