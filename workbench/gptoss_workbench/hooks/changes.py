"""What each edit does to the values it selected: a table from the edit's name to a function of them.

Every function is ``(x, at, **args)``: x holds the selected values of one prompt, (selected tokens, selected rest of the
site's dimensions); ``at`` says where that is; the rest are the edit's arguments. It returns what is put there, which
must broadcast to x. Where slots are selected by expert, the first dimension of x counts the slots that were hit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gptoss_workbench.errors import EditError
from gptoss_workbench.hooks.prompts import FOREVER
from gptoss_workbench.hooks.selection import Frozen, Slice
from gptoss_workbench.hooks.values import Held, Source

if TYPE_CHECKING:
    from gptoss_workbench.hooks.sae import SAE


@dataclass(frozen=True)
class At:
    """Where values were selected.

    Attributes:
        site, layer: the place.
        positions: the token of each row of x.
        order: which of all the selected tokens of the prompt each row is, counted from 0.
        count: how many are selected in the whole prompt; None while that is open.
        dims: the site's dimensions after the token's.
        selected: the selected indices of those dimensions that were selected.
        experts: who serves in each row, when slots were selected by expert.
        recall: values of this pass by position, for a patch from another token.
    """

    site: str
    layer: int | None
    positions: Sequence[int]
    order: Sequence[int]
    count: int | None
    dims: tuple[str, ...]
    selected: Mapping[str, Sequence[int]]
    experts: Sequence[int] | None = None
    recall: Mapping[int, Tensor] = field(default_factory=dict)


def _given(value: Any, x: Tensor, at: At) -> Tensor | float:
    """A given value in the form that broadcasts to x. A row for each selected token is cut to the rows of x."""
    if not isinstance(value, Held):
        return value
    tensor = value.tensor.to(device=x.device, dtype=x.dtype)
    rows, rest = len(tensor), math.prod(x.shape[1:])
    if at.experts is not None:
        return tensor
    if rows * rest == tensor.numel():
        tensor = tensor.reshape(rows, *x.shape[1:])
    if tensor.dim() == x.dim() and rows > 1:
        if (at.count is not None and rows != at.count) or max(at.order) >= rows:
            raise EditError(
                f"The value of an edit does not fit {at.site!r}.",
                expected=f"one row, or one for each of {at.count or max(at.order) + 1} selected tokens",
                got=f"{rows} rows in {tuple(value.tensor.shape)}",
            )
        return tensor[list(at.order)]
    return tensor


def _set(x: Tensor, at: At, value: Any) -> Tensor | float:
    return _given(value, x, at)


def _add(x: Tensor, at: At, value: Any) -> Tensor:
    return x + _given(value, x, at)


def _scale(x: Tensor, at: At, value: Any) -> Tensor:
    return x * _given(value, x, at)


def _zero(x: Tensor, at: At) -> float:
    return 0.0


def _minus_infinity(x: Tensor, at: At) -> float:
    return -math.inf


def _noise(x: Tensor, at: At, scale: float, seed: int) -> Tensor:
    draws = [np.random.default_rng([seed, at.layer or 0, position]).standard_normal(x.shape[1:], dtype=np.float32)
             for position in at.positions]
    return x + scale * torch.from_numpy(np.stack(draws)).to(x)


def _apply(x: Tensor, at: At, change: Callable[[Tensor], Tensor]) -> Tensor:
    return change(x)


def _steer(x: Tensor, at: At, vector: Held, scale: float, keep_norm: bool = False) -> Tensor:
    moved = x + scale * vector.tensor.to(x)
    if not keep_norm:
        return moved
    wide = moved.float()
    ratio = x.float().norm(dim=-1, keepdim=True) / wide.norm(dim=-1, keepdim=True).clamp(min=torch.finfo().tiny)
    return (wide * ratio).to(x.dtype)


def _project(x: Tensor, at: At, directions: Held) -> Tensor:
    rows = directions.tensor.double().view(-1, directions.tensor.shape[-1])
    basis = torch.linalg.qr(rows.T)[0].to(device=x.device, dtype=torch.float32)  # (d, direction), orthonormal
    wide = x.float()
    return (wide - wide @ basis @ basis.T).to(x.dtype)


def _steer_features(
    x: Tensor, at: At, sae: SAE, features: tuple[int, ...], keep_error: bool = True, **change: float,
) -> Tensor:
    ((how, value),) = change.items()
    return sae.changed(x, features, how, value, keep_error)


def _mean(x: Tensor, at: At, run: Source) -> Tensor:
    return _cut(run.at(at.layer)[None], at, run).to(x)


def _patch(x: Tensor, at: At, run: Source | Held | float | None, source: Frozen = None) -> Tensor | float:
    if isinstance(run, Held | int | float):
        return _given(run, x, at)
    wanted = _positions(source, at)
    if run is None:
        late = [position for position in wanted if position not in at.recall]
        if late:
            raise EditError(f"A patch at {at.site!r} takes a token that was not read yet.",
                            expected="tokens read in an earlier chunk or the same one", got=f"token {late[0]}",
                            hint="Leave out chunk=, or patch from an earlier token.")
        return _cut(torch.stack([at.recall[position] for position in wanted]), at, None).to(x)
    held = run.at(at.layer)
    rows = run.rows(wanted)
    if None in rows:
        raise EditError(
            f"The run to patch from has no value for every token at {at.site!r}.",
            expected=f"positions {min(wanted)} to {max(wanted)}",
            got=f"{len(run.positions)} captured tokens, without {wanted[rows.index(None)]}",
            hint="Select tokens that both runs have, or pass source=.",
        )
    chosen = held[rows]
    if at.experts is None:
        return _cut(chosen, at, run).to(x)
    slots = _slots(run.experts_at(at.layer)[rows].tolist(), at, wanted)
    hits = chosen[range(len(slots)), slots]  # (hit, rest without slot)
    return _cut(hits, at, run, at.dims[1:]).to(x)


def _positions(source: Frozen, at: At) -> list[int]:
    """The position to take for each row."""
    if source is None:
        return list(at.positions)
    if isinstance(source, int):
        return [source] * len(at.positions)
    open_end = isinstance(source, Slice) and source.stop is None
    indices = source.of(FOREVER) if isinstance(source, Slice) else source
    assert isinstance(indices, range | tuple)
    if (at.count is not None and not open_end and len(indices) != at.count) or max(at.order) >= len(indices):
        raise EditError(
            "source= names another number of tokens than tokens=.", got=f"{len(indices)} positions",
            expected=f"one position, or one for each of {at.count or max(at.order) + 1} selected tokens",
        )
    return [indices[number] for number in at.order]


def _slots(served: Sequence[Sequence[int]], at: At, wanted: Sequence[int]) -> list[int]:
    """The slot in which each row's expert served the other run."""
    assert at.experts is not None
    for row, expert, position in zip(served, at.experts, wanted, strict=True):
        if expert not in row:
            raise EditError(f"Expert {expert} did not serve token {position} in the run to patch from.",
                            expected=f"one of its experts there: {list(row)}", got=expert,
                            hint="Put wb.replay_routes(that run) before the patch.")
    return [row.index(expert) for row, expert in zip(served, at.experts, strict=True)]


