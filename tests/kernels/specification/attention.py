"""Attention: sinks, groups of heads, bands, padding, and a chunk of tokens that meets keys read before."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor

from gptoss_kernels import reference
from tests.kernels.specification.common import Draw, agree


@dataclass(frozen=True)
class Case:
    """``tokens`` queries at the end of ``keys`` columns, of which ``pads`` are padding; and columns not yet filled."""

    tokens: int
    keys: int
    window: int | None = None
    pads: tuple[int, ...] = (0,)
    heads: int = 4
    kv_heads: int = 2
    size: int = 16
    spare: int = 0


# The Triton kernels take 64 queries (heads of a group counted one by one) and 64 keys at a time, and spread the keys
# over programs when few queries look at more than 512.
FAST = [
    Case(1, 1), Case(1, 64), Case(1, 65, pads=(3,)), Case(3, 63, pads=(0, 5)), Case(33, 33, heads=2, kv_heads=1),
    Case(7, 70, window=8, pads=(0, 68)), Case(1, 129, window=64, heads=8, kv_heads=1), Case(2, 66, window=65, size=64),
    Case(5, 40, window=1), Case(2, 20, size=24, heads=3, kv_heads=1), Case(4, 30, spare=50, pads=(2, 0)),
    Case(1, 513, pads=(1,)), Case(1, 513, window=100, spare=10),
]
_EDGES = [(keys, window) for keys in (63, 64, 65, 127, 128, 129) for window in (None, 63, 64, 65, 128)]
SLOW = [  # 4 heads a group: 15, 16 and 17 tokens are 60, 64 and 68 queries
    *(Case(15 + number % 3, keys, window, (number % 4,), 4, 1, 16) for number, (keys, window) in enumerate(_EDGES)),
    *(Case(1, keys, window, (70,), 4, 1, 16) for keys in (511, 512, 513, 1023, 1024, 1025) for window in (None, 128)),
    *(Case(tokens, 600, None, (3,), 8, 1, 8) for tokens in (7, 8, 9)),
    Case(17, 129, 65, (0, 2), 8, 2, 64),
]


class Chunk:
    """Random queries, keys and values of a case, keys in the columns beyond the last query too."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        draw, batch, columns = Draw(device), len(case.pads), case.keys + case.spare
        self.window = case.window
        self.q = draw.normal(batch, case.tokens, case.heads, case.size, dtype=dtype)
        self.k = draw.normal(batch, columns, case.kv_heads, case.size, dtype=dtype)
        self.v = draw.normal(batch, columns, case.kv_heads, case.size, dtype=dtype)
        self.sinks = draw.normal(case.heads, dtype=dtype)
        pads = torch.tensor(case.pads, device=device)[:, None]
        self.key_positions = torch.arange(columns, device=device)[None] - pads
        self.positions = self.key_positions[:, case.keys - case.tokens:case.keys]

    @property
    def visible(self) -> Tensor:
        return reference.visible_keys(self.positions, self.key_positions, self.window)

    def arguments(self) -> tuple:
        return self.q, self.k, self.v, self.sinks, self.positions, self.key_positions, self.window


def check(kernels: ModuleType, device: torch.device, dtype: torch.dtype, case: Case) -> None:
    chunk = Chunk(case, device, dtype)
    want = reference.attention_shown(*chunk.arguments())
    scores = kernels.attention_scores(chunk.q, chunk.k, chunk.visible)
    pattern = kernels.softmax_with_sink(scores, chunk.sinks)
    for got, right in zip((kernels.attention_values(pattern, chunk.v), scores, pattern), want):
        agree(got, right)
    if hasattr(kernels, "attention"):
        shown = kernels.attention_shown(*chunk.arguments())
        for got, right in zip(shown, want):
            agree(got, right)
        assert torch.equal(kernels.attention(*chunk.arguments()), shown[0]), "the same bits with or without a hook"


@pytest.mark.parametrize("case", FAST, ids=str)
def test_attention(kernels: ModuleType, device: torch.device, case: Case) -> None:
    check(kernels, device, torch.float32, case)


@pytest.mark.parametrize("case", FAST[5:8], ids=str)
def test_attention_rounds_as_the_reference(kernels: ModuleType, device: torch.device, case: Case) -> None:
    check(kernels, device, torch.bfloat16, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=str)
