"""Direct logit attribution: how much every component of the model speaks for an answer by itself."""

from __future__ import annotations

import torch
import xarray as xr

from gptoss_workbench.experiments.parts import captured, columns, component_coords, components, token_coords
from gptoss_workbench.experiments.rows import single_id
from gptoss_workbench.hooks.selection import Indices, freeze
from gptoss_workbench.model.model import Model
from gptoss_workbench.model.provenance import with_method
from gptoss_workbench.model.run import Run


@torch.no_grad()
def direct_logit_attribution(
    model: Model, run: Run, answer: str | int, other: str | int | None = None, tokens: Indices = -1,
) -> xr.DataArray:
    """A logit, or the difference of two, as the sum of what each component contributes to it directly.

    The frozen-norm convention: the final norm divides by the root mean square of the whole residual stream. That one
    number is taken from this run, per token, and held constant; the norm's weights and the unembedding are linear, so
    each component of the stream has its own share, and the shares sum to the logit. (RMSNorm subtracts no mean, so
    there is nothing to centre.)

    Args:
        run: ``model.run(prompt, capture=wb.COMPONENT_SITES)``.
        answer: a text that is one token, or an id.
        other: what it is compared with. Without it the logit itself is taken apart, of which a constant shared by all
            answers is a part: prefer a difference.
        tokens: the positions whose prediction is taken apart, the last by default; None for all that were captured. A
            single index drops the dimension.

    Returns:
        (component, token) float32, logits; components and their coordinates as in ``wb.decompose_residual``, so
        ``.groupby("layer").sum()`` gives layers and ``.where(d.kind == "head", drop=True)`` heads. Its sum over
        ``component`` is the run's logit (difference) before edits of the logits themselves. "rest" is what the parts
        leave unexplained: rounding, and edits straight into the stream, a sublayer's output or the final norm.

    Raises:
        SiteError: the run lacks one of the sites.
        ExperimentError: an answer is not one token.

    Pitfall: direct means direct. A head that makes a later expert write the answer has no share of its own here;
    docs/truth.md has how often that misleads where the circuit is known.
    """
    last, at = model.config.num_hidden_layers - 1, columns(run, tokens)
    rows = [single_id(model, token) for token in (answer, other) if token is not None]
    if model.weights.row_of_token is not None:
        rows = model.weights.row_of_token[rows].tolist()
    towards = model.weights.unembed[rows[0]].float()
    if other is not None:
        towards = towards - model.weights.unembed[rows[1]].float()
    stream = captured(model, run, "resid_post", last)[at].float()
    size = stream.pow(2).mean(-1, keepdim=True).add(model.config.rms_norm_eps).sqrt()
    onto = towards * model.weights.final_norm / size  # (token, d_model): the logit's slope, with the size held

    names, shares = [], []
    for name, output in components(model, run, at, last, "resid_post"):
        names.append(name)
        shares.append((output * onto).sum(-1))
    positions = [run.positions[column] for column in at]
    logit = run.hidden[positions].float() @ towards
    rest = logit - torch.stack(shares).sum(0)
    title = f"logit({answer!r})" + (f" - logit({other!r})" if other is not None else "")
    out = xr.DataArray(
        torch.stack([*shares, rest]).cpu().numpy(), dims=("component", "token"), name=title,
        coords={**component_coords(names), **token_coords(run, at)},
        attrs={"model": model.name, "units": "logits", "convention": "final norm frozen at this run's value",
               "provenance": with_method(run.provenance, "direct_logit_attribution", answer=answer, other=other,
                                         tokens=positions)},
    )
    return out.isel(token=0) if isinstance(freeze(tokens), int) else out
