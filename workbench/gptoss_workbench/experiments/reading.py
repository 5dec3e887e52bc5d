"""One vector a prompt: what a site holds at chosen tokens, for many prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gptoss_workbench.errors import ExperimentError
from gptoss_workbench.experiments.watch import Cost, Watch
from gptoss_workbench.hooks.capture import capture
from gptoss_workbench.hooks.selection import Indices, freeze, resolve
from gptoss_workbench.hooks.sites import SITES
from gptoss_workbench.hooks.sites import site as site_named
from gptoss_workbench.model.model import Model, Prompt

TOKENS_PER_BATCH = 4096  # bounds memory
NOBODY = Watch()


def batches(rows: Sequence[Sequence[int]]) -> list[range]:
    """Rows in order, as many together as stay within ``TOKENS_PER_BATCH`` with their padding."""
    out: list[range] = []
    start, longest = 0, 0
    for number, row in enumerate(rows):
        wider = max(longest, len(row))
        if number > start and wider * (number + 1 - start) > TOKENS_PER_BATCH:
            out.append(range(start, number))
            start, wider = number, len(row)
        longest = wider
    return [*out, range(start, len(rows))] if rows else []


def stream_site(site: str) -> str:
    """The name of a site whose values are vectors of the residual stream's width, layer by layer.

    Raises:
        SiteError: there is no such site.
        ExperimentError: it is of another form.
    """
    spec = site_named(site)
    if spec.dims != ("token", "d_model") or not spec.per_layer:
        fitting = ", ".join(one.name for one in SITES.values() if one.dims == ("token", "d_model") and one.per_layer)
        raise ExperimentError(f"{site!r} holds no vector of the stream at each layer and token.", expected=fitting,
                              got=", ".join((*(["layer"] if spec.per_layer else []), *spec.dims)))
    return spec.name


def layer_numbers(model: Model, layers: Indices) -> list[int]:
    return sorted({*resolve(freeze(layers), model.config.num_hidden_layers, "layer")})


@torch.no_grad()
def read_vectors(
    model: Model, prompts: Sequence[Prompt], site: str, *, layers: Indices = None, tokens: Indices = -1,
    watch: Watch = NOBODY, begun: np.ndarray | None = None,
) -> np.ndarray:
    """The mean of a site over the chosen tokens of each prompt: (prompt, layer, d_model) float32.

    Prompts that were not read because somebody stopped are NaN.

    Args:
        begun: of the first prompts, what an earlier call gave; they are not read again. The others go together as they
            would have, so they give the same bits.

    Raises:
        ExperimentError: a prompt has none of the tokens.
    """
    rows, numbers = [model.encode(prompt) for prompt in prompts], layer_numbers(model, layers)
    values = np.full((len(rows), len(numbers), model.config.hidden_size), np.nan, dtype=np.float32)
    if begun is not None:
        values[:len(begun)] = begun
    read = 0 if begun is None else len(begun)
    left = [batch for batch in batches(rows) if batch.stop > read]
    again = rows[left[0].start:] if left else []
    watch.plan(Cost(len(again), sum(map(len, again)), nbytes=values.nbytes))
    what = capture(site, layers=numbers, tokens=tokens)
    for batch in left:
        if watch.stopped():
            break
        for number, run in zip(batch, model.run([rows[number] for number in batch], capture=what), strict=True):
            if not run.positions:
                raise ExperimentError("A prompt has none of the chosen tokens.", expected="one or more in each",
                                      got=f"none in prompt {number}: {model.decode(rows[number])!r}"[:200])
            values[number] = run.tensor(site).float().mean(1).cpu().numpy()
        watch.done(batch.stop, len(rows))
    return values
