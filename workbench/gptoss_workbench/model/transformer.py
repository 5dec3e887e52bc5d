"""The forward pass of gpt-oss, written once.

Everything that can be seen or changed passes through ``tap(site, layer, x) -> x``. Batched tensors reach it with a
leading prompt dimension; the other dimensions of each site stand in ``gptoss_workbench.hooks.sites``.

Dtypes: the residual stream, every projection, scores, softmax, router and experts are in the compute dtype (float32
or bfloat16). Norms compute in float32 with a float32 scale and round once. Rotary angles are float32, their cosine and
sine are cast to the compute dtype. Logits stay in the compute dtype. This is what OpenAI's torch code does.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch.nn.functional as F
from torch import Tensor

from gptoss_workbench.model.cache import KVCache
from gptoss_workbench.model.config import ModelConfig
from gptoss_workbench.model.weights import LayerWeights, Weights

Tap = Callable[[str, "int | None", Tensor], Tensor]


def no_tap(site: str, layer: int | None, x: Tensor) -> Tensor:
    return x


class Transformer:
    """gpt-oss as a function of (ids, positions, cache, tap). Holds weights and constants, no state of a run."""

    def __init__(self, config: ModelConfig, weights: Weights, kernels: ModuleType) -> None:
        self.config, self.weights, self.kernels = config, weights, kernels
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
        visible = self._visible(positions, cache.extend(positions))
        for layer, (w, band) in enumerate(zip(weights.layers, config.bands, strict=True)):
            x = tap("resid_pre", layer, x)
            x = tap("resid_mid", layer, x + self._attention(x, layer, w, cos, sin, visible[band], cache, tap))
            x = tap("resid_post", layer, x + self._experts(x, layer, w, tap))
        return tap("final_norm", None, kernels.rms_norm(x, weights.final_norm, config.rms_norm_eps))

    def _visible(self, query: Tensor, key: Tensor) -> dict[str, Tensor]:
        """Which keys a query may look at, (prompt, query, key), per band; a sliding one reaches W, itself included."""
        distance = query[:, :, None] - key[:, None, :]
        causal = (distance >= 0) & (key[:, None, :] >= 0)
        return {"full": causal, "sliding": causal & (distance < self.config.sliding_window)}

    def _attention(
        self, x: Tensor, layer: int, w: LayerWeights, cos: Tensor, sin: Tensor, visible: Tensor,
        cache: KVCache, tap: Tap,
    ) -> Tensor:
        kernels, size = self.kernels, self.config.head_dim

        def heads(y: Tensor) -> Tensor:
            return y.view(*y.shape[:2], -1, size)

        x = tap("attn.norm", layer, kernels.rms_norm(x, w.attn_norm, self.config.rms_norm_eps))
        q = tap("attn.q", layer, kernels.apply_rope(heads(F.linear(x, w.q_weight, w.q_bias)), cos, sin))
        k = tap("attn.k", layer, kernels.apply_rope(heads(F.linear(x, w.k_weight, w.k_bias)), cos, sin))
        v = tap("attn.v", layer, heads(F.linear(x, w.v_weight, w.v_bias)))
        k, v = cache.append(layer, k, v)
        scores = tap("attn.scores", layer, kernels.attention_scores(q, k, visible))
        pattern = tap("attn.pattern", layer, kernels.softmax_with_sink(scores, w.sinks))
        z = tap("attn.z", layer, kernels.attention_values(pattern, v))
        return tap("attn.out", layer, F.linear(z.flatten(2), w.o_weight, w.o_bias))

    def _experts(self, x: Tensor, layer: int, w: LayerWeights, tap: Tap) -> Tensor:
        kernels, config = self.kernels, self.config
        prompts, tokens = x.shape[:2]

        def flat(y: Tensor) -> Tensor:
            return y.flatten(0, 1)

        def batched(y: Tensor) -> Tensor:
            return y.unflatten(0, (prompts, tokens))

        x = tap("mlp.norm", layer, kernels.rms_norm(x, w.mlp_norm, config.rms_norm_eps))
        logits = tap("router.logits", layer, F.linear(x, w.router_weight, w.router_bias))
        chosen = tap("router.experts", layer, kernels.choose_experts(logits, config.num_experts_per_tok))
        weights = tap("router.weights", layer, kernels.expert_weights(logits, chosen))
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
        return F.linear(hidden, self.weights.unembed)
