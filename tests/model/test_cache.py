"""Reading in pieces, in forks and in batches gives what reading at once gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gptoss_workbench as wb
from gptoss_workbench.hooks.capture import Capture
from tests.factories import TINY, tiny_model, write_hf
from tests.tolerances import CACHE_F32, SITE_F32

W = TINY["sliding_window"]
IDS = torch.randint(512, (5 * W,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    return wb.load(write_hf(tmp_path_factory.mktemp("tiny"), tiny_model(seed=2)), dtype="float32")


def read(model, ids, cache, start):
    taps = model.new_taps(Capture(), (), [[0] * (start + len(ids))])
    positions = torch.arange(start, start + len(ids))[None]
    hidden, _ = model.read(torch.tensor([ids]), positions, cache, taps, [0], last_only=False)
    return hidden[0]


@pytest.mark.parametrize("length", [W - 1, W, W + 1, 3 * W])
def test_token_by_token_equals_at_once(tiny, length: int) -> None:
    whole = tiny.run(IDS[:length]).hidden
    cache = tiny.new_cache(1)
    pieces = [read(tiny, IDS[i:i + 1], cache, i) for i in range(length)]
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=0, atol=SITE_F32)


@pytest.mark.parametrize("prefix", [W - 1, W, W + 1, 3 * W])
def test_a_chunk_sees_the_cached_prefix(tiny, prefix: int) -> None:
    """The place where published fast paths went wrong: several tokens at once after a filled cache."""
    cache = tiny.new_cache(1)
    read(tiny, IDS[:prefix], cache, 0)
    torch.testing.assert_close(read(tiny, IDS[prefix:], cache, prefix), tiny.run(IDS).hidden[prefix:],
                               rtol=0, atol=CACHE_F32)


@given(st.integers(1, len(IDS)))
@settings(max_examples=12)
def test_chunked_prefill(tiny, chunk: int) -> None:
    whole, pieces = (tiny.run(IDS, capture=["attn.pattern", "resid_post"], chunk=c) for c in (None, chunk))
    torch.testing.assert_close(pieces.logits, whole.logits, rtol=0, atol=CACHE_F32)
    for site in ("attn.pattern", "resid_post"):
        torch.testing.assert_close(pieces.tensor(site), whole.tensor(site), rtol=0, atol=SITE_F32)


def test_forks_go_their_own_way(tiny) -> None:
    cache = tiny.new_cache(1)
    read(tiny, IDS[:10], cache, 0)
    fork = cache.fork()
    other = [5, 6, 7]
    one, two = read(tiny, IDS[10:20], cache, 10), read(tiny, other, fork, 10)
    assert (len(cache), len(fork)) == (20, 13)
    torch.testing.assert_close(one, tiny.run(IDS[:20]).hidden[10:], rtol=0, atol=CACHE_F32)
    torch.testing.assert_close(two, tiny.run(IDS[:10] + other).hidden[10:], rtol=0, atol=CACHE_F32)


def test_select_keeps_rows(tiny) -> None:
    ids, positions = tiny.pad_left([IDS[:12], IDS[3:9]])
    cache = tiny.new_cache(2)
    taps = tiny.new_taps(Capture(), (), [IDS[:12], IDS[3:9]])
    tiny.read(ids, positions, cache, taps, [0, 1])
    second = read(tiny, [9], cache.select(torch.tensor([1])), 6)
    torch.testing.assert_close(second[0], tiny.run([*IDS[3:9], 9]).hidden[-1], rtol=0, atol=CACHE_F32)


@given(st.lists(st.integers(1, 3 * W), min_size=2, max_size=4))
@settings(max_examples=12)
def test_a_padded_row_equals_the_row_alone(tiny, lengths: list[int]) -> None:
    prompts = [IDS[i:i + n] for i, n in enumerate(lengths)]
    capture = ["attn.pattern", "router.logits", "resid_post"]
    for batched, row in zip(tiny.run(prompts, capture=capture), prompts, strict=True):
        alone = tiny.run(row, capture=capture)
        torch.testing.assert_close(batched.logits, alone.logits, rtol=0, atol=CACHE_F32)
        for site in capture:
            torch.testing.assert_close(batched.tensor(site), alone.tensor(site), rtol=0, atol=SITE_F32)
