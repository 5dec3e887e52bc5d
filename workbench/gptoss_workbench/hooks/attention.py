"""Edits of the attention: who may look where, and how much rests on the sink."""

from __future__ import annotations

from torch import Tensor

from gptoss_workbench.errors import EditError
from gptoss_workbench.hooks.edits import Edit, place_of
from gptoss_workbench.hooks.selection import Indices
from gptoss_workbench.hooks.values import Captured, Held, finite, source_of, value_of


def cut_attention(
    *, layer: Indices = None, query: Indices = None, key: Indices = None, head: Indices = None, prompt: Indices = None,
) -> Edit:
    """Keep queries from looking at keys: their scores become -inf; the other keys and the sink share the weight.

    Args:
        query, key: tokens in any form of ``tokens`` (see ``wb.set``): positions, Spans, ``wb.where(channel="final")``.
        head, layer, prompt: None for all.
    """
    return Edit("cut_attention", place_of("attn.scores", layer, query, prompt, head=head, key=key))


def pin_attention(
    pattern: Captured | Tensor, *, layer: Indices = None, query: Indices = None, head: Indices = None,
    prompt: Indices = None,
) -> Edit:
    """Make heads attend as given, whatever their scores are.

    Args:
        pattern: a run of one prompt that captured ``attn.pattern``; or a tensor as captured, (head, query, key + 1)
            with the selected heads and queries and the sink as the last key. Its first dimensions may be 1 or missing.
            Keys that are not there yet are cut off, keys beyond those given get nothing.
        layer, query, head, prompt: None for all; ``query`` in any form of ``tokens``.
    """
    place = place_of("attn.pattern", layer, query, prompt, head=head)
    held = value_of(pattern, "pattern") if isinstance(pattern, Tensor) else source_of(pattern, place.site, place.layer)
    if (isinstance(held, Held) and not 1 <= held.tensor.dim() <= 3) or isinstance(held, int | float):
        raise EditError("That is no pattern.", expected="(head, query, key + 1)", got="another number of dimensions")
    return Edit("pin_attention", place, (("pattern", held),))


def scale_sink(
    factor: float, *, layer: Indices = None, query: Indices = None, head: Indices = None, prompt: Indices = None,
) -> Edit:
    """Multiply the sink's odds: 0 closes it, and the keys share what it had; 2 makes it count twice.

    The same as adding ln(factor) to the sink's logit: the share p of the sink becomes f p / (1 - p + f p), and every
    row still sums to 1. (Scaling the sink's column alone would change nothing: the sink adds no value.)

    Args:
        factor: 0 or more.
        layer, query, head, prompt: None for all; ``query`` in any form of ``tokens``.
    """
    number = finite(factor, "The factor of the sink")
    if number < 0:
        raise EditError("The sink's odds can't be negative.", expected="0 or more", got=factor)
    place = place_of("attn.pattern", layer, query, prompt, head=head)
    return Edit("scale_sink", place, (("factor", number),))
