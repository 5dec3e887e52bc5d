"""Gradients of a metric with respect to what the model computed on the way, with the experts packed.

One forward and one backward pass. The experts are decoded a few at a time in both and never kept (see
``gptoss_kernels.experts``), so the weights cost what they cost packed. What a gradient does cost is the forward pass's
activations: all of them are held until the backward pass has used them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from gptoss_kernels import reference
from gptoss_workbench.errors import ExperimentError, SiteError
from gptoss_workbench.experiments import relevance
from gptoss_workbench.experiments.metrics import Metric
from gptoss_workbench.hooks.capture import Capture, as_capture
from gptoss_workbench.hooks.edits import Edit, as_edits
from gptoss_workbench.hooks.selection import Indices, freeze, resolve
from gptoss_workbench.hooks.sites import SITES
from gptoss_workbench.hooks.taps import Taps, group
from gptoss_workbench.model.model import Model, Prompt, _as_batch
from gptoss_workbench.model.provenance import Settings, with_method
from gptoss_workbench.model.run import Run, join_chunks, to_numpy
from gptoss_workbench.model.transformer import Transformer

SINK = "attn.sink"  # no site: the sink's logit is a weight of the head, the same for every query
DISCRETE = "router.experts"
Place = tuple[str, "int | None"]


@dataclass(frozen=True, eq=False)
class Gradients:
    """d metric / d site for one prompt, beside the values at the same sites.

    Gradient times value, the first-order effect of scaling a value to nothing, is ``g.data * g.run.data``.

    Attributes:
        metric: its name.
        value: the metric of this prompt.
        router: "live" or "frozen".
        rules: "gradient" or "relp".
        run: the forward pass: values at the same sites, logits, labels.
        slopes: the gradients, in the form of a run.
        sinks: gradients (token, head) of the sinks' logits by layer, where asked for.
    """

    metric: str
    value: float
    router: str
    run: Run
    slopes: Run
    sinks: dict[int, Tensor]
    rules: str = "gradient"

    def __repr__(self) -> str:
        return (f"<Gradients of {self.metric} = {self.value:.4g} for {len(self.run)} tokens, "
                f"router {self.router}: {', '.join(map(str, self.data.data_vars))}>")

    def tensor(self, site: str, layer: int | None = None) -> Tensor:
        """The gradient at a site as computed, without padding; ``layer`` comes first when it is None.

        Raises:
            SiteError: it was not asked for.
        """
        if site == SINK and (layer in self.sinks or (layer is None and self.sinks)):
            return torch.stack(list(self.sinks.values())) if layer is None else self.sinks[layer]
        return self.slopes.tensor(site, layer)

    @property
    def data(self) -> xr.Dataset:
        """Every gradient under the name, dimensions and labels of its site."""
        data = self.slopes.data
        if self.sinks:
            bands = [self.run.model.config.bands[layer] for layer in self.sinks]
            values = np.stack([to_numpy(tensor) for tensor in self.sinks.values()])
            data = data.assign_coords(layer=list(self.sinks), band=("layer", bands))
            data = data.assign({SINK: (("layer", "token", "head"), values)})
        record = with_method(self.run.provenance, "gradients", metric=self.metric, router=self.router,
                             rules=self.rules, kernels=reference.name)
        return data.assign_attrs(metric=self.metric, value=self.value, router=self.router, rules=self.rules,
                                 provenance=record)


def gradients(
    model: Model, prompt: Prompt | Sequence[Prompt], metric: Metric,
    sites: Capture | str | Iterable[str] = "resid_pre", *, layers: Indices = None, tokens: Indices = None,
    router: Literal["live", "frozen"] = "live", edits: Sequence[Edit] | Edit = (),
    rules: Literal["gradient", "relp"] = "gradient",
) -> Any:
    """How fast a metric changes with each value at the chosen sites: d metric / d value, by one backward pass.

    Args:
        prompt: as for ``model.run``; a list gives a list of results, computed as one padded batch.
        metric: read after the last token, e.g. ``wb.logit_diff(" Paris", " Rome")``. It must be differentiable.
        sites: names or groups of sites, or ``wb.capture(...)``; ``"embed"`` is the input. Also ``"attn.sink"``, which
            is no site: the logit of each head's sink as each query meets it, (layer, token, head). Its sum over tokens
            is the gradient of the weight.
        layers, tokens: which of them to keep; None for all.
        router: "live" lets gradients flow through the weights of the chosen experts into the router. "frozen" takes
            these weights as constants. Which experts are chosen is discrete and never has a gradient: both say how the
            metric would change while the choice stays as it is.
        edits: as for ``model.run``. A gradient is with respect to the value after the edits of its site; it flows back
            through an edit as the edit computes, so a value that was replaced passes nothing on.
        rules: "gradient" for the derivative. "relp" for the coefficients of relevance patching, which take norms,
            activations and attention patterns as constants (see ``gptoss_workbench.experiments.relevance``); the
            values are the same bits. With router="live" the routing weights keep their ordinary slope.

    Returns:
        Gradients, or a list of them for a list of prompts. Gradients are in the compute dtype.

    Raises:
        SiteError: a site that does not exist or can have no gradient: ``router.experts`` is a choice, and nothing
            flows into ``router.logits`` when the router is frozen, nor into queries, keys, scores and sinks by RelP.
        ExperimentError: the metric can't be differentiated.
        EditNeverFired: an edit's place never came by.

    Memory: weights stay packed; at most ``gptoss_kernels.experts.SCRATCH_VALUES`` of their values, or one expert, are
    decoded at any moment. The forward pass's activations are held: at the sizes of gpt-oss-20b in bfloat16, 195 kB a
    layer and token and 128 B a layer and pair of tokens (measured), 7.8 GB in all for 1000 tokens.
    """
    if router not in ("live", "frozen"):
        raise ExperimentError("The router is live or frozen.", expected='"live" or "frozen"', got=repr(router))
    if not isinstance(metric, Metric):
        raise ExperimentError("metric= takes a metric.", expected='wb.logit_diff(" Paris", " Rome") or wb.Metric(...)',
                              got=type(metric).__name__)
    if rules not in ("gradient", "relp"):
        raise ExperimentError("There are two rules.", expected='"gradient" or "relp"', got=repr(rules))
    capture, sink = _what(sites, layers, tokens, router == "frozen")
    edits = as_edits(edits)
    if rules == "relp":
        _check_relp(capture, sink)
    edits = (edits,) if isinstance(edits, Edit) else tuple(edits)
    prompts = _as_batch(prompt)
    rows = [model.encode(one) for one in ([prompt] if prompts is None else prompts)]
    every = list(range(len(rows)))
    taps = model.new_taps(capture, edits, rows)
    recorder = _Recorder(taps, _places(model, capture), _layers(model, capture) if sink else [], router == "frozen")
    # Fast kernels need no backward pass, the reference has one; and the graph holds all scores, so blocks save nothing.
    kernels = relevance.KERNELS if rules == "relp" else reference
    transformer = Transformer(model.config, model.weights, kernels, scores_at_once=None)
    with torch.inference_mode(False), torch.enable_grad():
        ids, positions = model.pad_left(rows)
        taps.begin(every, positions, ids)
        hidden = transformer(ids, positions, model.new_cache(len(rows)), recorder)
        logits = recorder("logits", None, transformer.unembed(hidden)) if "logits" in taps else None
        values = metric.of(model, transformer.unembed(hidden[:, -1]) if logits is None else logits[:, -1])
        taps.finish()
        _check(values, len(rows), metric)
        nodes = [*recorder.nodes.values(), *recorder.patterns.values()]
        slopes = torch.autograd.grad(values.sum(), nodes, allow_unused=True)
    slopes = [torch.zeros_like(node) if slope is None else slope for node, slope in zip(nodes, slopes, strict=True)]

    # The gradients are filed by the same rules as the values: without padding, cut to what was chosen.
    filed = model.new_taps(replace(capture, sites=_sloped(capture), pooled=()), (), rows)
    filed.begin(every, positions, ids)
    for place, slope in zip(recorder.nodes, slopes, strict=False):
        if place[1] in recorder.routes:
            filed(DISCRETE, place[1], recorder.routes[place[1]])  # for captures by expert
        filed(*place, slope)
    sinks = {layer: _through_softmax(pattern.detach(), slope) for (layer, pattern), slope in
             zip(recorder.patterns.items(), slopes[len(recorder.nodes):], strict=True)}

    found, sloped = group(taps.take(), len(rows)), group(filed.take(), len(rows))
    results = []
    for i, row in enumerate(rows):
        at, own, settings = taps.positions_of(i, len(row)), slice(-len(row), None), Settings(row=i, rows=len(rows))
        kept = join_chunks({place: [part.detach() for part in parts] for place, parts in found[i].items()})
        shown = None if logits is None else logits[i, own].detach()
        run = Run(model, row, hidden[i, own].detach(), kept, at, edits, shown, settings, taps.layout(i))
        of_sites = Run(model, row, run.hidden, join_chunks(sloped[i]), at, edits, shown, settings, filed.layout(i))
        of_sinks = {layer: slope[i, own][at] for layer, slope in sinks.items()}
        results.append(Gradients(metric.name, float(values[i].detach()), router, run, of_sites, of_sinks,
                                 rules))
    return results[0] if prompts is None else results


class _Recorder:
    """The tap of a gradient run: the taps of an ordinary run, and the tensors that gradients are taken of."""

    def __init__(self, taps: Taps, places: set[Place], sinks: list[int], frozen: bool) -> None:
        self._taps, self._places, self._sinks, self._frozen = taps, places, set(sinks), frozen
        self.nodes: dict[Place, Tensor] = {}
        self.patterns: dict[int, Tensor] = {}  # before any edit: the sink acts through the softmax that made them
        self.routes: dict[int | None, Tensor] = {}

    def __call__(self, site: str, layer: int | None, x: Tensor) -> Tensor:
        if self._frozen and site == "router.weights":
            x = x.detach()
        if site == "attn.pattern" and layer in self._sinks:
            x = self.patterns[layer] = _in_graph(x)  # type: ignore[index]
        x = self._taps(site, layer, x)
        if site == DISCRETE:
            self.routes[layer] = x
        if (site, layer) in self._places:
            x = self.nodes[site, layer] = _in_graph(x)
        return x


def _in_graph(x: Tensor) -> Tensor:
    """x itself where something before it is recorded already, else a leaf: the graph begins at the first such place."""
    return x if x.requires_grad else x.detach().requires_grad_()


def _what(
    sites: Capture | str | Iterable[str], layers: Indices, tokens: Indices, frozen: bool,
) -> tuple[Capture, bool]:
    """What to keep, and whether the sinks' gradients are asked for."""
    sink = False
    if not isinstance(sites, Capture):
        names = [sites] if isinstance(sites, str) else list(sites)
        sink = SINK in names
        if DISCRETE in names:
            raise _no_gradient(DISCRETE, "which experts are chosen is a choice")
        sites = as_capture([name for name in names if name != SINK])
        if sites.pooled:
            raise _no_gradient(sites.pooled[0], "nothing is computed from a statistic", 'Ask for "attn.pattern".')
    if frozen and "router.logits" in sites.sites:
        raise _no_gradient("router.logits", "a frozen router passes nothing on to its logits",
                           'Ask for "router.weights", or pass router="live".')
    if not sink and not _sloped(sites):
        raise SiteError("Gradients of nothing were asked for.", expected="one or more sites", got=repr(sites.names))
    if layers is not None:
        sites = replace(sites, layers=freeze(layers))
    if tokens is not None:
        sites = replace(sites, tokens=freeze(tokens))
    return sites, sink


