"""What a run should keep."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gptoss_workbench.errors import SiteError
from gptoss_workbench.hooks import sites
from gptoss_workbench.hooks.selection import Indices, freeze


@dataclass(frozen=True)
class Capture:
    """Sites to keep, and for which layers and tokens. Make one with ``wb.capture(...)``.

    Attributes:
        sites: in the order of the forward pass; empty for nothing.
        layers: None for every layer.
        tokens: positions in the prompt (queries of attention maps), None for all.
    """

    sites: tuple[str, ...] = ()
    layers: int | slice | tuple[int, ...] | None = None
    tokens: int | slice | tuple[int, ...] | None = None


def capture(names: str | Iterable[str], layers: Indices = None, tokens: Indices = None) -> Capture:
    """Keep these sites, e.g. ``wb.capture(["resid_post", "router"], layers=[2, 3], tokens=-1)``.

    Args:
        names: one or more site names or groups (``router``, ``resid``, ``expert``).
        layers: which layers; None for all.
        tokens: which positions; negative ones count from the end of the prompt.

    Raises:
        SiteError: a name that is no site, or a selection of the wrong type.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    return Capture(sites.expand(names), freeze(layers), freeze(tokens))


def as_capture(value: Capture | str | Iterable[str] | None) -> Capture:
    """Whatever a person passes as ``capture=``."""
    if value is None:
        return Capture()
    if isinstance(value, Capture):
        return value
    try:
        return capture(value)
    except TypeError:
        raise SiteError(
            "capture= takes site names or wb.capture(...).", expected="a name or a list of names",
            got=f"{type(value).__name__}", hint="wb.SITES lists every site.",
        ) from None
