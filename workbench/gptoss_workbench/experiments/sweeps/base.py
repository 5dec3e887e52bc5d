"""The runs that every case of a sweep starts from: what enters each half of a layer, and all keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace as changed

from torch import Tensor

from gptoss_workbench.hooks.capture import Capture
from gptoss_workbench.hooks.edits import Edit
from gptoss_workbench.model.model import Model


@dataclass(frozen=True)
class Base:
    """Prompts read once, padded on the left.

    Attributes:
        positions: (prompt, column) int64, negative for padding.
        states: what enters each half, (prompt, column, d_model), before the edits there.
        keys, values: by layer, (prompt, column, kv_head, d_head).
        logits: after the last token, (prompt, vocab).
    """

    positions: Tensor
    states: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    logits: Tensor


def read_base(model: Model, prompts: Sequence[Sequence[int]], edits: Sequence[Sequence[Edit]]) -> Base:
    """Run prompts, each with edits of its own, and keep what cases need.

    Raises:
        EditNeverFired: one of the edits did not act.
    """
    own = [changed(edit, place=changed(edit.place, prompt=row)) for row, some in enumerate(edits) for edit in some]
    taps = model.new_taps(Capture(), own, prompts)
    states: list[Tensor] = []
    held: dict[str, list[Tensor]] = {"attn.k": [], "attn.v": []}

    def tap(site: str, layer: int | None, x: Tensor, start: int = 0) -> Tensor:
        if site in ("embed", "resid_mid", "resid_post"):
            states.append(x)
        x = taps(site, layer, x, start)
        if site in held:
            held[site].append(x)
        return x

    ids, positions = model.pad_left(prompts)
    taps.begin(range(len(prompts)), positions, ids)
    hidden = model.transformer(ids, positions, model.new_cache(len(prompts)), tap)
    if "logits" in taps:
        logits = taps("logits", None, model.transformer.unembed(hidden))[:, -1]
    else:
        logits = model.transformer.unembed(hidden[:, -1])
    taps.finish()
    return Base(positions, states, held["attn.k"], held["attn.v"], logits)


def base_bytes(model: Model, columns: int) -> int:
    """What ``read_base`` keeps of so many columns."""
    config = model.config
    each = (2 * config.num_hidden_layers + 1) * config.hidden_size
    each += 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return columns * each * model.weights.embed.element_size()

