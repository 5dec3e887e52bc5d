"""Weights set by hand: a small gpt-oss whose residual stream is laid out in blocks that parts read and write.

In the layout's own basis every coordinate has a meaning; ``assemble`` then turns the whole stream by a random rotation,
so that no coordinate of the finished model means anything by itself. The norms' scales are 1, so RMSNorm turns along
and the rotated model computes the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from gptoss_workbench.model.config import FULL, SLIDING, ModelConfig
from gptoss_workbench.model.model import Model
from gptoss_workbench.model.weights import LayerWeights, Weights
from gptoss_workbench.planted.value import Place

LAYERS, HEADS, KV_HEADS, HEAD, EXPERTS, CHOSEN, INNER, VOCAB = 4, 4, 2, 32, 8, 2, 16, 94

SYMBOLS = 12  # how many different things a block can name
IDENTITY, HELD, ANSWER, ASIDE = range(4)  # the blocks, SYMBOLS wide each; the unembedding reads ANSWER
FLAGS = ("start", "ask", "upper", "lower", "first kind", "second kind", "switch", "on", "open", "think", "digit", "end")
WIDTH = 4 * SYMBOLS + 16

CONFIG = ModelConfig(
    num_hidden_layers=LAYERS, hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
    head_dim=HEAD, num_local_experts=EXPERTS, num_experts_per_tok=CHOSEN, intermediate_size=INNER, vocab_size=VOCAB,
    sliding_window=16, layer_types=(SLIDING, FULL) * (LAYERS // 2), rope_theta=150000.0, rope_factor=32.0,
    rope_beta_fast=32.0, rope_beta_slow=1.0, rope_original_context=4096, rope_truncate=False,
    max_position_embeddings=131072,
)

# Of the 16 rotary pairs of a head the first turn by 1, 0.47 and 0.22 radians a token, pairs 9 to 15 by less than 4e-5:
# the first tell distances apart, the last don't notice them.
TURNING = (0, 1, 2)
STILL = (*range(9, 16), *range(25, 32))

LOUD = math.sqrt(WIDTH / 3)  # a feature after the norm, in a stream of about three features
CONCENTRATION = 0.1 * math.log(CONFIG.rope_factor) + 1
MATCH = 28.0  # score of a query with the key it looks for
SINK = 9.0  # logit of a sink that keeps a head quiet until something matches
NEXT = 40.0  # score of a query with the token before it; with itself it is 32
SCORE = math.sqrt(MATCH * math.sqrt(HEAD)) / CONCENTRATION / LOUD  # gain of query and key, each
WRITTEN = (1.0, 1.2, 3.0, 1.0)  # length of what is added to a block; an embedding's features have length 1

Write = tuple[int, str, Any, Tensor]  # layer, field, where in it, what is added


@dataclass(frozen=True, eq=False)
class Part:
    """One component with the weights it needs; ``place`` says which and at what token it is meant to act."""

    place: Place
    writes: tuple[Write, ...]


def block(number: int) -> Tensor:
    """The coordinates of a block as rows, (SYMBOLS, d)."""
    return torch.eye(WIDTH)[number * SYMBOLS : (number + 1) * SYMBOLS]


def into(number: int, order: Sequence[int] | None = None) -> Tensor:
    """What a component writes into a block: row i for symbol i, or for symbol order[i], as long as the block asks."""
    rows = WRITTEN[number] * block(number)
    return rows if order is None else rows[list(order)]


def flag(*names: str) -> Tensor:
    """The sum of flags, (d,)."""
    return sum((torch.eye(WIDTH)[4 * SYMBOLS + FLAGS.index(name)] for name in names), torch.zeros(WIDTH))


def _own(index: int) -> slice:
    return slice(index * HEAD, (index + 1) * HEAD)


def _values(layer: int, head: int, read: Tensor, write: Tensor) -> tuple[Write, ...]:
    """The head's value reads rows of ``read`` (n, d) and adds rows of ``write`` (n, d) to the stream."""
    v, o = torch.zeros(HEAD, WIDTH), torch.zeros(WIDTH, HEAD)
    v[: len(read)] = read / LOUD
    o[:, : len(write)] = write.T
    return (layer, "v_weight", _own(head // (HEADS // KV_HEADS)), v), (layer, "o_weight", (slice(None), _own(head)), o)


def matching_head(
    place: Place, query: Tensor, key: Tensor, read: Tensor, write: Tensor, sink: float = SINK,
) -> Part:
    """A head whose query looks for keys with the same symbol, wherever they are.

    Args:
        query, key: (n, d), row by row what must agree; n at most 14. One row each: a flag that looks for a flag.
        read, write: (m, d): what is read at the key, and what is written for it.
        sink: logit of the sink, which takes the attention when nothing matches.
    """
    layer, head = place.layer, place.index
    q, k = torch.zeros(HEAD, WIDTH), torch.zeros(HEAD, WIDTH)
    q[list(STILL[: len(query)])] = SCORE * query
    k[list(STILL[: len(key)])] = SCORE * key
    return Part(place, (
        (layer, "q_weight", _own(head), q), (layer, "k_weight", _own(head // (HEADS // KV_HEADS)), k),
        (layer, "sinks", head, torch.tensor(sink)), *_values(layer, head, read, write),
    ))


def previous_token_head(place: Place, read: Tensor, write: Tensor) -> Part:
    """A head that looks one token back, whatever stands there: its queries and keys are biases.

    A constant query and key, turned by their positions, give the score sum_i cos(w_i (distance - 1)) over rotary pairs
    i when the key is set off by one token. One turn of the fast pair is 2 pi tokens, and there the others disagree.
    """
    layer, head, half = place.layer, place.index, HEAD // 2
    q, k = torch.zeros(HEAD), torch.zeros(HEAD)
    size = math.sqrt(NEXT * math.sqrt(HEAD) / len(TURNING)) / CONCENTRATION
    for pair in TURNING:
        angle = CONFIG.rope_theta ** (-2 * pair / HEAD)
        q[pair], k[pair], k[pair + half] = size, size * math.cos(angle), size * math.sin(angle)
    return Part(place, (
        (layer, "q_bias", _own(head), q), (layer, "k_bias", _own(head // (HEADS // KV_HEADS)), k),
        *_values(layer, head, read, write),
    ))


def table_expert(place: Place, when: Tensor, read: Tensor, write: Tensor) -> Part:
    """An expert that is a table: chosen for tokens with the feature ``when`` (d,); where row i of ``read`` (n, d) is
    there, it writes row i of ``write`` (n, d)."""
    layer, expert, n = place.layer, place.index, len(read)
    fires = 5.0  # the activation of a neuron that is on, below the clamp at 7
    gate_up, down = torch.zeros(2 * INNER, WIDTH), torch.zeros(WIDTH, INNER)
    gate_up[0 : 2 * n : 2] = fires / LOUD * read  # even rows are the gate; the linear half stays 0, and counts as 1
    down[:, :n] = CHOSEN / fires * write.T  # the router's weight is about 1 / CHOSEN
    return Part(place, (
        (layer, "router_weight", expert, when), (layer, "gate_up", expert, gate_up), (layer, "down", expert, down),
    ))


def assemble(
    parts: Sequence[Part], embed: Tensor, unembed: Tensor, *, background: float, seed: int, window: int | None = None,
    name: str = "planted model",
) -> Model:
    """The parts together, on a random background, in a random basis. Equal seeds give equal backgrounds.

    Args:
        parts: their weights are added up.
        embed, unembed: (vocab, d) in the layout's basis.
        background: every matrix gets Gaussian noise of this size / sqrt(its inputs), every bias and sink this size
            / 10, every embedding a noise vector of this length.
        window: keys a query of a sliding layer sees.
    """
    generator = torch.Generator().manual_seed(seed)
    config = CONFIG if window is None else replace(CONFIG, sliding_window=window)
    tensors = [_background(background, generator) for _ in range(LAYERS)]
    embed = embed + _noise(embed.shape, background / math.sqrt(WIDTH), generator)
    unembed = unembed + _noise(unembed.shape, background / math.sqrt(WIDTH), generator)
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64))[0].float()
    for part in parts:
        for layer, field, where, what in part.writes:
            tensors[layer][field][where] += what
    layers = [LayerWeights(**_turned(layer, turn)) for layer in tensors]
    weights = Weights(embed @ turn, layers, torch.ones(WIDTH), unembed @ turn, None)
    return Model(config, weights, name=name)


SHAPES: Mapping[str, tuple[int, ...]] = {
    "attn_norm": (WIDTH,), "q_weight": (HEADS * HEAD, WIDTH), "q_bias": (HEADS * HEAD,),
    "k_weight": (KV_HEADS * HEAD, WIDTH), "k_bias": (KV_HEADS * HEAD,),
    "v_weight": (KV_HEADS * HEAD, WIDTH), "v_bias": (KV_HEADS * HEAD,), "o_weight": (WIDTH, HEADS * HEAD),
    "o_bias": (WIDTH,), "sinks": (HEADS,), "mlp_norm": (WIDTH,), "router_weight": (EXPERTS, WIDTH),
    "router_bias": (EXPERTS,), "gate_up": (EXPERTS, 2 * INNER, WIDTH), "gate_up_bias": (EXPERTS, 2 * INNER),
    "down": (EXPERTS, WIDTH, INNER), "down_bias": (EXPERTS, WIDTH),
}
_MATRICES = ("q_weight", "k_weight", "v_weight", "o_weight", "router_weight", "gate_up", "down")
_READING = ("q_weight", "k_weight", "v_weight", "router_weight", "gate_up")  # the stream is their last dimension
assert set(SHAPES) == {field.name for field in fields(LayerWeights)}


def _noise(shape: Sequence[int], size: float, generator: torch.Generator) -> Tensor:
    return size * torch.randn(tuple(shape), generator=generator)


def _background(size: float, generator: torch.Generator) -> dict[str, Tensor]:
    """One layer of noise; the norms' scales are 1."""
    return {
        name: torch.ones(shape) if name.endswith("_norm") else
        _noise(shape, size / math.sqrt(shape[-1]) if name in _MATRICES else size / 10, generator)
        for name, shape in SHAPES.items()
    }


def _turned(layer: Mapping[str, Tensor], turn: Tensor) -> dict[str, Tensor]:
    """The layer with its stream turned: x becomes x @ turn."""
    turned = {name: layer[name] @ turn for name in _READING}
    turned |= {name: layer[name] @ turn for name in ("o_bias", "down_bias")}
    turned |= {name: turn.T @ layer[name] for name in ("o_weight", "down")}
    return {**layer, **turned}
