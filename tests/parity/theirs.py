"""transformers' gpt-oss, watched: every site of ours has its counterpart there.

Modules show most sites by hooks. Two lie inside functions, which are wrapped while the model runs: the attention
(rotated queries and keys, values, the weights) and the linear map of the experts. Two things transformers never
holds as a tensor are made from what it does hold: the scores, from its own rotated queries and keys, and the sink's
share of the attention, which is what the other keys leave of 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor


class Trace:
    """What transformers computed for one prompt. ``tensor`` is that of a Run, so edits can take values from here."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, int | None], Tensor] = {}

    def tensor(self, site: str, layer: int | None = None) -> Tensor:
        return self.kept[site, layer]

    def layers(self, site: str) -> list[int]:
        return sorted(layer for name, layer in self.kept if name == site and layer is not None)


@torch.no_grad()
def trace(model: Any, ids: list[int], teacher: Trace | None = None, routes: Trace | None = None) -> Trace:
    """Read a prompt and keep every site, without the batch dimension.

    Args:
        model: a ``GptOssForCausalLM`` with eager attention. Its experts are computed by ``batched_mm``, whose rows
            are (token, slot) pairs in order.
        ids: the prompt.
        teacher: another trace; each layer starts from its ``resid_pre`` and the experts from its ``resid_mid``,
            rounded to this model's dtype.
        routes: another trace, whose experts serve each token. The weights follow from this model's own logits.
    """
    found = Trace()
    with _hooks() as hook, _experts_by_pairs(model), ExitStack() as stack:
        _watch_layers(model, found, hook, teacher)
        _watch_routers(model, found, hook, routes)
        _watch_attention(model, found, stack)
        _watch_experts(model, found, stack, hook)
        hook(model.model.embed_tokens, after=lambda out: found.kept.update({("embed", None): out[0]}))
        hook(model.model.norm, after=lambda out: found.kept.update({("final_norm", None): out[0]}))
        found.kept["logits", None] = model(torch.tensor([ids]), use_cache=False).logits[0]
    return found


@contextmanager
def _hooks() -> Iterator[Callable[..., None]]:
    """A function that hooks a module: ``before`` may give a new first argument, ``after`` a new output."""
    handles = []

    def hook(module: Any, before: Callable | None = None, after: Callable | None = None) -> None:
        if before is not None:
            def first(module, args, before=before):
                new = before(args[0])
                return None if new is None else (new, *args[1:])

            handles.append(module.register_forward_pre_hook(first))
        if after is not None:
            handles.append(module.register_forward_hook(lambda module, args, out, after=after: after(out)))

    try:
        yield hook
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _experts_by_pairs(model: Any) -> Iterator[None]:
    before = model.get_experts_implementation()[""]
    model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def _watch_layers(model: Any, found: Trace, hook: Callable, teacher: Trace | None) -> None:
    def taught(site: str, layer: int) -> Callable[[Tensor], Tensor]:
        def before(x: Tensor) -> Tensor:
            x = x if teacher is None else teacher.tensor(site, layer)[None].to(x)
            found.kept[site, layer] = x[0]
            return x
        return before

    def keep(site: str, layer: int) -> Callable[[Any], None]:
        def after(out: Any) -> None:
            found.kept[site, layer] = (out[0] if isinstance(out, tuple) else out)[0]
        return after

    for index, layer in enumerate(model.model.layers):
        hook(layer, before=taught("resid_pre", index), after=keep("resid_post", index))
        hook(layer.input_layernorm, after=keep("attn.norm", index))
        hook(layer.self_attn, after=keep("attn.out", index))
        hook(layer.post_attention_layernorm, before=taught("resid_mid", index), after=keep("mlp.norm", index))
        hook(layer.mlp, after=keep("mlp.out", index))


def _watch_routers(model: Any, found: Trace, hook: Callable, routes: Trace | None) -> None:
    def watch(layer: int) -> Callable[[tuple], tuple]:
        def after(out: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            logits, weights, experts = out
            if routes is not None:
                experts = routes.tensor("router.experts", layer)
                weights = torch.softmax(logits.gather(-1, experts), dim=-1)
            for name, value in (("logits", logits), ("weights", weights), ("experts", experts)):
                found.kept[f"router.{name}", layer] = value
            return logits, weights, experts
        return after

    for index, layer in enumerate(model.model.layers):
        hook(layer.mlp.router, after=watch(index))


def _watch_attention(model: Any, found: Trace, stack: ExitStack) -> None:
    from transformers.models.gpt_oss import modeling_gpt_oss as modeling

    original = modeling.eager_attention_forward

    def attend(module, query, key, value, attention_mask, scaling, **options):
        out, weights = original(module, query, key, value, attention_mask, scaling, **options)
        layer = module.layer_idx
        scores = query @ modeling.repeat_kv(key, module.num_key_value_groups).transpose(2, 3) * scaling
        hidden = attention_mask < 0 if attention_mask is not None else torch.zeros_like(scores, dtype=torch.bool)
        found.kept["attn.scores", layer] = scores.masked_fill(hidden, -torch.inf)[0]
        found.kept["attn.pattern", layer] = torch.cat((weights, 1 - weights.sum(-1, keepdim=True)), dim=-1)[0]
        for name, states in (("q", query), ("k", key), ("v", value)):
            found.kept[f"attn.{name}", layer] = states[0].transpose(0, 1)
        found.kept["attn.z", layer] = out[0]
        return out, weights

    stack.enter_context(patch.object(modeling, "eager_attention_forward", attend))


def _watch_experts(model: Any, found: Trace, stack: ExitStack, hook: Callable) -> None:
    from transformers.integrations import moe

    linear, slots = moe._batched_linear, model.config.num_experts_per_tok
    at: list[int] = []  # the layer whose experts run, then how many of their two maps ran

    def keep(site: str, pairs: Tensor) -> None:
        found.kept[f"expert.{site}", at[0]] = pairs.unflatten(0, (-1, slots))

    def watched(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
        out = linear(x, weight, **options)
        if at[1] == 0:
            keep("gate", out[:, ::2])
            keep("up", out[:, 1::2])
        else:
            keep("act", x)
            keep("out", out)
        at[1] += 1
        return out

    stack.enter_context(patch.object(moe, "_batched_linear", watched))
    for index, layer in enumerate(model.model.layers):
        def begin(x: Tensor, index: int = index) -> None:
            at[:] = [index, 0]

        hook(layer.mlp.experts, before=begin)
