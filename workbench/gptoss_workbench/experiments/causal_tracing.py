"""Causal tracing: blur the subject's embeddings, then restore one place at a time and see whether the fact comes back.

Method: Meng et al. 2022, "Locating and Editing Factual Associations in GPT" (arXiv 2202.05262), section 2.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import xarray as xr

from gptoss_workbench.errors import ExperimentError
from gptoss_workbench.experiments.metrics import Metric
from gptoss_workbench.experiments.sweeps.engine import Case, Engine, SweepPlan
from gptoss_workbench.experiments.sweeps.fill import fill
from gptoss_workbench.experiments.watch import MEMORY, Watch, completeness, identity, resumed
from gptoss_workbench.hooks.edits import Edit, noise, patch, zero
from gptoss_workbench.hooks.prompts import Prompts
from gptoss_workbench.hooks.selection import Indices, freeze
from gptoss_workbench.hooks.sites import site as site_named
from gptoss_workbench.model.model import Model, Prompt
from gptoss_workbench.model.provenance import with_method


@torch.no_grad()
def causal_tracing(
    model: Model, prompt: Prompt, subject: Indices, *, metric: Metric, site: str = "resid_post", window: int = 1,
    scale: float = 3.0, seeds: int = 8, resume: xr.DataArray | None = None,
    on_plan: Callable[[SweepPlan], object] | None = None, on_progress: Callable[[int, int], object] | None = None,
    should_stop: Callable[[], bool] | None = None, memory: int = MEMORY,
) -> xr.DataArray:
    """For each draw of the noise, layer and token: the metric when that place is restored in the blurred run.

    Args:
        subject: the tokens whose embeddings are blurred, in any form of ``tokens`` (see ``wb.set``).
        metric: e.g. ``wb.probability(" Paris")``, as in the paper.
        site: what is restored: ``resid_post``, ``mlp.out``, ``attn.out`` or any site with layers and tokens.
        window: how many layers around each are restored together; the paper takes 10 of 48 for single sublayers.
        scale: standard deviations of the noise, in units of that of the prompt's embeddings.
        seeds: how many draws of the noise.
        resume, on_plan, on_progress, should_stop, memory: as for ``wb.patching``.

    Returns:
        (noise, layer, token) float32, raw values of the metric. attrs hold ``clean``, ``blurred`` (one for each draw)
        and the provenance. The indirect effect of the paper is ``(result - blurred).mean("noise")``, with ``blurred``
        as a coordinate; ``wb.summarize(result - result.blurred, "noise")`` gives its interval.

    Raises:
        ExperimentError: the noise or the window makes no sense, or the site has no layers and tokens.
        SiteError: the site or a token does not exist.

    Pitfalls: what is found depends on the scale of the noise (Zhang & Nanda 2024, arXiv 2309.16042): too little leaves
    the fact standing, too much leaves nothing to build on, and either way blurred embeddings are unlike any text.
    Windows make the effect of late restoring look early. Patching with another subject has neither trouble. Hit
    rates of both on circuits that are known: docs/truth.md.
    """
    spec = site_named(site)
    if not spec.per_layer or spec.token_dim != "token":
        raise ExperimentError(f"{site!r} can't be restored layer by token.", got=", ".join(spec.dims),
                              expected="a site with layers and tokens, such as resid_post")
    if seeds < 1 or window < 1 or not scale > 0:
        raise ExperimentError("That is no noise or no window.", expected="seeds, window and scale above 0",
                              got=f"seeds={seeds}, window={window}, scale={scale}")
    ids, layers = model.encode(prompt), model.config.num_hidden_layers
    own = Prompts([ids], lambda: model.vocabulary, False)
    own.check(freeze(subject), [0])
    blurred_tokens = [*own.chosen(freeze(subject), 0)]
    if not blurred_tokens:
        raise ExperimentError("The subject is no token of the prompt.", expected="one token or more", got=repr(subject))
    question = identity(model, "causal tracing", ids, metric.name, site, window, scale, seeds, blurred_tokens)
    shape = (seeds, layers, len(ids))
    values, watch = resumed(resume, question, shape), Watch(on_plan, on_progress, should_stop, memory)
    spans = [range(max(0, layer - (window - 1) // 2), min(layers, layer + window // 2 + 1)) for layer in range(layers)]
    begun = min(blurred_tokens)  # nothing is blurred before it
    places = [([*span], token) for span in spans for token in range(begun, len(ids))]
    found = values[:, :, begun:].reshape(1, -1)

    def engine(strength: float, restored: Callable[[list[int], int], Edit]) -> Engine:
        always = [[noise("embed", strength, seed=seed, tokens=blurred_tokens)] for seed in range(seeds)]
        cases = [Case(seed, (restored(*place),)) for seed in range(seeds) for place in places]
        return Engine(model, [ids] * seeds, cases, always, memory, np.isnan(found[0]))

    if on_plan is not None:
        plan = engine(1.0, lambda span, token: zero(site, layer=span, tokens=token)).plan
        watch.plan(plan.beside([len(ids)] * (1 + seeds)))
    clean = model.run(ids, capture=[site, "embed"])
    metric = metric.given(clean.logits[-1])
    strength = scale * float(clean.tensor("embed").float().std())
    sweep = engine(strength, lambda span, token: patch(site, clean, layer=span, tokens=token))
    noises = [noise("embed", strength, seed=seed, tokens=blurred_tokens) for seed in range(seeds)]
    blurred = np.array([float(metric.of(model, model.run(ids, edits=one).logits[-1:])) for one in noises])
    fill(model, sweep, [[metric]] * seeds, found, watch)
    values[:, :, begun:], values[:, :, :begun] = found.reshape(seeds, layers, -1), blurred[:, None, None]
    subject_mask = np.zeros(len(ids), dtype=bool)
    subject_mask[blurred_tokens] = True
    return xr.DataArray(
        values, dims=("noise", "layer", "token"), name=metric.name,
        coords={"noise": range(seeds), "layer": range(layers), "band": ("layer", list(model.config.bands)),
                **clean.token_coords("token"), "subject": ("token", subject_mask),
                "blurred": ("noise", blurred.astype(np.float32))},
        attrs={"site": site, "metric": metric.name, "clean": float(metric.of(model, clean.logits[-1:])),
               "model": model.name, "question": question,
               **completeness(int((~np.isnan(values)).sum()), values.size, "places"),
               "provenance": with_method(clean.provenance, "causal_tracing", site=site, subject=blurred_tokens,
                                         metric=metric.name, window=window, scale=scale, seeds=seeds)},
    )
