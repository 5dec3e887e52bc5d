"""The places of a site that a metric can be attributed to: what they hold in two runs, and how to patch one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gptoss_workbench.errors import ExperimentError
from gptoss_workbench.hooks.edits import SINK, Edit, add, patch, set
from gptoss_workbench.hooks.selection import Indices, freeze, resolve
from gptoss_workbench.hooks.sites import SITES
from gptoss_workbench.hooks.sites import site as site_named
from gptoss_workbench.model.model import Model
from gptoss_workbench.model.run import Run

FEATURES = ("d_model", "d_head", "d_ff", "vocab")
"""Dimensions over which an attribution sums; the others tell places apart."""

EXPERT_SITES = ("router.experts", "router.weights", "expert.out")


@dataclass(frozen=True)
class Places:
    """A site cut into places.

    Attributes:
        site: its name.
        by: "expert" for the contribution of each expert to ``mlp.out``; None for the site's own dimensions.
        layers: which; (None,) for a site without layers.
        experts: how many there are.
    """

    site: str
    by: str | None
    layers: tuple[int | None, ...]
    experts: int

    @property
    def dims(self) -> tuple[str, ...]:
        """Dimensions of an attribution, ``layer`` first where there is one."""
        spec = SITES[self.site]
        kept = tuple(dim for dim in spec.dims if dim not in FEATURES)
        return ("layer",) * spec.per_layer + kept + ("expert",) * (self.by == "expert")

    @property
    def token_dim(self) -> str:
        return SITES[self.site].token_dim

    @property
    def captured(self) -> tuple[str, ...]:
        """What a run must keep of the site."""
        return (self.site, *EXPERT_SITES) if self.by == "expert" else (self.site,)

    def held(self, run: Run, layer: int | None) -> Tensor:
        """What a run holds at the places of a layer, (the site's dimensions) float32; experts by their contribution."""
        if self.by != "expert":
            return run.tensor(self.site, layer).float()
        chosen, weights, out = (run.tensor(site, layer) for site in EXPERT_SITES)
        shares = weights.float()[..., None] * out.float()  # (token, slot, d_model)
        every = shares.new_zeros(len(chosen), self.experts, shares.shape[-1])
        return every.scatter_add(1, chosen[..., None].expand_as(shares), shares)

    def difference(self, clean: Run, corrupt: Run, layer: int | None) -> Tensor:
        """Clean minus corrupt at the places of a layer; 0 where both are -inf, as scores out of reach are."""
        return (self.held(clean, layer) - self.held(corrupt, layer)).nan_to_num(0.0)

    def summed(self, values: Tensor) -> Tensor:
        """Over the features of each place: (the site's dimensions) -> (one layer's places)."""
        return values.sum(-1) if SITES[self.site].dims[-1] in FEATURES else values

    def effect(self, slope: Tensor, difference: Tensor) -> Tensor:
        """Slope times difference, summed over the features of each place.

        Args:
            slope: d metric / d site, the site's dimensions, float32.
            difference: of the places.
        """
        return self.summed((slope[:, None] if self.by == "expert" else slope) * difference)

    def patch_one(self, clean: Run, corrupt: Run, layer: int | None, at: Mapping[str, int], prompt: int) -> Edit:
        """The edit of the corrupt run that puts the clean value at one place.

        Args:
            at: index of the place along each of ``dims`` but the layer.
            prompt: the row of the batch to edit.
        """
        rest = dict(at)
        token = rest.pop(self.token_dim)
        if self.by == "expert":
            change = (_share(clean, layer, token, at["expert"]) - _share(corrupt, layer, token, at["expert"]))
            return add(self.site, change[None], layer=layer, tokens=token, prompt=prompt)
        if "key" not in rest:
            return patch(self.site, clean, layer=layer, tokens=token, prompt=prompt, **rest)
        value = float(clean.tensor(self.site, layer)[rest["head"], token, rest["key"]])
        sink = self.site == "attn.pattern" and rest["key"] == len(clean)
        return set(self.site, value, layer=layer, tokens=token, prompt=prompt, head=rest["head"],
                   key=SINK if sink else rest["key"])

    def patch_layer(self, clean: Run, layer: int | None, prompt: int) -> Edit:
        """The edit that puts the clean values at all places of a layer together."""
        return self.put(clean.tensor(self.site, layer), layer, prompt)

    def put(self, values: Tensor, layer: int | None, prompt: int) -> Edit:
        """The edit that sets the whole site of a layer to values in the site's dimensions."""
        return set(self.site, values.movedim(SITES[self.site].dims.index(self.token_dim), 0), layer=layer,
                   prompt=prompt)


def places_of(model: Model, site: str, by: str | None, layers: Indices) -> Places:
    """The places of a site, checked.

    Raises:
        SiteError: no such site or layer.
        ExperimentError: it can't be cut so.
    """
    spec = site_named(site)
    if by is not None and (by, site) != ("expert", "mlp.out"):
        raise ExperimentError("A site is cut along its own dimensions.", expected='by=None, or by="expert" at mlp.out',
                              got=f"by={by!r} at {site!r}", hint='Heads: site="attn.z". Slots: site="expert.out".')
    if site == "router.experts":
        raise ExperimentError("There is no difference of choices.", expected='"router.logits" or "router.weights"',
                              got=site, hint='site="mlp.out", by="expert" has what each expert adds.')
    if not spec.per_layer and layers is not None:
        raise ExperimentError(f"{site!r} has no layers.", expected="layers=None", got=repr(layers))
    count = model.config.num_hidden_layers
    chosen = tuple(resolve(freeze(layers), count, "layer")) if spec.per_layer else (None,)
    return Places(site, by, chosen, model.config.num_local_experts)


def _share(run: Run, layer: int | None, token: int, expert: int) -> Tensor:
    """What one expert adds to mlp.out of one token, (d_model,) float32; zeros where it does not serve."""
    chosen, weights, out = (run.tensor(site, layer)[token] for site in EXPERT_SITES)
    serves = (chosen == expert).float()
    return torch.einsum("s,sd->d", serves * weights.float(), out.float())
