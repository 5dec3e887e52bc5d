"""Activation patching: put the clean run's values into the corrupt run, one place at a time, and see what comes back.

Method: Meng et al. 2022 (arXiv 2202.05262) and Zhang & Nanda 2024 (arXiv 2309.16042), denoising direction.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import xarray as xr

from gptoss_workbench.errors import ExperimentError
from gptoss_workbench.experiments.metrics import Metric
from gptoss_workbench.hooks.edits import patch
from gptoss_workbench.hooks.sites import site as site_named
from gptoss_workbench.model.model import Model, Prompt
from gptoss_workbench.model.provenance import with_method

TOKENS_PER_BATCH = 4096  # bounds memory; larger batches were not faster on two cores


@torch.no_grad()
def patching(
    model: Model, clean: Prompt, corrupt: Prompt, site: str = "resid_pre", *, metric: Metric, normalize: bool = True,
    on_progress: Callable[[int, int], None] | None = None, should_stop: Callable[[], bool] | None = None,
) -> xr.DataArray:
    """For each layer and token, the metric of the corrupt prompt when that one place holds the clean run's value.

    Args:
        clean, corrupt: two prompts of equally many tokens; the metric is read after the last one.
        site: any site with a layer and a token dimension, e.g. ``resid_pre``, ``attn.out``, ``mlp.out``.
        metric: e.g. ``wb.logit_diff(" Paris", " Rome")``.
        normalize: give the fraction recovered, 0 = as corrupt, 1 = as clean; False gives raw metric values.
        on_progress: called with (passes done, passes in all).
        should_stop: asked before each batch; True ends early and leaves NaN where nothing was computed.

    Returns:
        (layer, token) float32, the tokens labelled as in the clean prompt, ``corrupt_text`` beside them; attrs hold the
        metric's name and its values for both prompts, and the provenance as JSON.

    Raises:
        ExperimentError: the prompts differ in length, or normalising would divide by zero.
        SiteError: the site does not exist or has no layer and token.

    Pitfall: a high value says that the place carries what differs between the prompts, not that it computes it.
    """
    spec = site_named(site)
    if not spec.per_layer or spec.token_dim != "token":
        raise ExperimentError(f"{site!r} can't be patched layer by token.",
                              expected="a site with layers and tokens, such as resid_pre", got=", ".join(spec.dims))
    runs = [model.run(prompt, capture=site) for prompt in (clean, corrupt)]
    tokens = len(runs[0])
    if len(runs[1]) != tokens:
        raise ExperimentError(
            "The two prompts have different lengths, so their tokens don't face each other.",
            expected=f"{tokens} tokens in both", got=f"clean {tokens}: {runs[0].tokens}"[:150] +
            f"; corrupt {len(runs[1])}: {runs[1].tokens}"[:150],
            hint="Choose words of equally many tokens.",
        )
    clean_value, corrupt_value = (float(metric.of(model, _last_logits(model, run.hidden[-1:]))) for run in runs)
    if normalize and clean_value == corrupt_value:
        raise ExperimentError("The metric is the same for both prompts, so nothing can be recovered.",
                              expected="prompts that differ in the metric", got=f"{clean_value:.4g} for both",
                              hint="Check the two answers, or pass normalize=False.")

    layers = model.config.num_hidden_layers
    values = np.full((layers, tokens), np.nan, dtype=np.float32)
    batch = max(1, TOKENS_PER_BATCH // tokens)
    done = 0
    for layer in range(layers):
        for start in range(0, tokens, batch):
            if should_stop is not None and should_stop():
                break
            places = range(start, min(start + batch, tokens))
            edits = [patch(site, runs[0], layer=layer, tokens=token, prompt=row) for row, token in enumerate(places)]
            patched = model.run([runs[1].ids] * len(places), edits=edits)
            hidden = torch.stack([run.hidden[-1] for run in patched])
            values[layer, places] = metric.of(model, _last_logits(model, hidden)).cpu().numpy()
            done += len(places)
            if on_progress is not None:
                on_progress(done, layers * tokens)
    if normalize:
        values = (values - corrupt_value) / (clean_value - corrupt_value)
    corrupt_text = np.empty(tokens, dtype=object)
    corrupt_text[:] = runs[1].tokens
    return xr.DataArray(
        values, dims=("layer", "token"), name="recovered" if normalize else metric.name,
        coords={"layer": range(layers), "band": ("layer", list(model.config.bands)),
                **runs[0].token_coords("token"), "corrupt_text": ("token", corrupt_text)},
        attrs={"site": site, "metric": metric.name, "clean": clean_value, "corrupt": corrupt_value,
               "model": model.name,
               "provenance": with_method(runs[1].provenance, "patching", clean=runs[0].ids, site=site,
                                         metric=metric.name, normalize=normalize)},
    )


def _last_logits(model: Model, hidden: torch.Tensor) -> torch.Tensor:
    return model.transformer.unembed(hidden)
