"""From examples to index tensors: tokens lie flat, and only attention sees padded groups."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gptoss_workbench.nano.corpus import UNKNOWN_ID, VOCABULARY_SIZE, Example, Prefix

_FAR = 10**6
_MASKED = -1e9


@dataclass(frozen=True)
class Rows:
    """Which row of the compact embedding each of the 201,088 ids uses; the last row is shared."""

    ids: tuple[int, ...]

    @property
    def shared(self) -> int:
        return len(self.ids)

    @property
    def unused(self) -> int:
        """How many ids stand behind the shared row."""
        return VOCABULARY_SIZE - len(self.ids)

    def of_token(self) -> np.ndarray:
        """int64 [201088]."""
        rows = np.full(VOCABULARY_SIZE, self.shared, dtype=np.int64)
        rows[list(self.ids)] = np.arange(len(self.ids))
        return rows


@dataclass(frozen=True)
class Group:
    """Sequences attended to together. B sequences of at most L own tokens, after one of the prefixes."""

    own: Tensor  # int64 [B, L] flat token index; padding points at token 0 and is masked
    prefix: Tensor | None  # int64 [B] which prefix each sequence follows; None for the prefixes themselves
    full_mask: Tensor  # float32 [B, L, P + L] added to scores
    sliding_mask: Tensor  # float32 [B, L, W + L]


@dataclass(frozen=True)
class Batch:
    """T flat tokens: first every distinct prefix, then the examples."""

    rows: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    groups: list[Group]  # the first group holds the prefixes
    index: Tensor  # int64 [N] flat token at each padded place of all groups in order
    exists: Tensor  # float32 [N, 1] 0 where the place is padding
    inverse: Tensor  # int64 [T] place of each flat token among the padded tokens of all groups in order
    prefix_tail: Tensor  # int64 [U, W] columns of the last W tokens in the padded prefixes
    targets: Tensor  # int64 [T] row to predict, -1 for none
    weights: Tensor  # float32 [T]
    starts: np.ndarray  # [B] flat index of the first token of each example


def _mask(query: np.ndarray, key: np.ndarray, key_exists: np.ndarray, window: int) -> Tensor:
    distance = query[:, :, None] - key[:, None, :]
    allowed = (distance >= 0) & (distance < window) & key_exists[:, None, :]
    return torch.from_numpy(np.where(allowed, np.float32(0), np.float32(_MASKED)))


def _split(lengths: np.ndarray, prefix_lengths: np.ndarray, parts: int) -> list[np.ndarray]:
    """Examples in groups of like length, so that little is padded; long prefixes apart from short ones."""
    groups: list[np.ndarray] = []
    for chosen in (prefix_lengths == 0, (prefix_lengths > 0) & (prefix_lengths <= 64), prefix_lengths > 64):
        members = np.flatnonzero(chosen)
        if len(members):
            members = members[np.argsort(lengths[members], kind="stable")]
            groups += np.array_split(members, min(parts, -(-len(members) // 8)))
    return groups


def collate(examples: list[Example], rows: Rows, window: int, parts: int = 3) -> Batch:
    row_of_token = rows.of_token()
    prefixes: dict[Prefix, int] = {}
    for example in examples:
        prefixes.setdefault(example.prefix, len(prefixes))
    prefix_of = np.array([prefixes[example.prefix] for example in examples])
    prefix_lengths = np.array([len(prefix.ids) for prefix in prefixes])
    lengths = np.array([len(example.ids) for example in examples])
    offsets = np.concatenate(([0], np.cumsum(np.concatenate((prefix_lengths, lengths)))))
    prefix_starts, starts = offsets[: len(prefixes)], offsets[len(prefixes) : -1]
    total = int(offsets[-1])
    flat = [prefix.ids for prefix in prefixes] + [example.ids for example in examples]
    ids = np.concatenate([np.array(sequence, dtype=np.int64) for sequence in flat])
    after = np.concatenate((np.zeros(len(prefixes), dtype=np.int64), prefix_lengths[prefix_of]))
    positions = np.concatenate([base + np.arange(len(part)) for base, part in zip(after, flat, strict=True)])

    inverse = np.empty(total, dtype=np.int64)
    groups: list[Group] = []
    padded_total = 0

    def own_index(first: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        nonlocal padded_total
        width = max(1, int(count.max()))
        column = np.arange(width)
        exists = column < count[:, None]
        own = np.where(exists, first[:, None] + column, 0)
        place = padded_total + np.arange(own.size).reshape(own.shape)
        inverse[own[exists]] = place[exists]
        padded_total += own.size
        return own, exists

    own, exists = own_index(prefix_starts, prefix_lengths)
    column = np.broadcast_to(np.arange(own.shape[1]), own.shape)
    groups.append(Group(torch.from_numpy(own), None, _mask(column, column, exists, _FAR),
                        _mask(column, column, exists, window)))
    # The last `window` tokens of each prefix, right-aligned, with their positions.
    tail = prefix_lengths[:, None] - window + np.arange(window)
    for members in _split(lengths, prefix_lengths[prefix_of], parts):
        own_group, own_exists = own_index(starts[members], lengths[members])
        before = prefix_of[members]
        query = prefix_lengths[before][:, None] + np.arange(own_group.shape[1])
        full_keys = np.concatenate((column[before], query), 1)
        full_exists = np.concatenate((exists[before], own_exists), 1)
        near_keys = np.concatenate((tail[before], query), 1)
        near_exists = np.concatenate((tail[before] >= 0, own_exists), 1)
        groups.append(Group(torch.from_numpy(own_group), torch.from_numpy(before),
                            _mask(query, full_keys, full_exists, _FAR),
                            _mask(query, near_keys, near_exists, window)))

    targets = np.full(total, -1, dtype=np.int64)
    weights = np.zeros(total, dtype=np.float32)
    inputs = row_of_token[ids]
    for start, example in zip(starts, examples, strict=True):
        end, middle = start + len(example.ids) - 1, start + max(len(example.prompt) - 1, 0)
        targets[start:end] = inputs[start + 1 : end + 1]
        weights[start:middle] = example.prompt_weight
        weights[middle:end] = 1.0
    unknown = row_of_token[UNKNOWN_ID]
    for start, example in zip(starts, examples, strict=True):
        inputs[[start + place for place in example.blanks]] = unknown
    exists_flat = torch.zeros(padded_total, 1)
    exists_flat[torch.from_numpy(inverse)] = 1.0
    return Batch(
        torch.from_numpy(inputs), torch.from_numpy(positions), groups,
        torch.cat([group.own.reshape(-1) for group in groups]), exists_flat, torch.from_numpy(inverse),
        torch.from_numpy(np.maximum(tail, 0)), torch.from_numpy(targets), torch.from_numpy(weights), starts,
    )
