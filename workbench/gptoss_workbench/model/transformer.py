"""The forward pass of gpt-oss, written once.

Everything that can be seen or changed passes through ``tap(site, layer, x) -> x``. Batched tensors reach it with a
leading prompt dimension; the other dimensions of each site stand in ``gptoss_workbench.hooks.sites``.

Attention maps of a long chunk come in blocks of queries, so that (head, query, key) of the whole chunk is never there:
then the tap is called once a block, with the block's first column as ``start``.

Where nobody looks between two steps, the kernels do both in one go; and what a tap gives back as it was is not computed
again. The bits are the same either way. So a tap must not write into what it is given.

Dtypes: the residual stream, every projection, scores, softmax, router and experts are in the compute dtype (float32
or bfloat16). Norms compute in float32 with a float32 scale and round once. Rotary angles are float32, their cosine and
sine are cast to the compute dtype. Logits stay in the compute dtype. This is what OpenAI's torch code does.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from gptoss_workbench.model.cache import KVCache
from gptoss_workbench.model.config import ModelConfig
from gptoss_workbench.model.weights import Weights

Tap = Callable[..., Tensor]
"""(site, layer, x, start=0) -> x; see ``gptoss_workbench.hooks.taps.Taps``."""

SCORES_AT_ONCE = 1 << 24
"""How many attention scores, (prompt, head, query, key), are computed together: 64 MiB in float32."""


def no_tap(site: str, layer: int | None, x: Tensor, start: int = 0) -> Tensor:
    return x


def watched(tap: Tap, layer: int, *sites: str) -> bool:
    """Whether a tap may look at any of these sites. A function of unknown habits may look at all of them."""
    if tap is no_tap:
        return False
    watches = getattr(tap, "watches", None)
    return watches is None or watches(layer, *sites)


class Sight:
    """Who may look at whom in a chunk, and which queries are computed together.

    Args:
        query, key: positions (prompt, query) and (prompt, key), negative for padding.
        scores_at_once: the most scores of one block; None for no limit.

    Attributes:
        blocks: stretches of the queries' columns, in order.
    """

    def __init__(self, query: Tensor, key: Tensor, config: ModelConfig, scores_at_once: int | None) -> None:
        self.query, self.key, self._config = query, key, config
        prompts, queries = query.shape
        each = prompts * config.num_attention_heads * key.shape[1]
        step = queries if scores_at_once is None else max(1, scores_at_once // each)
        self.blocks = [slice(start, min(start + step, queries)) for start in range(0, queries, step)]

    def window(self, layer: int) -> int | None:
        """How far a layer reaches, the query itself included; None for a full one."""
        return self._config.sliding_window if self._config.bands[layer] == "sliding" else None


class Transformer:
    """gpt-oss as a function of (ids, positions, cache, tap). Holds weights and constants, no state of a run.

    Args:
        scores_at_once: see ``SCORES_AT_ONCE``; None computes every query of a chunk together.
    """

    def __init__(
        self, config: ModelConfig, weights: Weights, kernels: ModuleType, scores_at_once: int | None = SCORES_AT_ONCE,
    ) -> None:
        self.config, self.weights, self.kernels, self.scores_at_once = config, weights, kernels, scores_at_once
        frequencies, self.concentration = kernels.yarn_frequencies(
            config.head_dim, config.rope_theta, config.rope_factor, config.rope_beta_fast, config.rope_beta_slow,
            config.rope_original_context, config.rope_truncate,
        )
        self.frequencies = frequencies.to(weights.embed.device)

    def __call__(self, ids: Tensor, positions: Tensor, cache: KVCache, tap: Tap = no_tap) -> Tensor:
        """Read a chunk of tokens after what the cache holds, and extend the cache.

        Args:
            ids: (prompt, token) int64.
            positions: (prompt, token) int64, each token's place in its own prompt; negative for left padding.
            cache: keys and values so far.
            tap: sees, and may replace, every named tensor on the way.

        Returns:
            (prompt, token, d_model), the residual stream after the final norm.
        """
        kernels, config, weights = self.kernels, self.config, self.weights
        rows = ids if weights.row_of_token is None else weights.row_of_token[ids]
        x = tap("embed", None, F.embedding(rows, weights.embed))
        cos, sin = kernels.rope_tables(positions.clamp(min=0), self.frequencies, self.concentration, x.dtype)
        sight = Sight(positions, cache.extend(positions), config, self.scores_at_once)
        x, eps = tap("resid_pre", 0, x), config.rms_norm_eps
        scales = [w.attn_norm for w in weights.layers] + [weights.final_norm]
        norm = kernels.rms_norm(x, scales[0], eps)
        for layer, w in enumerate(weights.layers):
            delta = self._attention(norm, layer, cos, sin, sight, cache, tap)
            total, norm = kernels.add_norm(x, delta, w.mlp_norm, eps)
            x = tap("resid_mid", layer, total)
            norm = norm if x is total else kernels.rms_norm(x, w.mlp_norm, eps)
            delta = self.experts(norm, layer, tap)
            total, norm = kernels.add_norm(x, delta, scales[layer + 1], eps)
            x = tap("resid_post", layer, total)
            x = x if w is weights.layers[-1] else tap("resid_pre", layer + 1, x)
            norm = norm if x is total else kernels.rms_norm(x, scales[layer + 1], eps)
        return tap("final_norm", None, norm)

    def _attention(
        self, x: Tensor, layer: int, cos: Tensor, sin: Tensor, sight: Sight, cache: KVCache, tap: Tap,
    ) -> Tensor:
        q, k, v = self.project(x, layer, cos, sin, tap)
        return self.write(self.look(q, *cache.append(layer, k, v), layer, sight, tap), layer, tap)

    # The parts of a layer. A sweep (``experiments.sweeps``) calls them for some tokens of many prompts at once.

    def norm(self, x: Tensor, scale: Tensor) -> Tensor:
        """x (..., d_model) normalised, with a norm's scale (d_model,): what a sublayer reads of the residual stream."""
        return self.kernels.rms_norm(x, scale, self.config.rms_norm_eps)

    def project(
        self, x: Tensor, layer: int, cos: Tensor, sin: Tensor, tap: Tap, queries: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (prompt, token, d_model) -> queries (prompt, token, head, d_head), keys and values (..., kv_head, d_head).

        Args:
            x: normalised.
            cos, sin: (prompt, token, d_head / 2).
            queries: the columns that will look; None for all.
        """
        kernels, w = self.kernels, self.weights.layers[layer]
        x = tap("attn.norm", layer, x)
        maps = (w.q_weight, w.q_bias), (w.k_weight, w.k_bias), (w.v_weight, w.v_bias)
        if queries is None:
            q, k, v = kernels.project_qkv(x, *maps, cos, sin)
        else:
            q, k, v = (kernels.linear(y, *two).unflatten(-1, (-1, self.config.head_dim))
                       for y, two in zip((x[:, queries], x, x), maps, strict=True))
            q, k = kernels.apply_rope(q, cos[:, queries], sin[:, queries]), kernels.apply_rope(k, cos, sin)
        return tap("attn.q", layer, q), tap("attn.k", layer, k), tap("attn.v", layer, v)

    def look(self, q: Tensor, k: Tensor, v: Tensor, layer: int, sight: Sight, tap: Tap) -> Tensor:
        """Queries (prompt, query, head, d_head) look at keys (prompt, key, kv_head, d_head) -> z, shaped as q."""
        parts = [self._mix(q, k, v, layer, sight, block, tap) for block in sight.blocks]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, layer: int, sight: Sight, block: slice, tap: Tap) -> Tensor:
        """z of a block of queries. What a tap gave back unchanged is not computed again."""
        kernels, sinks = self.kernels, self.weights.layers[layer].sinks
        what = q[:, block], k, v, sinks, sight.query[:, block], sight.key, sight.window(layer)
        if not watched(tap, layer, "attn.scores", "attn.pattern"):
            return kernels.attention(*what)
        z, scores, pattern = kernels.attention_shown(*what)
        start = (block.start,) if len(sight.blocks) > 1 else ()  # a tap for short chunks need not know of blocks
        seen = tap("attn.scores", layer, scores, *start)
        if seen is not scores:
            pattern = kernels.softmax_with_sink(seen, sinks)
        mixed = tap("attn.pattern", layer, pattern, *start)
        return z if seen is scores and mixed is pattern else kernels.attention_values(mixed, v)

    def write(self, z: Tensor, layer: int, tap: Tap) -> Tensor:
        """z (prompt, token, head, d_head) -> what the attention adds to the stream (prompt, token, d_model)."""
        w = self.weights.layers[layer]
        z = tap("attn.z", layer, z)
        return tap("attn.out", layer, self.kernels.linear(z.flatten(2), w.o_weight, w.o_bias))

    def experts(self, x: Tensor, layer: int, tap: Tap) -> Tensor:
        """x (prompt, token, d_model), normalised -> what the experts add to the residual stream, in the same shape."""
        kernels, config, w = self.kernels, self.config, self.weights.layers[layer]
        prompts, tokens = x.shape[:2]

        def flat(y: Tensor) -> Tensor:
            return y.flatten(0, 1)

        def batched(y: Tensor) -> Tensor:
            return y.unflatten(0, (prompts, tokens))

        x = tap("mlp.norm", layer, x)
        logits = tap("router.logits", layer, kernels.linear(x, w.router_weight, w.router_bias))
        routed, weights = kernels.route(logits, config.num_experts_per_tok)
        chosen = tap("router.experts", layer, routed)
        weights = tap("router.weights", layer, weights if chosen is routed else kernels.expert_weights(logits, chosen))
        if not watched(tap, layer, "expert.gate", "expert.up", "expert.act", "expert.out"):
            out = kernels.expert_mixture(flat(x), flat(chosen), flat(weights), w.gate_up, w.gate_up_bias, w.down,
                                         w.down_bias, config.swiglu_alpha, config.swiglu_limit)
            return tap("mlp.out", layer, batched(out))
        gate_up = kernels.expert_linear(flat(x), flat(chosen), w.gate_up, w.gate_up_bias)
        gate, up = kernels.split_gate_up(batched(gate_up))
        gate, up = tap("expert.gate", layer, gate), tap("expert.up", layer, up)
        act = tap("expert.act", layer, kernels.swiglu(gate, up, config.swiglu_alpha, config.swiglu_limit))
        out = batched(kernels.expert_linear(flat(act), flat(chosen), w.down, w.down_bias))
        out = tap("expert.out", layer, out)
        return tap("mlp.out", layer, batched(kernels.combine_experts(flat(out), flat(weights))))

    def unembed(self, hidden: Tensor) -> Tensor:
        """hidden (..., d_model) -> logits (..., vocab), in the compute dtype."""
        logits = self.unembed_rows(hidden)
        return logits if self.weights.row_of_token is None else logits[..., self.weights.row_of_token]

    def unembed_rows(self, hidden: Tensor) -> Tensor:
        """hidden (..., d_model) -> one logit per distinct row of the unembedding, (..., row).

        In a published checkpoint each token has a row of its own. The embedded model stores one row for all the ids
        that never occur; ``row_of_token`` tells which id has which row.
        """
        return self.kernels.linear(hidden, self.weights.unembed)
