"""Statistics of the attention equal the same statistics of the whole pattern, and the whole pattern is never there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import gptoss_workbench as wb
from gptoss_workbench.errors import SiteError
from gptoss_workbench.hooks.pooled import DISTANCES
from gptoss_workbench.model.transformer import Transformer
from tests.tolerances import CACHE_F32, POOLED_BF16, PROBABILITY

SPANS = [(1, 4), (6, 7), (9, 15)]
LONG = torch.randint(512, (90,), generator=torch.Generator().manual_seed(2)).tolist()


def by_hand(name: str, pattern: Tensor, positions: list[int], window: int, top: int = 8) -> Tensor:
    """From a whole pattern (head, query, key + 1) in float64, in plain loops over queries."""
    pattern = pattern.double()
    rows = []
    for column, position in enumerate(positions):
        p, sink = pattern[:, column, :-1], pattern[:, column, -1]
        back = position - torch.arange(p.shape[-1])
        if name == "attn.sink_mass":
            rows.append(sink)
        elif name == "attn.entropy":
            both = pattern[:, column]
            rows.append(-torch.where(both > 0, both * both.log(), 0.0).sum(-1))
        elif name == "attn.window_mass":
            rows.append(p[:, back < window].sum(-1))
        elif name == "attn.distance_mass":
            ends = [*DISTANCES[1:], 1 << 40]
            rows.append(torch.stack([p[:, (back >= low) & (back < high)].sum(-1)
                                     for low, high in zip(DISTANCES, ends, strict=True)], dim=-1))
        elif name == "attn.top_mass":
            best = p.sort(dim=-1, descending=True).values[:, :top]
            rows.append(torch.nn.functional.pad(best, (0, top - best.shape[-1])))
    return torch.stack(rows, dim=1)


def span_mass(pattern: Tensor, positions: list[int], spans: list[tuple[int, int]]) -> Tensor:
    """(head, query span, key span) with the rest and the sink, in plain loops."""
    pattern = pattern.double()
    length = pattern.shape[-1] - 1
    rest = [t for t in range(length) if not any(a <= t < b for a, b in spans)]
    groups = [list(range(a, b)) for a, b in spans] + [rest]
    out = []
    for queries in groups:
        columns = [positions.index(q) for q in queries if q in positions]
        block = pattern[:, columns].mean(1)  # NaN without a query
        out.append(torch.stack([*(block[:, keys].sum(-1) for keys in groups), block[:, -1]], dim=-1))
    return torch.stack(out, dim=1)


NAMES = ("attn.sink_mass", "attn.entropy", "attn.window_mass", "attn.distance_mass", "attn.top_mass")


def check(run, whole, model, tolerance: float, top: int = 8) -> None:
    """Every statistic of a run against the captured patterns of another run of the same prompt."""
    for layer in range(4):
        pattern = whole.tensor("attn.pattern", layer)[:, [whole.positions.index(p) for p in run.positions]]
        for name in NAMES:
            want = by_hand(name, pattern, run.positions, model.config.sliding_window, top)
            torch.testing.assert_close(run.tensor(name, layer).double(), want, rtol=0, atol=tolerance)
        keys, mass = run.tensor("attn.top_key", layer), run.tensor("attn.top_mass", layer)
        there = keys >= 0
        assert torch.equal(there, mass > 0)
        torch.testing.assert_close(pattern.float().gather(-1, keys.clamp(min=0))[there], mass[there], rtol=0,
                                   atol=tolerance)
        assert all(len({*row[row >= 0].tolist()}) == int((row >= 0).sum()) for row in keys.flatten(0, 1))
        want = span_mass(pattern, run.positions, SPANS)
        torch.testing.assert_close(run.tensor("attn.span_mass", layer).double(), want, rtol=0, atol=tolerance,
                                   equal_nan=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("at_once", [1 << 24, 3000, 1])
@pytest.mark.parametrize("chunk", [None, 17])
def test_statistics_equal_those_of_the_whole_pattern(folder, dtype, at_once, chunk) -> None:
    """In one block, in blocks of a few queries, in blocks of one; and the prompt in chunks."""
    model = wb.load(folder, dtype=dtype)
    ids = LONG[:40]
    whole = model.run(ids, capture="attn.pattern", chunk=chunk)
    model.transformer.scores_at_once = at_once
    run = model.run(ids, capture=wb.capture("attn.pooled", spans=SPANS), chunk=chunk)
    check(run, whole, model, CACHE_F32 if dtype == "float32" else POOLED_BF16)


def test_statistics_of_some_heads_and_queries(small) -> None:
    chosen = dict(heads=[6, 1], tokens=[3, 10, 11, 39])
    run = small.run(LONG[:40], capture=wb.capture("attn.pooled", top=3, spans=SPANS, **chosen))
    whole = small.run(LONG[:40], capture=wb.capture("attn.pattern", **chosen))
    check(run, whole, small, PROBABILITY, top=3)
    assert run.data["attn.top_key"].dims == ("layer", "head", "query", "rank")
    assert run.data["head"].values.tolist() == [6, 1] and run.data["query"].values.tolist() == [3, 10, 11, 39]


def test_statistics_of_a_padded_batch(small) -> None:
    prompts = [LONG[:40], LONG[5:21]]
    runs = small.run(prompts, capture=wb.capture("attn.pooled", spans=SPANS))
    for run, prompt in zip(runs, prompts, strict=True):
        check(run, small.run(prompt, capture="attn.pattern"), small, CACHE_F32)
    assert runs.data["attn.entropy"].dims == ("prompt", "layer", "head", "query")
    assert np.isnan(runs.data["attn.entropy"].values[1, :, :, :24]).all()


def test_statistics_of_a_generation(small) -> None:
    gen = small.generate(LONG[:16], capture=wb.capture("attn.pooled", spans=SPANS), max_tokens=9, stop=[]).finish()
    whole = small.run(gen.ids[:-1], capture="attn.pattern")
    check(gen.run(), whole, small, CACHE_F32)


def test_the_parts_of_a_row_are_the_whole(small) -> None:
    data = small.run(LONG, capture=wb.capture("attn.pooled", spans=SPANS)).data
    np.testing.assert_allclose(data["attn.distance_mass"].sum("distance") + data["attn.sink_mass"], 1, atol=PROBABILITY)
    np.testing.assert_allclose(data["attn.span_mass"].sum("key_span"), 1, atol=10 * PROBABILITY)
    sliding = data["attn.window_mass"].isel(layer=0)
    np.testing.assert_allclose(sliding + data["attn.sink_mass"].isel(layer=0), 1, atol=PROBABILITY)
    assert data["key_span"].values.tolist() == [0, 1, 2, "rest", "sink"]
    assert data["distance"].values.tolist()[:5] == [0, 1, 2, 4, 8]


def test_spans_are_those_of_the_prompt_by_default(model) -> None:
    run = model.run(wb.chat("What is 27 + 58?"), capture=["attn.span_mass", "attn.pattern"])
    mass = run.data["attn.span_mass"]
    assert mass.sizes["query_span"] == len(run.spans) + 1
    a = next(number for number, span in enumerate(run.spans) if span.role == "user" and span.field == "content")
    b = next(number for number, span in enumerate(run.spans) if span.role == "system" and span.field == "content")
    queries, keys = (slice(run.spans[n].start, run.spans[n].stop) for n in (a, b))
    want = run.tensor("attn.pattern", 1)[3, queries, keys].sum(-1).mean()
    assert float(mass.sel(layer=1, query_span=a, key_span=b).isel(head=3)) == \
        pytest.approx(float(want), abs=PROBABILITY)
    prompts = [wb.chat("What is 27 + 58?"), wb.chat("What is 27 + 58?", developer="Be brief.")]
    batch = model.run(prompts, capture="attn.span_mass").data  # another number of spans in each
    assert batch["attn.span_mass"].sizes["key_span"] == len(model.run(prompts[1]).spans) + 2


def test_edits_of_the_pattern_show_in_the_statistics(small) -> None:
    run = small.run(LONG[:30], capture="attn.pooled", edits=[wb.scale_sink(0.0, layer=1)])
    assert float(run.tensor("attn.sink_mass", 1).abs().max()) == 0
    assert float(run.tensor("attn.sink_mass", 0).min()) > 0


def test_blocks_change_no_bit_of_what_is_captured_beside(small) -> None:
    """Captured or not, edited or not, the pattern comes in the same blocks: hooks never change the numbers."""
    bare = Transformer(small.config, small.weights, small.transformer.kernels, scores_at_once=4000)
    whole, small.transformer = small.transformer, bare
    try:
        plain = small.run(LONG)
        for capture, edits in ((["attn.pattern", "attn.scores"], ()), ("attn.pooled", ()),
                               (None, [wb.scale("attn.pattern", 1.0), wb.scale("attn.scores", 1.0)])):
            assert torch.equal(small.run(LONG, capture=capture, edits=edits).hidden, plain.hidden)
        captured = small.run(LONG, capture=["attn.pattern", "attn.scores"])
        edit = [wb.cut_attention(layer=1, query=[5, 60, 61], key=[4, 50], head=2), wb.zero("attn.pattern", tokens=70)]
        edited = small.run(LONG, edits=edit)
    finally:
        small.transformer = whole
    at_once = small.run(LONG, capture=["attn.pattern", "attn.scores"])
    for site in ("attn.pattern", "attn.scores"):
        torch.testing.assert_close(captured.tensor(site), at_once.tensor(site), rtol=0, atol=CACHE_F32)
    torch.testing.assert_close(edited.hidden, small.run(LONG, edits=edit).hidden, rtol=0, atol=CACHE_F32)


def test_the_whole_pattern_is_never_there(folder) -> None:
    """Peak of the memory that torch allocates, in the log of its profiler, against the size of one layer's pattern."""
    model = wb.load(folder, dtype="float32")
    ids = torch.randint(512, (1024,), generator=torch.Generator().manual_seed(3)).tolist()
    whole = 4 * 8 * 1024 * 1025
    model.transformer.scores_at_once = whole // 4 // 32
    assert peak(lambda: model.run(ids, capture=wb.capture("attn.pooled", layers=1, spans=SPANS))) < 0.6 * whole
    assert peak(lambda: model.run(ids, capture=wb.capture("attn.pattern", layers=1))) > whole


def peak(call) -> int:
    """The most bytes that were allocated beyond those at the beginning."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
        kept = call()
    events = [event for event in log.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = top = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        top = max(top, level)
    del kept
    return top


def test_a_statistic_is_no_place_to_edit() -> None:
    for name in ("attn.entropy", "attn.top", "router"):
        with pytest.raises(SiteError, match="can be captured"):
            wb.zero(name)
