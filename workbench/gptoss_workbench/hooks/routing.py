"""Edits of the router and the experts: who may serve a token, who must, and how much they count.

Taking an expert away has three meanings, and they give different answers:

- ``silence_experts``: it is chosen as before and its share is lost. Nobody steps in and the other weights stay.
- ``route_around`` (``ban_experts``): it can't be chosen. The next best steps in, and the weights of those who serve are
  a softmax over them, so they sum to 1.
- ``force_experts``, ``swap_experts``: somebody named serves instead.
"""

from __future__ import annotations

from collections.abc import Sequence

from gptoss_workbench.errors import EditError
from gptoss_workbench.hooks.edits import Edit, place_of
from gptoss_workbench.hooks.selection import Indices, freeze
from gptoss_workbench.hooks.values import Captured, finite, source_of


def _experts(experts: int | Sequence[int]) -> tuple[int, ...]:
    frozen = freeze(experts)
    wanted = (frozen,) if isinstance(frozen, int) else frozen
    if not isinstance(wanted, tuple) or not wanted:
        raise EditError("Name at least one expert.", expected="an index or a list of indices", got=repr(experts))
    return tuple(dict.fromkeys(wanted))


def silence_experts(
    *, layer: Indices = None, experts: int | Sequence[int], tokens: Indices = None, prompt: Indices = None,
) -> Edit:
    """Give these experts the weight zero wherever they serve. The other weights stay, so they sum to less than 1.

    Raises:
        EditNeverFired: while running, when none of them serves any of the tokens.
    """
    return Edit("silence_experts", place_of("router.weights", layer, tokens, prompt, expert=_experts(experts)))


def ban_experts(
    *, layer: Indices = None, experts: int | Sequence[int], tokens: Indices = None, prompt: Indices = None,
) -> Edit:
    """Keep these experts from being chosen: their router logits become -inf.

    The next best experts step in and the weights are a softmax over those that were chosen, so they sum to 1.

    Raises:
        EditError: while running, when fewer experts are left than a token has slots.
    """
    return Edit("ban_experts", place_of("router.logits", layer, tokens, prompt, expert=_experts(experts)))


def route_around(
    *, layer: Indices = None, experts: int | Sequence[int], tokens: Indices = None, prompt: Indices = None,
) -> Edit:
    """The same edit as ``ban_experts``, under the name that says what the router then does."""
    return ban_experts(layer=layer, experts=experts, tokens=tokens, prompt=prompt)


def force_experts(
    *, layer: Indices = None, experts: int | Sequence[int], tokens: Indices = None, prompt: Indices = None,
) -> Edit:
    """Make the router choose these experts; the remaining slots go to its own best others.

    Weights follow from the true router logits of whoever is chosen.

    Raises:
        EditError: while running, when there are more forced experts than slots, or an expert that does not exist.
    """
    place = place_of("router.experts", layer, tokens, prompt)
    return Edit("force_experts", place, (("experts", _experts(experts)),))


def swap_experts(
    *, layer: Indices = None, experts: Sequence[int], tokens: Indices = None, prompt: Indices = None,
) -> Edit:
    """Exchange the router logits of two experts: each serves where the other would have, with the other's weight."""
    pair = _experts(experts)
    if len(pair) != 2:
        raise EditError("A swap is between two experts.", expected="experts=[first, second]", got=repr(experts))
    return Edit("swap_experts", place_of("router.logits", layer, tokens, prompt, expert=pair))


def router_temperature(
    temperature: float, *, layer: Indices = None, tokens: Indices = None, prompt: Indices = None,
) -> Edit:
    """Divide the router's logits by ``temperature``: the same experts serve, above 1 more evenly, below 1 less."""
    number = finite(temperature, "The temperature of the router")
    if number <= 0:
        raise EditError("The temperature of the router must be above 0.", expected="above 0", got=temperature)
    return Edit("router_temperature", place_of("router.logits", layer, tokens, prompt), (("temperature", number),))


def replay_routes(run: Captured, *, layer: Indices = None, tokens: Indices = None, prompt: Indices = None) -> Edit:
    """Make every token go to the experts it went to in another run; tokens that run did not keep route freely.

    The weights are the softmax of this run's own logits over the replayed experts; with
    ``wb.patch("router.weights", run)`` after it they are those of the other run too.

    Args:
        run: one prompt, captured with ``router.experts`` (or ``router``) at the layers that are replayed.
    """
    place = place_of("router.experts", layer, tokens, prompt)
    return Edit("replay_routes", place, (("run", source_of(run, place.site, place.layer)),))
