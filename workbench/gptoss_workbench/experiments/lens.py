"""What the model would say next: at its end, and at every layer (logit lens, nostalgebraist 2020)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from gptoss_workbench.experiments.rows import log_probs, row_id_and_text
from gptoss_workbench.hooks.selection import resolve
from gptoss_workbench.model.model import Model
from gptoss_workbench.model.provenance import with_method
from gptoss_workbench.model.run import Run

if TYPE_CHECKING:
    from gptoss_workbench.experiments.tuned_lens import TunedLens


@torch.no_grad()
def next_tokens(model: Model, run: Run, token: int = -1, top: int = 10) -> xr.Dataset:
    """The likeliest tokens after one position.

    Args:
        token: the position; negative ones count from the end.
        top: how many.

    Returns:
        Dataset over ``rank``, best first: id, text, prob, logit. Ids that share one row of the unembedding stand
        there once, id -1, with their probability together and the logit of each.
    """
    position = resolve(token, len(run), "token")[0]
    hidden = run.hidden[position]
    out = _top(model, log_probs(model, hidden)[None], top)
    logits = model.transformer.unembed_rows(hidden).float()
    order = log_probs(model, hidden).topk(out.sizes["rank"]).indices
    out = out.isel(layer=0, drop=True).assign(logit=("rank", logits[order].cpu().numpy()))
    return out.assign_attrs(provenance=with_method(run.provenance, "next_tokens", token=position, top=top))


@torch.no_grad()
def logit_lens(
    model: Model, run: Run, token: int = -1, top: int = 5, *, lens: TunedLens | None = None,
) -> xr.Dataset:
    """The likeliest next tokens if each layer were the last: its ``resid_post`` through final norm and unembedding.

    Args:
        run: captured ``resid_post``.
        token: the position; negative ones count from the end.
        top: how many at each layer.
        lens: a tuned lens to read through; see ``wb.tuned_lens``.

    Returns:
        Dataset over (layer, rank): id, text, prob. The last layer is what the model says.

    Raises:
        SiteError: the run holds no ``resid_post``, or not of that token.

    Pitfall: early layers need not speak the output's language; a late appearance is not a late computation.
    ``wb.lens_grid`` reads all tokens, and the halves of the layers too.
    """
    position = resolve(token, len(run), "token")[0]
    column = resolve(run.positions.index(position) if position in run.positions else len(run.positions),
                     len(run.positions), "captured token")[0]
    layers = run.layers("resid_post")
    resid = run.tensor("resid_post")[:, column]
    if lens is not None:
        resid = torch.stack([lens.translated(state, layer) for state, layer in zip(resid, layers, strict=True)])
    norm = model.transformer.kernels.rms_norm(resid, model.weights.final_norm, model.config.rms_norm_eps)
    out = _top(model, log_probs(model, norm), top)
    bands = ("layer", [model.config.bands[layer] for layer in layers])
    record = with_method(run.provenance, "logit_lens" if lens is None else "tuned_lens.lens", token=position, top=top,
                         **({} if lens is None else {"lens": lens.digest}))
    return out.assign_coords(layer=layers, band=bands).assign_attrs(token=position, provenance=record)


def _top(model: Model, log_p: Tensor, top: int) -> xr.Dataset:
    """log_p (layer, row) -> the best rows as Dataset (layer, rank)."""
    best = log_p.topk(min(top, log_p.shape[-1]), dim=-1)
    labels = {row: row_id_and_text(model, row) for row in set(best.indices.flatten().tolist())}
    ids = np.array([[labels[row][0] for row in rows] for rows in best.indices.tolist()], dtype=np.int64)
    texts = np.empty(ids.shape, dtype=object)
    for i, rows in enumerate(best.indices.tolist()):
        texts[i] = [labels[row][1] for row in rows]
    prob = best.values.exp().cpu().numpy()
    return xr.Dataset({name: (("layer", "rank"), value) for name, value in
                       (("id", ids), ("text", texts), ("prob", prob))}, coords={"rank": range(ids.shape[1])})
