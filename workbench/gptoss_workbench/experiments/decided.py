"""When was it decided: the layer from which on the stream says what the model says in the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from gptoss_workbench.errors import ExperimentError
from gptoss_workbench.experiments.lens_grid import lens_grid
from gptoss_workbench.hooks.selection import Indices, freeze
from gptoss_workbench.model.model import Model
from gptoss_workbench.model.provenance import with_method
from gptoss_workbench.model.run import Run

if TYPE_CHECKING:
    from gptoss_workbench.experiments.tuned_lens import TunedLens


def decided_at(
    model: Model, run: Run, tokens: Indices = None, *, kl: float = 0.1, lens: TunedLens | None = None,
) -> xr.Dataset:
    """For every token, the first layer from which on the model's own answer stays the likeliest.

    The prediction depth of Baldock et al. 2021 (arXiv 2106.09647), read with a lens over the layers; with a tuned lens
    as in Belrose et al. 2023 (arXiv 2303.08112).

    Args:
        run: captured ``resid_post`` of all layers.
        tokens: the positions whose prediction is read; None for all captured. A single index drops the dimension.
        kl: nats; the second measure asks from which layer on KL(what the model says || lens) is at most this. It sees
            what the first does not: how sure, and what else would do.
        lens: ``wb.tuned_lens``; without it the logit lens.

    Returns:
        Dataset over ``token``, labelled as in the run: ``layer``, ``layer_kl`` (int64; the last layer where it was
        decided only there), ``first`` (the first layer at which the answer is the likeliest, perhaps not for good), and
        ``said``, the text of the answer.

    Raises:
        SiteError: the run lacks ``resid_post`` or a token.
        ExperimentError: not of every layer, or a threshold that is none.

    Pitfalls: "decided" is about what this lens can read. The logit lens dates decisions late where early layers write
    in another language, and a token that is said for other reasons all along (the most frequent one) counts as early.
    """
    layers = list(range(model.config.num_hidden_layers))
    if not kl >= 0:
        raise ExperimentError("kl= is a threshold in nats.", expected="0 or more", got=kl)
    if run.layers("resid_post") not in ([], layers):
        raise ExperimentError("Not every layer was captured, so the first one can't be told.",
                              expected=f"resid_post of layers 0 to {layers[-1]}", got=str(run.layers("resid_post")))
    single = isinstance(freeze(tokens), int)
    grid = lens_grid(model, run, [tokens] if single else tokens, lens=lens)  # type: ignore[list-item]
    right, near = grid["answer_rank"].values == 0, grid["kl"].values <= kl
    out = xr.Dataset(
        {"layer": ("token", _stays(right)), "layer_kl": ("token", _stays(near)),
         "first": ("token", np.where(right.any(0), right.argmax(0), layers[-1])),
         "said": ("token", grid["answer"].values)},
        coords=grid["answer"].drop_vars("answer").coords,
        attrs={"model": model.name, "lens": grid.attrs["lens"], "kl": kl,
               "provenance": with_method(run.provenance, "decided_at", tokens=grid["token"].values.tolist(), kl=kl,
                                         lens=None if lens is None else lens.digest)},
    )
    return out.isel(token=0) if single else out


def _stays(holds: np.ndarray) -> np.ndarray:
    """holds (layer, token) bool -> first layer from which on it holds; the last layer where it does not hold there."""
    broken = np.flip(~holds, 0)
    last_broken = len(holds) - 1 - broken.argmax(0)
    return np.where(broken.any(0), np.minimum(last_broken + 1, len(holds) - 1), 0)