def test_attention_at_the_edges_of_blocks(kernels: ModuleType, device: torch.device, case: Case) -> None:
    check(kernels, device, torch.float32, case)


def test_padding_changes_nothing(kernels: ModuleType, device: torch.device) -> None:
    """A padded row is the row alone, and a padding query rests on its sink."""
    padded = Chunk(Case(6, 9, pads=(4,), window=4), device, torch.float32)
    z = _z(kernels, *padded.arguments())
    alone = [x[:, 4:] for x in (padded.k, padded.v, padded.key_positions)]
    rest = _z(kernels, padded.q[:, 1:], alone[0], alone[1], padded.sinks, padded.positions[:, 1:], alone[2], 4)
    assert (z[:, 0] == 0).all()
    agree(z[:, 1:], rest)


def test_a_chunk_after_others_is_the_whole(kernels: ModuleType, device: torch.device) -> None:
    whole = Chunk(Case(20, 20, window=6), device, torch.float32)
    q, k, v, sinks, positions, key_positions, window = whole.arguments()
    parts = [_z(kernels, q[:, a:b], k[:, :b], v[:, :b], sinks, positions[:, a:b], key_positions[:, :b], window)
             for a, b in ((0, 7), (7, 8), (8, 20))]
    agree(torch.cat(parts, dim=1), _z(kernels, *whole.arguments()))


@pytest.mark.parametrize("window", [None, 600])
def test_columns_that_are_not_filled_change_nothing(
    kernels: ModuleType, device: torch.device, window: int | None,
) -> None:
    """A cache with room for many more tokens gives what one that is full gives; Triton's kernels to the bit."""
    roomy = Chunk(Case(1, 40, window, pads=(3,), spare=1000), device, torch.float32)
    full = roomy.arguments()
    q, k, v, sinks, positions, key_positions, _ = full
    exact = _z(kernels, q, k[:, :40].contiguous(), v[:, :40].contiguous(), sinks, positions, key_positions[:, :40],
               window)
    got = _z(kernels, *full)
    agree(got, exact)
    if kernels.name == "triton":
        assert torch.equal(got, exact)


def test_a_large_sink_takes_all(kernels: ModuleType, device: torch.device) -> None:
    chunk = Chunk(Case(3, 10), device, torch.float32)
    chunk.sinks[:] = torch.tensor([1e4, -1e4, 0.0, 0.0], device=device)
    z, _, pattern = _shown(kernels, chunk)
    assert (pattern[:, 0, :, -1] == 1).all() and (z[:, :, 0] == 0).all()
    assert (pattern[:, 1, :, -1] == 0).all()
    assert torch.allclose(pattern.sum(-1), torch.ones_like(pattern.sum(-1)))


def test_edited_scores(kernels: ModuleType, device: torch.device, dtype: torch.dtype) -> None:
    """What an edit may leave behind: whole rows cut, and a pattern that sums to nothing in particular."""
    chunk = Chunk(Case(3, 70), device, dtype)
    scores = reference.attention_scores(chunk.q, chunk.k, chunk.visible).clone()
    scores[:, 0] = -torch.inf
    scores[:, 1, :, :66] = -torch.inf
    agree(kernels.softmax_with_sink(scores, chunk.sinks), reference.softmax_with_sink(scores, chunk.sinks))
    pattern = Draw(device, seed=3).normal(*scores.shape[:3], scores.shape[3] + 1, dtype=dtype)
    agree(kernels.attention_values(pattern, chunk.v), reference.attention_values(pattern, chunk.v))


def _z(kernels: ModuleType, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, positions: Tensor, key_positions: Tensor,
       window: int | None) -> Tensor:
    if hasattr(kernels, "attention"):
        return kernels.attention(q, k, v, sinks, positions, key_positions, window)
    scores = kernels.attention_scores(q, k, reference.visible_keys(positions, key_positions, window))
    return kernels.attention_values(kernels.softmax_with_sink(scores, sinks), v)


def _shown(kernels: ModuleType, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
    if hasattr(kernels, "attention_shown"):
        return kernels.attention_shown(*chunk.arguments())
    scores = kernels.attention_scores(chunk.q, chunk.k, chunk.visible)
    pattern = kernels.softmax_with_sink(scores, chunk.sinks)
    return kernels.attention_values(pattern, chunk.v), scores, pattern
