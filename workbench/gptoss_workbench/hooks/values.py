"""What edits hold: tensors that compare and hash by content, and what was taken from other runs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gptoss_workbench.errors import EditError, SiteError

_WRITTEN_OUT = 8  # numbers; a longer tensor prints as shape and digest


class Captured(Protocol):
    """What an edit needs of a run: the tensors it kept. A run also says which layers, positions and parts they are."""

    def tensor(self, site: str, layer: int | None = None) -> Tensor: ...


class Held:
    """A tensor as a value: equal when dtype, shape and bytes are. Nothing writes into it.

    Attributes:
        tensor: as given; a copy, unless it was taken from a run.
    """

    __slots__ = ("_digest", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()
        self._digest: str | None = None

    @property
    def digest(self) -> str:
        """sha256 of dtype, shape and bytes, in hexadecimal."""
        if self._digest is None:
            shape = f"{dtype_name(self.tensor)} {tuple(self.tensor.shape)} "
            self._digest = hashlib.sha256(shape.encode() + raw_bytes(self.tensor)).hexdigest()
        return self._digest

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Held):
            return NotImplemented
        return self.tensor is other.tensor or (self.tensor.shape == other.tensor.shape
                                               and self.digest == other.digest)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        small = self.tensor.numel() <= _WRITTEN_OUT and self.tensor.dtype in (torch.float32, torch.int64)
        if small and bool(torch.isfinite(self.tensor).all()):
            return repr(self.tensor.tolist())
        shape = "x".join(map(str, self.tensor.shape))
        return f"<{dtype_name(self.tensor)} {shape} {self.digest[:8]}>"


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def raw_bytes(tensor: Tensor) -> bytes:
    """The bytes in row-major order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def value_of(value: Any, what: str = "value") -> float | int | Held:
    """A number or a tensor as a value that can't change.

    Raises:
        EditError: it is neither, nor anything that torch makes a tensor of.
    """
    if isinstance(value, Held | int | float) and not isinstance(value, bool):
        return value
    try:
        labelled = hasattr(value, "__array__") and not isinstance(value, Tensor)  # a DataArray is an array too
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value) if labelled else value)
        if tensor.dtype == torch.bool or tensor.is_complex():
            raise TypeError
    except (TypeError, ValueError, RuntimeError):
        raise EditError(f"The {what} of an edit must be numbers.", expected="a number, a tensor, an array or a list",
                        got=f"{value!r:.80} ({type(value).__name__})") from None
    if isinstance(value, Sequence | np.ndarray) and tensor.dtype == torch.float64:
        tensor = tensor.float()  # Python's and NumPy's default, which no model computes in
    return tensor.item() if tensor.dim() == 0 else Held(tensor.detach().clone())


def finite(value: Any, what: str) -> float:
    """A finite number, or EditError."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not math.isfinite(value):
        raise EditError(f"{what} must be a finite number.", expected="a finite number", got=repr(value)[:80])
    return float(value)


@dataclass(frozen=True)
class Source:
    """What was taken from another run at one site.

    Attributes:
        site: the site.
        values: (layer, tensor without prompt dimension) pairs. They are the run's own tensors, not copies.
        positions: which tokens the tensors are of, in order.
        parts: the dimensions of which only some indices were captured, with these indices.
        experts: who served in each slot, by layer; where an edit needs it.
        ids, edits: prompt and edits of that run, for the record.
    """

    site: str
    values: tuple[tuple[int | None, Held], ...]
    positions: range | tuple[int, ...]
    parts: tuple[tuple[str, tuple[int, ...]], ...] = ()
    experts: tuple[tuple[int | None, Held], ...] = ()
    ids: tuple[int, ...] = field(default=(), compare=False)
    edits: tuple[object, ...] = field(default=(), compare=False)

    def __repr__(self) -> str:
        digest = hashlib.sha256("".join(held.digest for _, held in self.values).encode()).hexdigest()
        what = f"run of {len(self.positions)} tokens" if self.positions else "mean"
        layers = [layer for layer, _ in self.values if layer is not None]
        return f"<{what}: {self.site}{f' at layers {layers}' if layers else ''} {digest[:8]}>"

    def at(self, layer: int | None) -> Tensor:
        """The tensor of a layer.

        Raises:
            EditError: that layer was not captured.
        """
        return self._of(self.values, layer)

    def experts_at(self, layer: int | None) -> Tensor:
        """(token, slot) int64: who served there."""
        return self._of(self.experts, layer)

    def _of(self, pairs: tuple[tuple[int | None, Held], ...], layer: int | None) -> Tensor:
        for number, held in pairs:
            if number == layer:
                return held.tensor
        raise EditError(f"The other run holds no {self.site!r} of layer {layer}.",
                        expected=f"one of {[number for number, _ in pairs]}", got=f"layer {layer}",
                        hint="Capture more layers there, or choose fewer here.")

    def rows(self, positions: Sequence[int]) -> list[int | None]:
        """Where each position stands in the tensors; None for one that was not captured."""
        at = {position: row for row, position in enumerate(self.positions)}
        return [at.get(position) for position in positions]


def source_of(run: Captured, site: str, layer: object, *, by_expert: bool = False) -> Source:
    """Take a site from a run, at the layers that an edit acts on.

    Args:
        layer: the frozen selection of layers; layers named by number are taken alone.
        by_expert: take along who served in each slot.

    Raises:
        SiteError: the run did not keep the site, or not at a layer that was named.
        EditError: it kept the site by expert, or is no run at all.
    """
    if not hasattr(run, "tensor"):
        raise EditError("That is no run.", expected="what model.run or gen.run() gives", got=type(run).__name__)
    layout = getattr(run, "layout", None)
    if layout is not None and "expert" in layout.dims.get(site, ()) and site != "router.logits":
        raise EditError(f"The other run kept {site!r} by expert, not by slot.",
                        expected="a capture without experts=", got=f"experts={list(layout.coords['expert'])}")
    numbers = _layers(run, site, layer)
    values = tuple((number, Held(run.tensor(site, number))) for number in numbers)
    experts = tuple((number, Held(run.tensor("router.experts", number))) for number in numbers) if by_expert else ()
    count = values[0][1].tensor.shape[1 if "attn.pattern" in site or "attn.scores" in site else 0]
    given = getattr(run, "positions", range(count))
    positions = tuple(given)
    if positions and positions == tuple(range(positions[0], positions[0] + len(positions))):
        positions = range(positions[0], positions[0] + len(positions))
    parts = () if layout is None else tuple(
        (dim, tuple(layout.coords[dim])) for dim in ("head", "kv_head", "expert")
        if dim in layout.coords and dim in layout.dims.get(site, ()))
    return Source(site, values, positions, parts, experts,
                  tuple(getattr(run, "ids", ())), tuple(getattr(run, "edits", ())))


def _layers(run: Captured, site: str, layer: object) -> list[int | None]:
    from gptoss_workbench.hooks.sites import SITES

    if not SITES[site].per_layer:
        return [None]
    named = (layer,) if isinstance(layer, int) else layer
    if isinstance(named, tuple) and named and min(named) >= 0:
        return list(dict.fromkeys(named))
    kept: list[int | None] = list(run.layers(site))  # type: ignore[attr-defined]
    if not kept:
        raise SiteError(f"The run holds no {site!r}.", expected=f"a run that captured {site}", got=repr(run)[:120],
                        hint=f'Run again with capture=["{site}"].')
    return kept
