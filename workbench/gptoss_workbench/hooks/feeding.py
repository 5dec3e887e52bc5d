"""From edits and captures as a person writes them to their steady form: what can have one, and what fills its tensors.

A value is found by letting the plain edit act on a tensor of zeros (ones for a product), a mask by letting it put a
one there. So a selection, a broadcast and an error mean here what they mean everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from gptoss_workbench.errors import EditError
from gptoss_workbench.hooks.acting import Editor
from gptoss_workbench.hooks.chunk import Chunk
from gptoss_workbench.hooks.edits import Edit
from gptoss_workbench.hooks.keeping import Keeper, Part
from gptoss_workbench.hooks.prompts import Prompts
from gptoss_workbench.hooks.selection import Frozen, Where, resolve
from gptoss_workbench.hooks.sites import SITES
from gptoss_workbench.hooks.steady import Op, Place, Plan, Steady
from gptoss_workbench.hooks.values import Held, Source


class _Form(NamedTuple):
    op: str
    start: float = 0.0  # of the tensor that the plain edit acts on when its value is looked for


_FORMS: Mapping[str, _Form] = {
    "set": _Form("set"), "zero": _Form("set", 1.0), "mean": _Form("set"), "patch": _Form("set"),
    "silence_experts": _Form("set", 1.0), "ban_experts": _Form("set"), "replay_routes": _Form("set"),
    "add": _Form("add"), "noise": _Form("add"), "steer": _Form("add"), "scale": _Form("scale", 1.0),
    "router_temperature": _Form("divide"), "project": _Form("project"), "swap_experts": _Form("swap"),
    "force_experts": _Form("force"),
}
"""The edits that have a steady form. ``apply`` holds a function that may do anything; attention maps grow."""


def why_not(edits: Sequence[Edit], prompts: Prompts, rows: Sequence[int], firsts: Sequence[int]) -> str | None:
    """Why these edits can't be recorded, None when they can.

    Args:
        rows, firsts: the prompts that go on, and the position from which on each does.
    """
    for edit in edits:
        if not _may_act(edit, prompts, rows, firsts):
            continue
        args = dict(edit.args)
        if edit.name == "apply":
            return f"{edit!r:.100} holds a function of your own"
        if "key" in SITES[edit.place.site].dims:
            return f"{edit!r:.100} changes an attention map, which grows with every token"
        if edit.name not in _FORMS:
            return f"{edit!r:.100} has no steady form"
        if edit.name == "patch" and (args["run"] is None or edit.place.by_expert):
            return f"{edit!r:.100} takes values that depend on this very pass"
        if edit.place.by_expert and isinstance(args.get("value"), Held) and \
                args["value"].tensor.dim() >= len(SITES[edit.place.site].dims) - 1:
            return f"{edit!r:.100} has a value for each slot that is hit"
    return None


def _may_act(edit: Edit, prompts: Prompts, rows: Sequence[int], firsts: Sequence[int]) -> bool:
    """Whether an edit can act on a token from these positions on."""
    of = resolve(edit.place.prompt, len(prompts), "prompt")
    if isinstance(edit.place.tokens, Where):
        return any(row in of for row in rows)
    for row, first in zip(rows, firsts, strict=True):
        chosen = prompts.chosen(edit.place.tokens, row)
        if row in of and (chosen.stop if isinstance(chosen, range) else max(chosen, default=-1) + 1) > first:
            return True
    return False


class Feed:
    """The edits and captures of one generation, in their steady form, from some token on.

    Args:
        edits, keeper, prompts, sizes: of the generation's taps.
        kept: the places that are captured.
        pooled: the statistics of the attention that are captured, by layer.
        fired: counts of the plain edits, which are counted on here.
        layers: (site, selection) -> layers.
        rows, firsts: the prompts in the order of the batch, and the position from which on each goes on.

    Attributes:
        plan: what is to be recorded.
    """

    def __init__(
        self, edits: Sequence[Edit], keeper: Keeper, prompts: Prompts, sizes: Mapping[str, int],
        kept: Collection[Place], pooled: Mapping[int | None, Sequence[str]], fired: list[int],
        layers: Callable[[str, Frozen], Sequence[int | None]], rows: Sequence[int], firsts: Sequence[int],
    ) -> None:
        self._keeper, self._prompts, self._sizes, self._fired = keeper, prompts, sizes, fired
        self._kept, self._pooled = frozenset(kept), pooled
        self.rows = list(rows)
        self._numbers = [number for number, edit in enumerate(edits) if _may_act(edit, prompts, rows, firsts)]
        self._edits = [edits[number] for number in self._numbers]
        self._of = [{*resolve(edit.place.prompt, len(prompts), "prompt")} for edit in self._edits]
        ops = tuple(_op(edit, layers(edit.place.site, edit.place.layer)) for edit in self._edits)
        routes = [("router.experts", layer) for _, layer in kept] if keeper.by_expert else []
        places = {*kept, *(("attn.pattern", layer) for layer in pooled), *routes}
        self.plan = Plan(ops, tuple(sorted(places, key=str)))
        self._steady: Steady | None = None
        self._acting: list[list[bool] | None] = [None] * len(ops)
        self._dims: list[Tensor] = []

    def attach(self, steady: Steady) -> None:
        """Fill the tensors of a recording of this plan, as far as they are the same for every token."""
        self._steady, self._acting = steady, [None] * len(self._edits)
        self._dims = [_selected(edit, steady.masks[number][:1], self._prompts, self._sizes)
                      for number, edit in enumerate(self._edits)]
        for hits in steady.hits.values():
            hits.zero_()
        chunk = Chunk(self.rows[:1], [0], 1, self._prompts)
        for number, edit in enumerate(self._edits):
            if edit.place.by_expert:
                wanted = resolve(dict(edit.place.dims)["expert"], self._sizes["expert"], "expert")
                steady.wanted[number].zero_()[wanted] = True
            if _constant(edit):
                everywhere = replace(edit, place=replace(edit.place, tokens=None, prompt=None))
                for layer in steady.plan.ops[number].layers:
                    steady.values[number, layer].copy_(self._value(everywhere, number, layer, chunk))

    def load(self, positions: Sequence[int], alive: Sequence[bool]) -> None:
        """Fill what changes from token to token.

        Args:
            positions: of the token that each row reads now.
            alive: which rows still count.
        """
        steady = self._steady
        assert steady is not None
        for number, edit in enumerate(self._edits):
            acting = []
            for i, (row, position) in enumerate(zip(self.rows, positions, strict=True)):
                chunk = Chunk([row], [position], 1, self._prompts)
                acts = alive[i] and row in self._of[number] and self._acts(edit, chunk)
                acting.append(acts)
                if acts and not _constant(edit):
                    for layer in steady.plan.ops[number].layers:
                        steady.values[number, layer][i].copy_(self._value(edit, number, layer, chunk)[0])
                if acts and not edit.place.by_expert:
                    self._fired[self._numbers[number]] += len(steady.plan.ops[number].layers)
            if acting != self._acting[number]:
                on = torch.tensor(acting, device=self._dims[number].device)
                steady.masks[number].copy_(self._dims[number] & on.view(-1, *(1,) * (self._dims[number].dim() - 1)))
                if edit.name == "swap_experts":
                    self._swap(number, on)
                self._acting[number] = acting

    def file(self, held: Sequence[tuple[Place, Tensor]], positions: Sequence[int], alive: Sequence[bool], keys: int
             ) -> list[Part]:
        """Captured tensors as (prompt, place, part), by the rules of the plain captures.

        Args:
            held: tensors of one step that nobody will write into, (prompt, the site's dimensions...).
            keys: columns that hold keys; attention maps are wider.
        """
        going = [i for i, one in enumerate(alive) if one]
        chunk = Chunk([self.rows[i] for i in going], [positions[i] for i in going], 1, self._prompts)
        found: list[Part] = []
        for (site, layer), x in held:
            spec = SITES[site]
            mine = x if len(going) == len(alive) else x[going]
            if "key" in spec.dims:
                mine = mine[..., :keys] if site == "attn.scores" else torch.cat((mine[..., :keys], mine[..., -1:]), -1)
            if site == "router.experts":
                chunk.routes = mine
            if (site, layer) in self._kept:
                found += self._keeper.keep(site, layer, mine, chunk, 0, ours=True)
            if site == "attn.pattern" and layer in self._pooled:
                found += self._keeper.pool(self._pooled[layer], layer, mine, chunk, 0)
        return found

    def settle(self) -> None:
        """Count what the edits by expert have done, now that the recording is given away."""
        assert self._steady is not None
        for number, hits in self._steady.hits.items():
            self._fired[self._numbers[number]] += int(hits)
            hits.zero_()

    def refusal(self) -> EditError:
        """What to say when the edits left some router without a choice."""
        guilty = [edit for edit in self._edits if edit.place.site in ("router.logits", "router.experts")]
        return EditError("Too many experts are banned for one token, or one was chosen that does not exist.",
                         expected=f"at least {self._sizes['slot']} of {self._sizes['expert']} left",
                         got="; ".join(f"{edit!r:.80}" for edit in guilty[:2]))

    def _acts(self, edit: Edit, chunk: Chunk) -> bool:
        positions = chunk.select(edit.place.tokens, 0, 0, 1)[0]
        if not positions or edit.name != "replay_routes":
            return bool(positions)
        run = dict(edit.args)["run"]
        return run.rows(positions)[0] is not None

    def _value(self, edit: Edit, number: int, layer: int | None, chunk: Chunk) -> Tensor:
        """What the plain edit puts, adds or multiplies by at one token, (1, 1, the site's rest), or as the op says."""
        steady = self._steady
        assert steady is not None
        op, shape = steady.plan.ops[number], (1, *steady.masks[number].shape[1:])
        args, device = dict(edit.args), steady.masks[number].device
        if op.name == "force":
            return torch.tensor(args["experts"], device=device)
        if op.name == "project":
            rows = args["directions"].tensor.double().view(-1, shape[-1])
            return torch.linalg.qr(rows.T)[0].to(device=device, dtype=torch.float32)
        if op.name == "swap":
            return torch.arange(shape[-1], device=device).expand(shape)
        if op.name == "divide":
            return torch.full(shape, args["temperature"], device=device)
        # A number keeps its float32 bits in torch's products, and in its sums on a GPU; on a processor they round it.
        exact = all(isinstance(value, int | float) for value in args.values()) and edit.name != "noise" \
            and not (op.name == "add" and device.type == "cpu")
        dtype = torch.int64 if edit.place.site == "router.experts" else torch.float32 if exact else steady.dtype
        x = torch.full(shape, _FORMS[edit.name].start, dtype=dtype, device=device)
        plain = replace(edit, args=tuple(item for item in edit.args if item[0] != "keep_norm"))
        return _act(_without_experts(plain), layer, x, chunk, self._prompts, self._sizes)

    def _swap(self, number: int, on: Tensor) -> None:
        """Exchange the numbers of two experts in the order of all, where the edit acts."""
        steady = self._steady
        assert steady is not None
        first, second = resolve(dict(self._edits[number].place.dims)["expert"], self._sizes["expert"], "expert")
        usual = torch.arange(self._sizes["expert"], device=on.device)
        swapped = usual.clone()
        swapped[[first, second]] = torch.tensor([second, first], device=on.device)
        order = torch.where(on[:, None, None], swapped, usual)
        for layer in steady.plan.ops[number].layers:
            steady.values[number, layer].copy_(order)


def _op(edit: Edit, layers: Sequence[int | None]) -> Op:
    args = dict(edit.args)
    name = "keep_norm" if args.get("keep_norm") else _FORMS[edit.name].op
    size = len(args["experts"]) if name == "force" else 0
    if name == "project":
        size = args["directions"].tensor.reshape(-1, args["directions"].tensor.shape[-1]).shape[0]
    return Op(name, edit.place.site, tuple(layers), edit.place.by_expert, size)


def _constant(edit: Edit) -> bool:
    """Whether an edit has the same value for every token on which it acts."""
    if edit.name in ("noise", "replay_routes"):
        return False
    for name, value in edit.args:
        if isinstance(value, Source) and edit.name != "mean":
            return False
        if name in ("value", "run") and isinstance(value, Held):
            rest = len(SITES[edit.place.site].dims) - 1
            if value.tensor.dim() > rest and value.tensor.shape[0] != 1:
                return False
    return True


def _selected(edit: Edit, like: Tensor, prompts: Prompts, sizes: Mapping[str, int]) -> Tensor:
    """The entries of one token at which an edit acts: (1, 1, the site's rest) bool."""
    place = replace(_without_experts(edit).place, layer=None, tokens=None, prompt=None)
    x = torch.zeros(like.shape, dtype=torch.int64 if place.site == "router.experts" else torch.float32,
                    device=like.device)
    one = Edit("set", place, (("value", 1),))
    return _act(one, None, x, Chunk([0], [0], 1, prompts), prompts, sizes) != 0


def _without_experts(edit: Edit) -> Edit:
    """The edit at every slot: who serves there is known only while the recording plays."""
    if not edit.place.by_expert:
        return edit
    dims = tuple(item for item in edit.place.dims if item[0] != "expert")
    return replace(edit, place=replace(edit.place, dims=dims))


def _act(
    edit: Edit, layer: int | None, x: Tensor, chunk: Chunk, prompts: Prompts, sizes: Mapping[str, int],
) -> Tensor:
    return Editor([edit], prompts, sizes).change([0], edit.place.site, layer, x, chunk, 0)