def _cut(values: Tensor, at: At, run: Source | None, dims: tuple[str, ...] | None = None) -> Tensor:
    """Cut the selected indices of further dimensions out of values (row, rest of the site's dimensions)."""
    parts = dict(run.parts) if run is not None else {}
    for axis, dim in enumerate(at.dims if dims is None else dims, 1):
        there = list(parts.get(dim, range(values.shape[axis])))
        wanted = at.selected.get(dim)
        if wanted is None and dim not in parts:
            continue
        missing = sorted({*(wanted if wanted is not None else ())} - {*there})
        if missing or wanted is None:
            raise EditError(f"The other run did not keep every {dim} of {at.site!r}.",
                            expected=f"{dim} {missing}" if missing else f"all of them, or {dim}={there} in the edit",
                            got=f"{dim} {there}", hint=f"Capture it there without {dim}s=.")
        index = [there.index(item) for item in wanted]
        values = values.index_select(axis, torch.tensor(index, device=values.device))
    return values


def _force(x: Tensor, at: At, experts: tuple[int, ...]) -> Tensor:
    slots = x.shape[-1]
    if len(experts) > slots:
        raise EditError("More experts are forced than a token has slots.", expected=f"at most {slots}",
                        got=f"{len(experts)}: {list(experts)}")
    must = torch.tensor(experts, device=x.device)
    others_first = torch.isin(x, must).to(torch.int8).argsort(dim=-1, stable=True)
    others = x.gather(-1, others_first)[:, : slots - len(experts)]
    return torch.cat((must.expand(len(x), -1), others), dim=-1)


def _swap(x: Tensor, at: At) -> Tensor:
    return x.flip(-1)


