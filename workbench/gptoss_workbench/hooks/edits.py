"""Edits: values that say what to change while the model runs. They are passed to a call and installed nowhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from gptoss_workbench.errors import EditError, SiteError
from gptoss_workbench.hooks import sites
from gptoss_workbench.hooks.selection import Indices, freeze

Frozen = int | slice | tuple[int, ...] | None
SINK = "sink"


class Captured(Protocol):
    """What an edit needs of a run: the tensors it kept."""

    def tensor(self, site: str, layer: int | None = None) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Place:
    """Where an edit acts: a site, and selections along its dimensions. None means all.

    ``dims`` holds selections of the dimensions that are neither prompt, layer nor token, by name.
    """

    site: str
    layer: Frozen = None
    tokens: Frozen = None
    prompt: Frozen = None
    dims: tuple[tuple[str, int | slice | tuple[int | str, ...] | str], ...] = ()

    def __str__(self) -> str:
        parts = [f"{name}={value!r}" for name, value in
                 (("layer", self.layer), ("tokens", self.tokens), ("prompt", self.prompt), *self.dims)
                 if value is not None]
        return ", ".join((repr(self.site), *parts))


@dataclass(frozen=True, eq=False)
class Edit:
    """One change at one place.

    Attributes:
        name: the public function that made it, for printing.
        place: where it acts.
        change: maps (selected values, layer, token positions) to new values. The selected values have shape
            (place, ...): first one row for every selected (prompt, token), then the selected part of each further
            dimension of the site. The result must broadcast to that shape.
        value: what was given, for printing.
    """

    name: str
    place: Place
    change: Callable[[Tensor, int | None, Tensor], Tensor | float]
    value: object = field(default=None)

    def __repr__(self) -> str:
        if self.value is None:
            return f"{self.name}({self.place})"
        shown = f"<{'x'.join(map(str, self.value.shape))}>" if isinstance(self.value, Tensor) else repr(self.value)
        return f"{self.name}({self.place}, {shown})"


def place_of(site: str, layer: Indices, tokens: Indices, prompt: Indices, **dims: object) -> Place:
    """A checked place. Raises SiteError for a site or a dimension that does not exist."""
    spec = sites.site(site)
    if layer is not None and not spec.per_layer:
        raise SiteError(f"The site {site!r} has no layers.", expected="no layer=", got=f"layer={layer!r}")
    chosen = []
    for name, selection in dims.items():
        if selection is None:
            continue
        if name not in spec.dims:
            raise SiteError(
                f"The site {site!r} has no dimension {name!r}.", expected=", ".join(spec.dims), got=name,
                hint="Select along the site's own dimensions.",
            )
        chosen.append((name, _with_sink(selection) if name == "key" else freeze(selection)))  # type: ignore[arg-type]
    return Place(site, freeze(layer), freeze(tokens), freeze(prompt), tuple(chosen))


def _with_sink(selection: object) -> int | slice | tuple[int | str, ...] | str | None:
    """A selection of keys may name the sink, alone or among positions."""
    if selection == SINK:
        return SINK
    if isinstance(selection, list | tuple) and SINK in selection:
        rest = freeze([item for item in selection if item != SINK])
        return (*rest, SINK) if isinstance(rest, tuple) else SINK
    return freeze(selection)  # type: ignore[arg-type]


def _value_for(value: Tensor | Sequence[float] | float, x: Tensor) -> Tensor | float:
    """A given value in the form that broadcasts to the selected values x."""
    if isinstance(value, int | float):
        return value
    value = torch.as_tensor(value).to(device=x.device, dtype=x.dtype)
    if value.numel() == x.numel():
        return value.reshape(x.shape)
    return value


def _at(
    name: str, site: str, value: Tensor | Sequence[float] | float,
    combine: Callable[[Tensor, Tensor | float], Tensor | float],
    layer: Indices, tokens: Indices, prompt: Indices, dims: dict[str, object],
) -> Edit:
    def change(x: Tensor, layer: int | None, positions: Tensor) -> Tensor | float:
        return combine(x, _value_for(value, x))

    return Edit(name, place_of(site, layer, tokens, prompt, **dims), change, value)


def set(
    site: str, value: Tensor | Sequence[float] | float, *, layer: Indices = None, tokens: Indices = None,
    prompt: Indices = None, **dims: object,
) -> Edit:
    """Put ``value`` there.

    Args:
        site: e.g. ``"resid_post"``; ``wb.SITES`` lists them with their dimensions.
        value: a number, or a tensor that broadcasts to (selected tokens, selected rest of the site's dimensions).
        layer, tokens: an index, a list, a slice, or None for all; negative tokens count from the end of the prompt.
        prompt: which rows of a batch.
        dims: selections along the site's further dimensions by name, e.g. ``head=3``, ``expert=[0, 5]``,
            ``key="sink"``.

    Raises:
        SiteError: the site or the dimension does not exist.
    """
    return _at("set", site, value, lambda x, v: v, layer, tokens, prompt, dims)


def add(
    site: str, value: Tensor | Sequence[float] | float, *, layer: Indices = None, tokens: Indices = None,
    prompt: Indices = None, **dims: object,
) -> Edit:
    """Add ``value`` there. Arguments as for ``set``; e.g. ``wb.add("router.logits", 100.0, layer=1, expert=0)``."""
    return _at("add", site, value, lambda x, v: x + v, layer, tokens, prompt, dims)


def scale(
    site: str, value: Tensor | Sequence[float] | float, *, layer: Indices = None, tokens: Indices = None,
    prompt: Indices = None, **dims: object,
) -> Edit:
    """Multiply by ``value``. Arguments as for ``set``."""
    return _at("scale", site, value, lambda x, v: x * v, layer, tokens, prompt, dims)


def zero(site: str, *, layer: Indices = None, tokens: Indices = None, prompt: Indices = None, **dims: object) -> Edit:
    """Put zeros there. Arguments as for ``set``."""
    return Edit("zero", place_of(site, layer, tokens, prompt, **dims), lambda x, layer, positions: 0.0)


def apply(
    site: str, change: Callable[[Tensor], Tensor], *, layer: Indices = None, tokens: Indices = None,
    prompt: Indices = None, **dims: object,
) -> Edit:
    """Put ``change(x)`` there, x being the selected values, (selected tokens, ...). Arguments as for ``set``."""
    if not callable(change):
        raise EditError("wb.apply needs a function.", expected="a function of one tensor", got=type(change).__name__)
    name = getattr(change, "__name__", type(change).__name__)
    return Edit("apply", place_of(site, layer, tokens, prompt, **dims), lambda x, layer, positions: change(x), name)


def steer(
    site: str, *, layer: Indices, vector: Tensor | Sequence[float], scale: float = 1.0, tokens: Indices = None,
    prompt: Indices = None,
) -> Edit:
    """Add ``scale * vector`` (d_model,) to the residual stream at the chosen layers and tokens."""
    direction = torch.as_tensor(vector)
    return Edit("steer", place_of(site, layer, tokens, prompt),
                lambda x, layer, positions: x + scale * direction.to(x), direction)


def mean(
    site: str, run: Captured, *, layer: Indices = None, tokens: Indices = None, prompt: Indices = None,
    **dims: object,
) -> Edit:
    """Put the mean of another run there, taken over all its tokens (mean ablation).

    Args:
        run: captured ``site`` at the layers that are edited, one prompt.
        layer, tokens, prompt: as for ``set``.
    """
    place = place_of(site, layer, tokens, prompt, **dims)
    if sites.site(site).token_dim != "token":
        raise EditError(f"wb.mean has no meaning at {site!r}.", expected="a site with a token dimension",
                        got="an attention map", hint="wb.set pins a pattern of your own.")

    def change(x: Tensor, layer: int | None, positions: Tensor) -> Tensor:
        average = run.tensor(site, layer).float().mean(0, keepdim=True)
        return _sub(average, place).to(x)

    return Edit("mean", place, change)


def patch(
    site: str, run: Captured, *, layer: Indices = None, tokens: Indices = None, prompt: Indices = None,
    source: Indices = None, **dims: object,
) -> Edit:
    """Put there what another run had at the same place (activation patching).

    Args:
        run: captured ``site`` at the layers that are edited; one prompt, all its tokens.
        layer, tokens, prompt: as for ``set``.
        source: positions in ``run`` to take instead of the same ones, one for each of ``tokens``, in ascending
            order of ``tokens``.

    Raises:
        EditError: while running, when ``run`` has no such layer or position.
    """
    place = place_of(site, layer, tokens, prompt, **dims)
    taken = freeze(source)
    if "key" in sites.site(site).dims:
        raise EditError("Attention maps of two runs have different keys.", expected="a site without keys", got=site,
                        hint='Pin a pattern with wb.set("attn.pattern", value, ...) instead.')

    def change(x: Tensor, layer: int | None, positions: Tensor) -> Tensor:
        held = run.tensor(site, layer)
        wanted = positions
        if taken is not None:
            indices = list(range(len(held)))[taken] if isinstance(taken, slice) else taken
            wanted = torch.tensor([indices] if isinstance(indices, int) else list(indices), device=held.device)
        if len(wanted) != len(positions) or int(wanted.max()) >= len(held):
            raise EditError(
                f"The run to patch from has no value for every token at {site!r}.",
                expected=f"{len(positions)} positions up to {int(wanted.max())}",
                got=f"a run of {len(held)} tokens, {len(wanted)} positions chosen",
                hint="Select tokens that both prompts have, or pass source=.",
            )
        return _sub(held[wanted.to(held.device)], place).to(x)

    return Edit("patch", place, change)


def _sub(values: Tensor, place: Place) -> Tensor:
    """Cut the place's further dimensions out of values (rows, rest of the site's dimensions)."""
    rest = [dim for dim in sites.site(place.site).dims if dim != "token"]
    for name, selection in place.dims:
        axis = rest.index(name) + 1
        indices = list(range(values.shape[axis]))[selection] if isinstance(selection, slice) else selection
        indices = [indices] if isinstance(indices, int) else list(indices)  # type: ignore[arg-type]
        values = values.index_select(axis, torch.tensor(indices, device=values.device) % values.shape[axis])
    return values
