"""Greedy text: token for token what transformers' own loop with its own cache says."""

from __future__ import annotations

from itertools import product

import torch

import gptoss_workbench as wb
from tests.parity.cases import EFFORTS, EMBEDDED, QUESTIONS, Pair, random_ids
from tests.parity.rows import Row

STOPS, PADDING = [200002, 200012, 199999], 199999


def text(pair: Pair) -> list[Row]:
    """The embedded model on 30 chats; a tiny model on 10 random prompts, through several windows."""
    ours, theirs = pair.ours(), pair.theirs()
    if pair.name == EMBEDDED:
        prompts = [ours.encode(wb.chat(question, effort=effort)) for question, effort in product(QUESTIONS, EFFORTS)]
        longest, stops, padding = 90, STOPS, PADDING
    else:
        prompts = [random_ids(seed, length=3 + 2 * seed) for seed in range(10)]
        longest, stops, padding = 40, [], None
    generations = ours.generate(prompts, max_tokens=longest, stop=stops)  # one padded batch
    differ = tokens = 0
    for ids, generation in zip(prompts, generations, strict=True):
        with torch.no_grad():
            want = theirs.generate(torch.tensor([ids]), max_new_tokens=longest, do_sample=False,
                                   eos_token_id=stops or [pair.ours().config.vocab_size], pad_token_id=padding)
        differ += generation.tokens != want[0, len(ids):].tolist()
        tokens += len(generation.tokens)
    return [Row("greedy text", pair.name, f"{len(prompts)} prompts, {tokens} tokens, one padded batch of ours",
                "transformers, one by one", "float32", "prompts whose text differs", differ, "NONE",
                count=len(prompts))]