def _replay(x: Tensor, at: At, run: Source) -> Tensor:
    routes = run.at(at.layer).to(x)
    if x.shape[1:] != routes.shape[1:]:
        raise EditError("The routes are of a model with another number of slots.", expected=f"{x.shape[1]} slots",
                        got=f"{routes.shape[1]} slots")
    rows = run.rows(at.positions)
    known = [number for number, row in enumerate(rows) if row is not None]
    out = x.clone()
    out[known] = routes[[row for row in rows if row is not None]]
    return out


def _temper(x: Tensor, at: At, temperature: float) -> Tensor:
    return x / temperature


def _pin(x: Tensor, at: At, pattern: Source | Held) -> Tensor:
    """x (query, head, key + 1)."""
    if isinstance(pattern, Source):
        rows = pattern.rows(at.positions)
        if None in rows:
            raise EditError("The pattern to pin has no row for every query.", expected=f"query {at.positions}"[:80],
                            got=f"{len(pattern.positions)} captured queries")
        given = _cut(pattern.at(at.layer).transpose(0, 1)[rows], at, pattern)
    else:
        given = pattern.tensor
        given = given.view((1,) * (3 - given.dim()) + given.shape).transpose(0, 1)
        if len(given) > 1:
            if (at.count is not None and len(given) != at.count) or max(at.order) >= len(given):
                raise EditError("The pattern to pin has another number of queries.", got=f"{len(given)} queries",
                                expected=f"one, or {at.count or max(at.order) + 1}")
            given = given[list(at.order)]
    keys = x.shape[-1] - 1
    given = given.to(x)
    body, sink = given[..., :-1], given[..., -1:]
    blank = body.new_zeros((*body.shape[:-1], max(0, keys - body.shape[-1])))
    return torch.cat((body[..., :keys], blank, sink), dim=-1)


def _scale_sink(x: Tensor, at: At, factor: float) -> Tensor:
    if factor == 1:
        return x  # an identity is exact
    odds = x.float()
    odds = torch.cat((odds[..., :-1], odds[..., -1:] * factor), dim=-1)
    return (odds / odds.sum(-1, keepdim=True).clamp(min=torch.finfo().tiny)).to(x.dtype)


@dataclass(frozen=True)
class Kind:
    """How one edit acts and prints.

    Attributes:
        change: what it does to the selected values.
        site: the site it always acts at; None when the caller names one.
        args: the names that it may have in ``Edit.args``.
        positional: those of them that are written without their name.
        renamed: what its public function calls a selection.
        optional: those of ``args`` that may be missing.
        own_place: whether its first argument says the site and the layer, so that they are not written.
    """

    change: Callable[..., Tensor | float]
    site: str | None = None
    args: tuple[str, ...] = ()
    positional: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    own_place: bool = False

    @property
    def required(self) -> tuple[str, ...]:
        return tuple(name for name in self.args if name not in self.optional)


_EXPERTS = {"expert": "experts"}
_QUERY = {"tokens": "query"}

KINDS: dict[str, Kind] = {
    "set": Kind(_set, None, ("value",), ("value",)),
    "add": Kind(_add, None, ("value",), ("value",)),
    "scale": Kind(_scale, None, ("value",), ("value",)),
    "zero": Kind(_zero),
    "noise": Kind(_noise, None, ("scale", "seed"), ("scale",)),
    "apply": Kind(_apply, None, ("change",), ("change",)),
    "steer": Kind(_steer, None, ("vector", "scale", "keep_norm"), optional=("keep_norm",)),
    "project": Kind(_project, None, ("directions",), ("directions",)),
    "steer_features": Kind(_steer_features, None, ("sae", "features", "scale", "add", "set", "keep_error"),
                           ("sae", "features"), optional=("scale", "add", "set", "keep_error"), own_place=True),
    "mean": Kind(_mean, None, ("run",), ("run",)),
    "patch": Kind(_patch, None, ("run", "source"), ("run",), optional=("source",)),
    "cut_attention": Kind(_minus_infinity, "attn.scores", renamed=_QUERY),
    "pin_attention": Kind(_pin, "attn.pattern", ("pattern",), ("pattern",), _QUERY),
    "scale_sink": Kind(_scale_sink, "attn.pattern", ("factor",), ("factor",), _QUERY),
    "silence_experts": Kind(_zero, "router.weights", renamed=_EXPERTS),
    "ban_experts": Kind(_minus_infinity, "router.logits", renamed=_EXPERTS),
    "force_experts": Kind(_force, "router.experts", ("experts",)),
    "swap_experts": Kind(_swap, "router.logits", renamed=_EXPERTS),
    "router_temperature": Kind(_temper, "router.logits", ("temperature",), ("temperature",)),
    "replay_routes": Kind(_replay, "router.experts", ("run",), ("run",)),
}
