"""Attention with sinks as ``reference`` has it, each call sent to the kernels that suit its shape."""

from __future__ import annotations

from torch import Tensor

from gptoss_kernels import reference
from gptoss_kernels.triton.attention_fused import attend
from gptoss_kernels.triton.attention_pieces import FEW_ROWS, PART
from gptoss_kernels.triton.attention_spread import attend_spread
from gptoss_kernels.triton.common import falls_back_to


@falls_back_to(reference.attention)
def attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, positions: Tensor, key_positions: Tensor, window: int | None,
) -> Tensor:
    """As ``reference.attention``. Positions of keys must count up by one from column to column."""
    return attention_shown(q, k, v, sinks, positions, key_positions, window, show=False)[0]


@falls_back_to(reference.attention_shown)
def attention_shown(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, positions: Tensor, key_positions: Tensor, window: int | None,
    show: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As ``reference.attention_shown``: z has the bits of ``attention``, scores and pattern are those it came from."""
    if not q.numel():
        return reference.attention_shown(q, k, v, sinks, positions, key_positions, window)
    reach = k.shape[1] if window is None else min(k.shape[1], window + q.shape[1])
    if q.shape[1] * q.shape[2] // k.shape[2] > FEW_ROWS or reach <= PART:
        return attend(q, k, v, sinks, positions, key_positions, window, emit=show)
    return attend_spread(q, k, v, sinks, positions, key_positions, window, emit=show)
