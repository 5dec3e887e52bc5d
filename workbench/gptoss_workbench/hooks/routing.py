"""Edits of the router: who may serve a token, and who must."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gptoss_workbench.errors import EditError
from gptoss_workbench.hooks.edits import Captured, Edit, place_of
from gptoss_workbench.hooks.selection import Indices, freeze


def _experts(experts: int | Sequence[int]) -> tuple[int, ...]:
    frozen = freeze(experts)
    wanted = (frozen,) if isinstance(frozen, int) else frozen
    if not isinstance(wanted, tuple) or not wanted:
        raise EditError("Name at least one expert.", expected="an index or a list of indices", got=repr(experts))
    return tuple(dict.fromkeys(wanted))


def ban_experts(
    *, layer: Indices = None, experts: int | Sequence[int], tokens: Indices = None, prompt: Indices = None,
) -> Edit:
    """Keep these experts from being chosen: their router logits become -inf.

    The next best experts step in and the weights are a softmax over those that were chosen, so they sum to 1.
    """
    banned = _experts(experts)
    place = place_of("router.logits", layer, tokens, prompt, expert=banned)
    return Edit("ban_experts", place, lambda x, layer, positions: -math.inf)


def force_experts(
    *, layer: Indices = None, experts: int | Sequence[int], tokens: Indices = None, prompt: Indices = None,
) -> Edit:
    """Make the router choose these experts; the remaining slots go to its own best others.

    Weights follow from the true router logits of whoever is chosen.

    Raises:
        EditError: while running, when there are more forced experts than slots.
    """
    forced = _experts(experts)

    def change(x: Tensor, layer: int | None, positions: Tensor) -> Tensor:
        slots = x.shape[-1]
        if len(forced) > slots:
            raise EditError("More experts are forced than a token has slots.", expected=f"at most {slots}",
                            got=f"{len(forced)}: {list(forced)}")
        must = torch.tensor(forced, device=x.device)
        others_first = torch.isin(x, must).to(torch.int8).argsort(dim=-1, stable=True)
        others = x.gather(-1, others_first)[:, : slots - len(forced)]
        return torch.cat((must.expand(len(x), -1), others), dim=-1)

    return Edit("force_experts", place_of("router.experts", layer, tokens, prompt), change, list(forced))


def replay_routes(run: Captured, *, layer: Indices = None, tokens: Indices = None, prompt: Indices = None) -> Edit:
    """Make every token go to the experts it went to in another run; tokens that run did not have route freely.

    The weights are the softmax of this run's own logits over the replayed experts.

    Args:
        run: one prompt, captured with ``router.experts`` (or ``router``) at the layers that are replayed.
    """
    def change(x: Tensor, layer: int | None, positions: Tensor) -> Tensor:
        routes = run.tensor("router.experts", layer).to(x)
        known = positions < len(routes)
        if not known.any():
            return x
        return torch.where(known[:, None], routes[positions.clamp(max=len(routes) - 1)], x)

    return Edit("replay_routes", place_of("router.experts", layer, tokens, prompt), change)


def cut_attention(
    *, layer: Indices = None, query: Indices = None, key: Indices = None, head: Indices = None,
    prompt: Indices = None,
) -> Edit:
    """Keep queries from looking at keys: their scores become -inf; the other keys and the sink share the weight.

    Args:
        query, key: positions; None for all.
        head, layer: None for all.
    """
    place = place_of("attn.scores", layer, query, prompt, head=head, key=key)
    return Edit("cut_attention", place, lambda x, layer, positions: -math.inf)
