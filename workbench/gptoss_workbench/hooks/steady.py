"""Captures and edits of decoding as operations that are the same for every token.

What differs between two steps lies in tensors: on which entries an edit acts (a mask), and with what (a value). So the
operations can be recorded once, as a CUDA graph, and played again for each token: another vector, scale, expert or
token is another filling of the same tensors (``hooks.feeding``), no other recording.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gptoss_workbench.hooks.sites import SITES

Place = tuple[str, "int | None"]


@dataclass(frozen=True)
class Op:
    """One edit in its steady form.

    Attributes:
        name: which of ``OPS``.
        site, layers: where it acts.
        by_expert: whether it acts on the slots in which certain experts serve.
        size: rows of the value of "project", experts of "force"; else 0.
    """

    name: str
    site: str
    layers: tuple[int | None, ...]
    by_expert: bool = False
    size: int = 0


@dataclass(frozen=True)
class Plan:
    """What is recorded. Two generations with equal plans can share a recording, one after the other.

    Attributes:
        ops: the edits that can still act, in their order.
        places: what is captured.
    """

    ops: tuple[Op, ...] = ()
    places: tuple[Place, ...] = ()


def _set(x: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    return torch.where(mask, value.to(x.dtype), x)


def _add(x: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    return torch.where(mask, (x.float() + value).to(x.dtype), x)


def _scale(x: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    return torch.where(mask, (x.float() * value).to(x.dtype), x)


def _divide(x: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    return torch.where(mask, (x.float() / value).to(x.dtype), x)


def _keep_norm(x: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    wide = (x + value.to(x.dtype)).float()
    ratio = x.float().norm(dim=-1, keepdim=True) / wide.norm(dim=-1, keepdim=True).clamp(min=torch.finfo().tiny)
    return torch.where(mask, (wide * ratio).to(x.dtype), x)


def _project(x: Tensor, mask: Tensor, basis: Tensor) -> Tensor:
    wide = x.float()
    return torch.where(mask, (wide - wide @ basis @ basis.T).to(x.dtype), x)


def _swap(x: Tensor, mask: Tensor, order: Tensor) -> Tensor:
    return x.gather(-1, order)


def _force(x: Tensor, mask: Tensor, experts: Tensor) -> Tensor:
    forced = (x[..., None] == experts).any(-1)
    others = x.gather(-1, forced.to(torch.int8).argsort(dim=-1, stable=True))[..., : x.shape[-1] - len(experts)]
    return torch.where(mask, torch.cat((experts.expand(*x.shape[:-1], -1), others), dim=-1), x)


OPS: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "set": _set, "add": _add, "scale": _scale, "divide": _divide, "keep_norm": _keep_norm, "project": _project,
    "swap": _swap, "force": _force,
}
"""(x, mask, value) -> x. The bits are those of the edits in ``changes``: float32 inside, rounded once."""


class Steady:
    """The tap of a step that is recorded, and the tensors that its operations read.

    Args:
        plan: what to do.
        batch: rows of the batch.
        sizes: see ``ModelConfig.dimensions``.
        dtype: the compute dtype.

    Attributes:
        masks: of each op, (batch, 1, the site's rest) bool.
        values: of each op and layer, float32 or int64; what it is stands at the op.
        wanted: of each op by expert, the experts in whose slots it acts, (expert,) bool.
        hits: of each op by expert, in how many slots it has acted so far, () int64.
        alive: (batch,) bool, the rows that count; the others have ended.
        held: what was captured in this pass, in the order of the forward pass.
        trouble: rows in this pass whose router has no choice left, () int64; None where no edit can bring that about.
    """

    def __init__(
        self, plan: Plan, batch: int, sizes: Mapping[str, int], dtype: torch.dtype, device: torch.device,
    ) -> None:
        self.plan, self.dtype, self._slots, self._experts = plan, dtype, sizes["slot"], sizes["expert"]
        self.masks: list[Tensor] = []
        self.values: dict[tuple[int, int | None], Tensor] = {}
        self.wanted: dict[int, Tensor] = {}
        self.hits: dict[int, Tensor] = {}
        self.alive = torch.ones(batch, dtype=torch.bool, device=device)
        self._at: dict[Place, list[int]] = {}
        self._places = frozenset(plan.places)
        for number, op in enumerate(plan.ops):
            shape = (batch, 1, *(sizes[dim] for dim in SITES[op.site].dims[1:]))
            whole = op.site == "router.experts" or op.name == "swap"
            self.masks.append(torch.zeros(shape, dtype=torch.bool, device=device))
            if op.by_expert:
                self.wanted[number] = torch.zeros(self._experts, dtype=torch.bool, device=device)
                self.hits[number] = torch.zeros((), dtype=torch.int64, device=device)
            for layer in op.layers:
                self._at.setdefault((op.site, layer), []).append(number)
                size = {"project": (shape[-1], op.size), "force": (op.size,)}.get(op.name, shape)
                self.values[number, layer] = torch.zeros(size, dtype=torch.int64 if whole else torch.float32,
                                                         device=device)
        self.begin()

    def begin(self) -> None:
        """Forget the pass before."""
        self.held: list[tuple[Place, Tensor]] = []
        self.trouble: Tensor | None = None
        self._routes: Tensor | None = None

    def watches(self, layer: int | None, *sites: str) -> bool:
        """Whether anything looks at one of these sites in this layer."""
        return any((site, layer) in self._at or (site, layer) in self._places for site in sites)

    def __call__(self, site: str, layer: int | None, x: Tensor, start: int = 0) -> Tensor:
        """The tap: x (prompt, 1, the site's rest) in, the same or an edited copy out."""
        numbers = self._at.get((site, layer), ())
        for number in numbers:
            x = self._act(number, layer, x)
        if numbers:
            self._check(site, x)
        if site == "router.experts":
            self._routes = x
        if (site, layer) in self._places:
            self.held.append(((site, layer), x))
        return x

    def _act(self, number: int, layer: int | None, x: Tensor) -> Tensor:
        mask = self.masks[number]
        if number in self.wanted:
            assert self._routes is not None
            serves = self.wanted[number][self._routes]  # (prompt, 1, slot)
            rest = mask.shape[3:]
            mask = mask & serves.view(*serves.shape, *(1,) * len(rest))
            acts = mask.flatten(3).any(-1) if rest else mask
            self.hits[number] += (acts & self.alive[:, None, None]).sum()
        return OPS[self.plan.ops[number].name](x, mask, self.values[number, layer])

    def _check(self, site: str, x: Tensor) -> None:
        """Count the rows that the plain edits would refuse."""
        if site == "router.logits":
            wrong = (x > -math.inf).sum(-1)[:, 0] < self._slots
        elif site == "router.experts":
            wrong = ((x < 0) | (x >= self._experts)).flatten(1).any(-1)
        else:
            return
        count = (wrong & self.alive).sum()
        self.trouble = count if self.trouble is None else self.trouble + count
