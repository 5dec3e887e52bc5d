"""The pieces that every attention kernel here is made of: a tile of scores, a running softmax, a tile of products.

A tile's rows are queries: the heads of one group, which read the same keys, next to each other for each token. Scores
and pattern are rounded where a hook may look, so that fused and separate kernels multiply the same numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gptoss_kernels.triton.common import rounded, rounded_tile


@triton.jit
def vectors(start, at, exists, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Load rows of SIZE values from ``start + at`` -> (len(at), BLOCK_SIZE); zeros where there is none."""
    i = tl.arange(0, BLOCK_SIZE)
    return tl.load(start + at[:, None] + i[None, :], mask=exists[:, None] & (i < SIZE)[None, :], other=0.0)


@triton.jit
def scores_of(q, k, visible, SCALE: tl.constexpr, dtype: tl.constexpr, FACTOR: tl.constexpr):
    """q (rows, D), k (keys, D), visible (rows, keys) -> scores (rows, keys), float32, -inf where not visible."""
    product = tl.dot(q.to(FACTOR), tl.trans(k).to(FACTOR), input_precision="ieee")
    score = rounded_tile(product, dtype) * SCALE
    if SCALE != 0.125 and SCALE != 0.25:  # scaling by a power of two rounds nothing
        score = rounded_tile(score, dtype)
    return tl.where(visible, score, float("-inf"))


@triton.jit
def see(largest, total, scores):
    """Take more scores (rows, keys) into the running largest score and sum of exponentials, (rows,) each."""
    new = tl.maximum(largest, tl.max(scores, 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    total = total * tl.exp(largest - base) + tl.sum(tl.exp(scores - base[:, None]), 1)
    return new, total


@triton.jit
def see_sink(largest, total, sink):
    """Take the sink, (rows,), into them, one more score, visible to all -> largest score and 1 / sum, (rows,) each."""
    new = tl.maximum(largest, sink)
    return new, 1.0 / (total * tl.exp(largest - new) + tl.exp(sink - new))


@triton.jit
def shares(scores, largest, inverse, dtype: tl.constexpr):
    """The pattern, (rows, keys), of scores whose row has been seen to its end."""
    return rounded(tl.exp(scores - largest[:, None]) * inverse[:, None], dtype)


@triton.jit
def mix(mixed, pattern, v, FACTOR: tl.constexpr):
    """Add pattern (rows, keys) times v (keys, D) to mixed (rows, D)."""
    return tl.dot(pattern.to(FACTOR), v.to(FACTOR), mixed, input_precision="ieee")