def _check_relp(capture: Capture, sink: bool) -> None:
    for site in [*capture.sites, *[SINK] * sink]:
        if site in (*relevance.NO_SLOPE, SINK):
            raise _no_gradient(site, "RelP takes attention patterns as constants",
                               'Ask for "attn.pattern" or "attn.v", or pass rules="gradient".')


def _sloped(capture: Capture) -> tuple[str, ...]:
    return tuple(site for site in capture.sites if site != DISCRETE)


def _no_gradient(site: str, why: str, hint: str = 'Ask for "router.logits" or "router.weights".') -> SiteError:
    return SiteError(f"There is no gradient at {site!r}: {why}.", expected="a site that has one", got=site, hint=hint)


def _layers(model: Model, capture: Capture) -> list[int]:
    return resolve(capture.layers, model.config.num_hidden_layers, "layer")


def _places(model: Model, capture: Capture) -> set[Place]:
    return {(site, layer) for site in _sloped(capture)
            for layer in (_layers(model, capture) if SITES[site].per_layer else [None])}


def _check(values: Tensor, prompts: int, metric: Metric) -> None:
    if not isinstance(values, Tensor) or values.shape != (prompts,) or not values.requires_grad:
        got = f"{tuple(values.shape)}, {'differentiable' if values.requires_grad else 'cut off from the logits'}" \
            if isinstance(values, Tensor) else type(values).__name__
        raise ExperimentError(
            f"The metric {metric.name!r} can't be differentiated.", expected=f"a tensor ({prompts},) computed from the "
            "logits by torch", got=got, hint="Leave out .item(), float() and torch.no_grad() in the metric.",
        )


def _through_softmax(pattern: Tensor, slope: Tensor) -> Tensor:
    """d metric / d pattern (B, H, T, S + 1) -> d metric / d sink logit of each query, (B, T, H).

    The Jacobian of a softmax row p: d p_k / d s = p_k ([k is the sink] - p_sink).
    """
    p, g = pattern.float(), slope.float()
    return (p[..., -1] * (g[..., -1] - (g * p).sum(-1))).transpose(1, 2).to(slope.dtype)
