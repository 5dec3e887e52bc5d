"""Methods that are one public call of the workbench each, asked as a user would ask it."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any, Literal

import numpy as np
import xarray as xr

import gptoss_workbench as wb
from gptoss_workbench.model.model import Model
from gptoss_workbench.planted import Pair
from tests.truth.base import EXPERT, HEAD, WHERE, Method

SITES: dict[str, dict[str, Any]] = {
    "residual": {"site": "resid_pre"}, "head": {"site": "attn.z"}, "expert": {"site": "mlp.out", "by": "expert"},
    "router": {"site": "router.logits"},
}
TRACED = {"residual": "resid_pre", "attention": "attn.out", "mlp": "mlp.out"}


def attributed(model: Model, pair: Pair, kind: str, **how: Any) -> xr.Dataset:
    return wb.attribution(model, list(pair.clean), list(pair.corrupt), metric=pair.metric, **SITES[kind], **how)


def laid_out(values: xr.DataArray, kind: str) -> np.ndarray:
    """(layer, token[, head or expert]) -> (layer, index, token)."""
    if kind == "router":
        values = values.sum("expert")
    return values.values.astype(float).swapaxes(1, 2) if values.ndim == 3 else values.values.astype(float)[:, None]


def estimated(model: Model, pair: Pair, kind: str, method: Literal["gradient", "relp", "integrated"]) -> np.ndarray:
    """The estimates alone."""
    return laid_out(attributed(model, pair, kind, method=method, top=0, others=0)["estimate"], kind)


def patched_top(model: Model, pair: Pair, kind: str) -> np.ndarray:
    """Attribution as it comes without options: the ten places with the largest estimates, patched. 0 elsewhere."""
    return np.nan_to_num(laid_out(attributed(model, pair, kind, others=0)["exact"], kind))


@lru_cache(maxsize=64)
def traced(model: Model, pair: Pair, site: str) -> xr.DataArray:
    """Causal tracing with the tokens blurred in which the two prompts differ; the corrupt prompt is not used."""
    subject = [at for at, (one, other) in enumerate(zip(pair.clean, pair.corrupt, strict=True)) if one != other]
    return wb.causal_tracing(model, list(pair.clean), subject, metric=pair.metric, site=site)


def restored(model: Model, pair: Pair, site: str) -> np.ndarray:
    """The mean indirect effect over draws of the noise."""
    found = traced(model, pair, site)
    return (found - found["blurred"]).mean("noise").values.astype(float)[:, None]


def lost_to_noise(model: Model, pair: Pair, site: str) -> float:
    """The metric of the clean prompt minus that of the blurred one: the whole effect of causal tracing."""
    found = traced(model, pair, site)
    return float(found.attrs["clean"] - found["blurred"].mean())


def importance(model: Model, pair: Pair, mode: Literal["silence", "route_around"]) -> np.ndarray:
    """What the clean prompt loses without an expert in all its tokens: (layer, expert, 1)."""
    return wb.expert_importance(model, [list(pair.clean)], pair.metric, mode)["harm"].values.astype(float)


TELLS = {"residual": WHERE, "attention": WHERE, "mlp": WHERE, "router": WHERE, "head": HEAD, "expert": EXPERT}
CALLED = {"residual": "residual stream", "head": "heads", "expert": "experts", "router": "router",
          "attention": "attention", "mlp": "experts together"}

RELP = tuple(Method(f"RelP, {CALLED[kind]}", kind, partial(estimated, kind=kind, method="relp"), TELLS[kind])
             for kind in SITES)
CHECKED = tuple(Method(f"gradient, top 10 patched, {CALLED[kind]}", kind, partial(patched_top, kind=kind), TELLS[kind],
                       few=True)
                for kind in ("residual", "head", "expert"))
LAYERWISE = tuple(Method(f"integrated gradients by layer, {CALLED[kind]}", kind,
                         partial(estimated, kind=kind, method="integrated"), TELLS[kind], few=True)
                  for kind in ("residual", "head", "expert"))
TRACING = tuple(Method(f"causal tracing, {CALLED[kind]}", kind, partial(restored, site=site), TELLS[kind],
                       whole=partial(lost_to_noise, site=site), few=True) for kind, site in TRACED.items())
IMPORTANCE = (
    Method("expert importance, silenced", "expert", partial(importance, mode="silence"), ("layer", "expert")),
    Method("expert importance, routed around", "expert", partial(importance, mode="route_around"), ("layer", "expert")),
)
