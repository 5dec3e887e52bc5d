"""Edits: values that say what to change while the model runs. They are passed to a call and installed nowhere.

How edits compose:

- At one place (site and layer) edits act in the order of the list, each on what the one before it left. So a list is
  the same as one edit after the other, and two lists joined are the first and then the second.
- Between places the forward pass decides: whatever acts earlier in it is seen by what acts later, wherever the two
  stand in the list. ``wb.SITES`` is in that order.
- Captures see the result of all edits of their place.
- Edits whose places share no entry commute, unless one reads where the other writes (``wb.patch`` from another token
  of the same pass). Where places overlap the later edit of the list has the last word on the common entries.
- An edit that puts back what was there (``wb.scale(site, 1.0)``, ``wb.patch(site, the same run)``) changes no bit.
- In a batch an edit does to each prompt what it would do to the prompt alone, and chunks change nothing.

An edit prints as the call that made it, compares and hashes by content, and goes to JSON and back with ``to_json``
and ``wb.edit_from_json``; only functions of your own stay behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from gptoss_workbench.errors import EditError, SiteError
from gptoss_workbench.hooks import sites
from gptoss_workbench.hooks.prompts import Prompts
from gptoss_workbench.hooks.selection import Frozen, Indices, Slice, Where, freeze
from gptoss_workbench.hooks.values import Captured, Held, Source, finite, source_of, value_of

SINK = "sink"
_WRITTEN_OUT = 16  # numbers of a list

Values = Tensor | Sequence[float] | float


@dataclass(frozen=True)
class Place:
    """Where an edit acts: a site, and selections along its dimensions. None means all.

    ``dims`` holds selections of the dimensions that are neither prompt, layer nor token, by name, sorted by name. A
    site with slots can be selected by ``expert`` too: the slots in which these experts serve.
    """

    site: str
    layer: Frozen = None
    tokens: Frozen = None
    prompt: Frozen = None
    dims: tuple[tuple[str, Any], ...] = ()

    @property
    def by_expert(self) -> bool:
        """Whether slots are chosen by the experts in them."""
        return "slot" in sites.SITES[self.site].dims and any(name == "expert" for name, _ in self.dims)

    def selections(self) -> dict[str, Any]:
        """The selections that were made, by name."""
        every = {"layer": self.layer, "tokens": self.tokens, "prompt": self.prompt, **dict(self.dims)}
        return {name: selection for name, selection in every.items() if selection is not None}


@dataclass(frozen=True)
class Edit:
    """One change at one place.

    Attributes:
        name: the public function that made it; ``changes.KINDS`` says what it does.
        place: where it acts.
        args: what else was given: numbers, tensors (``Held``), what was taken from runs (``Source``), functions.
    """

    name: str
    place: Place
    args: tuple[tuple[str, Any], ...] = ()

    def __repr__(self) -> str:
        from gptoss_workbench.hooks.changes import KINDS

        kind, args, selections = KINDS[self.name], dict(self.args), self.place.selections()
        parts = [repr(self.place.site)] if kind.site is None and not kind.own_place else []
        if kind.own_place:
            del selections["layer"]
        parts += [_shown(args.pop(name)) for name in kind.positional]
        parts += [f"{kind.renamed.get(name, name)}={selection!r}" for name, selection in selections.items()]
        parts += [f"{name}={_shown(value)}" for name, value in args.items()]
        return f"wb.{self.name}({', '.join(parts)})"

    def to_json(self) -> str:
        """The edit as one line of JSON, tensors included; ``wb.edit_from_json`` gives an equal edit back.

        A sparse autoencoder stands there by its folder and a sha256; see ``wb.steer_features``.

        Raises:
            EditError: it holds a function of your own.
        """
        from gptoss_workbench.hooks.serial import to_json

        return to_json(self)


def as_edits(value: Edit | Iterable[Edit] | None) -> tuple[Edit, ...]:
    """Whatever a person passes as ``edits=``.

    Raises:
        EditError: it is neither an edit nor a list of them.
    """
    every = () if value is None else tuple(value) if isinstance(value, Iterable) else (value,)
    for edit in every:
        if not isinstance(edit, Edit):
            raise EditError("edits= takes edits.", expected="wb.set(...), wb.add(...), wb.ban_experts(...), ...",
                            got=f"{type(edit).__name__}")
    return every


def _shown(value: Any) -> str:
    if isinstance(value, tuple) and len(value) > _WRITTEN_OUT:
        return f"<{len(value)} of {value[0]} to {value[-1]}>"
    return getattr(value, "__name__", type(value).__name__) if callable(value) else repr(value)


def place_of(site: str, layer: Indices, tokens: Indices, prompt: Indices, **dims: Any) -> Place:
    """A checked place. Raises SiteError for a site or a dimension that does not exist."""
    spec = sites.site(site)
    if layer is not None and not spec.per_layer:
        raise SiteError(f"The site {site!r} has no layers.", expected="no layer=", got=f"layer={layer!r}")
    chosen = []
    for name, selection in sorted(dims.items()):
        if selection is None:
            continue
        if name not in spec.dims and not (name == "expert" and "slot" in spec.dims):
            raise SiteError(
                f"The site {site!r} has no dimension {name!r}.", expected=", ".join(spec.dims), got=name,
                hint="Select along the site's own dimensions.",
            )
        chosen.append((name, _with_sink(selection) if name == "key" else freeze(selection)))
        if name != "key" and isinstance(chosen[-1][1], Where):
            raise SiteError(f"A {name} can't be chosen by the labels of tokens.",
                            expected="an index, a slice or a list", got=repr(selection))
    if {"expert", "slot"} <= {name for name, _ in chosen}:
        raise SiteError("Slots are chosen by number or by expert.", expected="slot= or expert=", got="both")
    return Place(site, freeze(layer), freeze(tokens), freeze(prompt), tuple(chosen))


def _with_sink(selection: Any) -> Any:
    """A selection of keys may name the sink, alone or among positions."""
    if isinstance(selection, str) and selection == SINK:
        return SINK
    if isinstance(selection, list | tuple) and SINK in selection:
        return (*cast(tuple, freeze([item for item in selection if item != SINK])), SINK)
    return freeze(cast(Indices, selection))


def set(
    site: str, value: Values, *, layer: Indices = None, tokens: Indices = None, prompt: Indices = None, **dims: Any,
) -> Edit:
    """Put ``value`` there.

    Args:
        site: e.g. ``"resid_post"``; ``wb.SITES`` lists them with their dimensions.
        value: a number, or a tensor that broadcasts to (selected tokens, selected rest of the site's dimensions).
        layer: an index, a list, a slice, or None for all.
        tokens: an index, a list, a slice, a Span or several, ``wb.where(...)``, a function of the token's text, or None
            for all. Negative indices count from the end of each prompt.
        prompt: which rows of a batch.
        dims: selections along the site's further dimensions by name, e.g. ``head=3``, ``expert=[0, 5]``,
            ``key="sink"``. ``expert=`` at a site with slots means the slots in which these experts serve.

    Raises:
        SiteError: the site or the dimension does not exist.
        EditError: the value is no number and no tensor.
    """
    return Edit("set", place_of(site, layer, tokens, prompt, **dims), (("value", value_of(value)),))


def add(
    site: str, value: Values, *, layer: Indices = None, tokens: Indices = None, prompt: Indices = None, **dims: Any,
) -> Edit:
    """Add ``value`` there. Arguments as for ``set``; e.g. ``wb.add("router.logits", 100.0, layer=1, expert=0)``."""
    return Edit("add", place_of(site, layer, tokens, prompt, **dims), (("value", value_of(value)),))


def scale(
    site: str, value: Values, *, layer: Indices = None, tokens: Indices = None, prompt: Indices = None, **dims: Any,
) -> Edit:
    """Multiply by ``value``. Arguments as for ``set``."""
    return Edit("scale", place_of(site, layer, tokens, prompt, **dims), (("value", value_of(value)),))


def zero(site: str, *, layer: Indices = None, tokens: Indices = None, prompt: Indices = None, **dims: Any) -> Edit:
    """Put zeros there. Arguments as for ``set``."""
    return Edit("zero", place_of(site, layer, tokens, prompt, **dims))


def noise(
    site: str, scale: float, *, seed: int, layer: Indices = None, tokens: Indices = None, prompt: Indices = None,
    **dims: Any,
) -> Edit:
    """Add Gaussian noise of standard deviation ``scale``.

    The noise of a token depends on seed, layer and position alone: not on the batch, the chunk or the other tokens.

    Args:
        seed: 0 or more.
        layer, tokens, prompt, dims: as for ``set``.
    """
    place = place_of(site, layer, tokens, prompt, **dims)
    if "key" in sites.SITES[site].dims or place.by_expert:
        raise EditError(f"wb.noise has no meaning at {place.site!r}{' by expert' if place.by_expert else ''}.",
                        expected="a site without keys, whole slots", got=site,
                        hint='Noise on "attn.q" or "attn.k" blurs the attention.')
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise EditError("The seed of wb.noise must be a whole number.", expected="0 or more", got=repr(seed))
    return Edit("noise", place, (("scale", finite(scale, "The scale of noise")), ("seed", seed)))


def apply(
    site: str, change: Callable[[Tensor], Tensor], *, layer: Indices = None, tokens: Indices = None,
    prompt: Indices = None, **dims: Any,
) -> Edit:
    """Put ``change(x)`` there, x being the selected values, (selected tokens, selected rest of the dimensions).

    It is called once for each prompt and layer, and for each chunk where a text comes in chunks: a prompt first, then
    every generated token, and blocks of queries at the attention maps of a long prompt. Arguments as for ``set``.
    """
    if not callable(change):
        raise EditError("wb.apply needs a function.", expected="a function of one tensor", got=type(change).__name__)
    return Edit("apply", place_of(site, layer, tokens, prompt, **dims), (("change", change),))


def steer(
    site: str, *, layer: Indices, vector: Values, scale: float = 1.0, keep_norm: bool = False, tokens: Indices = None,
    prompt: Indices = None, **dims: Any,
) -> Edit:
    """Add ``scale * vector`` along the last dimension, e.g. (d_model,) in the residual stream.

    Args:
        vector: a direction; its length counts.
        keep_norm: give every vector the length back that it had.
        layer, tokens, prompt, dims: as for ``set``; ``tokens=wb.where(channel="analysis")`` steers the reasoning alone.
    """
    args = (("vector", _vectors(vector, 1)), ("scale", finite(scale, "The scale of steering")))
    return Edit("steer", place_of(site, layer, tokens, prompt, **dims),
                (*args, ("keep_norm", True)) if keep_norm else args)


def project(
    site: str, directions: Values, *, layer: Indices = None, tokens: Indices = None, prompt: Indices = None,
    **dims: Any,
) -> Edit:
    """Remove a direction: what remains is orthogonal to it. Computed in float32, rounded once.

    Args:
        directions: one vector along the last dimension, or several linearly independent ones (direction, d), of any
            length.
        layer, tokens, prompt, dims: as for ``set``.
    """
    held = _vectors(directions, 2)
    matrix = held.tensor.double().view(-1, held.tensor.shape[-1])
    if int(torch.linalg.matrix_rank(matrix)) < len(matrix):
        raise EditError("The directions to remove are not independent.", expected="independent vectors, none zero",
                        got=f"{len(matrix)} of rank {int(torch.linalg.matrix_rank(matrix))}")
    return Edit("project", place_of(site, layer, tokens, prompt, **dims), (("directions", held),))


def _vectors(value: Any, most: int) -> Held:
    held = value_of(value, "vector")
    sound = isinstance(held, Held) and bool(torch.isfinite(held.tensor).all())
    if not isinstance(held, Held) or not 1 <= held.tensor.dim() <= most or not held.tensor.is_floating_point() \
            or not sound:
        got = f"{held}{'' if sound else ', not finite'}" if isinstance(held, Held) else repr(held)
        raise EditError("That is no direction.", expected=f"finite floats (d,){' or (direction, d)' * (most - 1)}",
                        got=got)
    return held


def mean(
    site: str, run: Captured | Sequence[Captured], *, over: Indices = None, layer: Indices = None,
    tokens: Indices = None, prompt: Indices = None, **dims: Any,
) -> Edit:
    """Put the mean of another run there, or of many (mean ablation).

    Args:
        run: captured ``site`` at the layers that are edited; a list or a batch of runs counts every token alike.
        over: the tokens of those runs that the mean is taken over, in the forms of ``tokens``; None for all captured.
        layer, tokens, prompt, dims: as for ``set``.

    Raises:
        SiteError: a run lacks the site, a layer or a token.
    """
    place = place_of(site, layer, tokens, prompt, **dims)
    if sites.site(site).token_dim != "token" or site == "router.experts" or place.by_expert:
        raise EditError(f"wb.mean has no meaning at {site!r}{' by expert' if place.by_expert else ''}.",
                        expected="a site with tokens and whole slots", got=site,
                        hint="wb.set puts a value of your own there.")
    runs = list(run) if isinstance(run, Sequence) else [run]
    if not runs:
        raise EditError("There is no run to take the mean of.", expected="one or more runs", got="an empty list")
    taken = [source_of(one, site, place.layer) for one in runs]
    if any(one.parts != taken[0].parts for one in taken):
        raise EditError("The runs kept different parts of the site.", expected="the same capture for all", got=site)
    rows = [_rows(one, source, freeze(over)) for one, source in zip(runs, taken, strict=True)]
    count = sum(map(len, rows))
    if not count:
        raise EditError("A mean over no tokens.", expected="at least one token", got=f"over={over!r}")
    values = []
    for layer_number, first in taken[0].values:
        total = sum(source.at(layer_number)[chosen].double().sum(0) for source, chosen in zip(taken, rows, strict=True))
        assert isinstance(total, Tensor)
        values.append((layer_number, Held((total / count).to(torch.promote_types(first.tensor.dtype, torch.float32)))))
    alone = taken[0] if len(taken) == 1 else None
    mean_of = Source(site, tuple(values), range(0), taken[0].parts, ids=alone.ids if alone else (),
                     edits=alone.edits if alone else ())
    return Edit("mean", place, (("run", mean_of),))


def _rows(run: Any, source: Source, over: Frozen) -> list[int]:
    """The rows of a source's tensors that a selection of tokens means."""
    if over is None:
        return list(range(len(source.positions)))
    prompt = Prompts([run.ids], lambda: run.model.vocabulary, open_ended=False)
    prompt.check(over, [0])
    rows = source.rows(list(prompt.chosen(over, 0)))
    if None in rows:
        raise SiteError("The run did not keep all of these tokens.", got=repr(over),
                        expected=f"some of the {len(source.positions)} that were captured")
    return rows  # type: ignore[return-value]


def patch(
    site: str, run: Captured | Tensor | None = None, *, layer: Indices = None, tokens: Indices = None,
    prompt: Indices = None, source: Indices = None, **dims: Any,
) -> Edit:
    """Put there what another run had at the same place (activation patching).

    Args:
        run: captured ``site`` at the layers that are edited, one prompt; or a tensor (token, rest of the site's
            dimensions) with a row for each of ``tokens``; or None for this very pass, whose values at ``source`` are
            taken as they are when the edit acts. They must have been read by then.
        layer, tokens, prompt, dims: as for ``set``. With ``expert=`` at a site with slots the values of these experts
            are taken, so they must have served the same tokens there (``wb.replay_routes`` sees to that).
        source: positions to take instead of the same ones: one for all, or one for each of ``tokens``, in ascending
            order of ``tokens``.

    Raises:
        SiteError: the run lacks the site or the layer.
        EditError: the run lacks a position, here or while running.
    """
    place = place_of(site, layer, tokens, prompt, **dims)
    if "key" in sites.site(site).dims:
        raise EditError("Attention maps of two runs have different keys.", expected="a site without keys", got=site,
                        hint="wb.pin_attention puts the pattern of another run there.")
    taken = freeze(source)
    ends = (taken.start, taken.stop) if isinstance(taken, Slice) else taken if isinstance(taken, tuple) else (taken,)
    if isinstance(taken, Where) or any(isinstance(end, int) and end < 0 for end in ends):
        raise EditError("source= takes positions from the start.", expected="an index, a slice or a list, none below 0",
                        got=repr(source))
    if run is None and (taken is None or place.by_expert or not isinstance(taken, int | tuple)):
        raise EditError("A patch needs a run, a tensor, or tokens of this pass to take.",
                        expected="run=, or source= with positions and without expert=", got="neither")
    if run is None:
        held: Any = None
    elif isinstance(run, Tensor):
        if source is not None or place.by_expert:
            raise EditError("A tensor is put where tokens= says, row by row.",
                            expected="no source= and no expert= at slots", got=f"source={source!r}")
        held = value_of(run)
    else:
        held = source_of(run, site, place.layer, by_expert=place.by_expert)
    args: Mapping[str, Any] = {"run": held, "source": taken}
    return Edit("patch", place, tuple((name, value) for name, value in args.items()
                                      if name == "run" or value is not None))
