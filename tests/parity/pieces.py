"""Reading in pieces, in forks and in padded batches, against transformers reading it all at once."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from gptoss_workbench.hooks.capture import Capture
from gptoss_workbench.model.cache import KVCache
from tests.parity.cases import EMBEDDED, Pair
from tests.parity.rows import Row, max_abs

GROUP = "cache and padding"


@torch.no_grad()
def pieces(pair: Pair) -> list[Row]:
    """Every way to read a prompt: whole, in chunks, token by token, after a fork, in a padded batch."""
    ours, ids = pair.ours(), pair.prompts[0]
    window = ours.config.sliding_window
    found: list[tuple[str, Tensor, Tensor, Tensor]] = []  # setting, ours in pieces, theirs whole, ours whole

    @functools.cache
    def at_once(prompt: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return pair.theirs()(torch.tensor([prompt])).logits[0], ours.run(prompt).logits

    def compare(setting: str, got: Tensor, prompt: list[int], last: int | None = None) -> None:
        part = slice(None if last is None else len(prompt) - last, None)
        theirs, mine = at_once(tuple(prompt))
        found.append((setting, got, theirs[part], mine[part]))

    for chunk in _sizes(len(ids), 1, 3, 7, window - 1, window, window + 1, 3 * window, len(ids) - 1):
        name = "read at once" if chunk == len(ids) else f"chunks of {chunk}"
        compare(name, ours.run(ids, chunk=chunk).logits, ids)
    for prefix in _sizes(window - 1, window, window + 1, 3 * window):
        compare(f"{prefix} tokens, then the rest at once", _read(ours, ids[prefix:], _after(ours, ids[:prefix])), ids,
                last=len(ids) - prefix)
        cache = _after(ours, ids[:prefix])
        steps = [_read(ours, [token], cache) for token in ids[prefix:prefix + window + 2]]
        compare(f"{prefix} tokens, then one by one", torch.cat(steps), ids[:prefix + len(steps)], last=len(steps))
    for prefix in _sizes(window - 1, 2 * window + 1):
        cache = _after(ours, ids[:prefix])
        fork, other = cache.fork(), list(reversed(ids[:window + 3]))
        one, two = _read(ours, ids[prefix:], cache), _read(ours, other, fork)
        compare(f"fork after {prefix}, first way", one, ids, last=len(one))
        compare(f"fork after {prefix}, second way", two, ids[:prefix] + other, last=len(two))
    lengths = _sizes(1, window - 1, window, window + 1, 3 * window, len(ids))
    batch = [ids[-length:] for length in lengths]
    for chunk in (None, 3, window):
        for run in ours.run(batch, chunk=chunk):
            how = "" if chunk is None else f", chunks of {chunk}"
            compare(f"row of {len(run)} in a batch of {len(batch)}{how}", run.logits, run.ids)
    compare("one row kept of a padded batch, then 3 tokens", *_kept_row(ours, ids, window))
    return list(_rows(pair, found))


def _rows(pair: Pair, found: list) -> Iterator[Row]:
    limit = "EMBEDDED_LOGITS_F32" if pair.name == EMBEDDED else "TINY_LOGITS_F32"
    own = "EMBEDDED_LOGITS_F32" if pair.name == EMBEDDED else "CACHE_F32"
    for setting, got, theirs, ours in found:
        for against, want, bound in (("transformers, at once", theirs, limit), ("ours, at once", ours, own)):
            yield Row(GROUP, pair.name, setting, against, "float32", "logits max abs", max_abs(got, want), bound)


def _sizes(*sizes: int) -> list[int]:
    """Each once; a window of 1 makes some of them nothing."""
    return [size for size in dict.fromkeys(sizes) if size]


def _after(model, ids: list[int]) -> KVCache:
    cache = model.new_cache(1)
    _read(model, ids, cache)
    return cache


def _read(model, ids: list[int], cache: KVCache) -> Tensor:
    """Logits (token, vocab) of a chunk that follows what the cache of one prompt holds."""
    start = int(cache.positions.max()) + 1 if len(cache) else 0
    taps = model.new_taps(Capture(), (), [[0] * (start + len(ids))])
    positions = torch.arange(start, start + len(ids))[None]
    hidden, _ = model.read(torch.tensor([ids]), positions, cache, taps, [0], last_only=False)
    return model.transformer.unembed(hidden[0])


def _kept_row(model, ids: list[int], window: int) -> tuple[Tensor, list[int], int]:
    rows = [ids[: 2 * window], ids[3 : window + 4]]
    cache = model.new_cache(2)
    model.read(*model.pad_left(rows), cache, model.new_taps(Capture(), (), rows), [0, 1])
    cache = cache.select(torch.tensor([1]))
    return _read(model, ids[:3], cache), rows[1] + ids[:3], 3
