"""A research workbench for the gpt-oss models: load, look inside, change one thing, see what it did.

    import gptoss_workbench as wb
    model = wb.load()
    run = model.run(wb.chat("What is 27 + 58?", effort="high"), capture=["resid_post", "router"])

Names load on first use, so importing the package costs nothing and brings in neither torch nor xarray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "load": "model.model", "Model": "model.model", "Run": "model.run", "Generation": "model.generation",
    "verify": "model.verify", "doctor": "checkup",
    "chat": "harmony.conversation", "open_data": "store.saved",
    "capture": "hooks.capture", "SITES": "hooks.sites", "POOLED": "hooks.sites", "where": "hooks.selection",
    "set": "hooks.edits", "add": "hooks.edits", "scale": "hooks.edits", "zero": "hooks.edits", "mean": "hooks.edits",
    "noise": "hooks.edits", "patch": "hooks.edits", "steer": "hooks.edits", "project": "hooks.edits",
    "apply": "hooks.edits", "edit_from_json": "hooks.serial",
    "cut_attention": "hooks.attention", "pin_attention": "hooks.attention", "scale_sink": "hooks.attention",
    "silence_experts": "hooks.routing", "ban_experts": "hooks.routing", "route_around": "hooks.routing",
    "force_experts": "hooks.routing", "swap_experts": "hooks.routing", "router_temperature": "hooks.routing",
    "replay_routes": "hooks.routing",
    "patching": "experiments.patching", "logit_diff": "experiments.metrics", "Metric": "experiments.metrics",
    "probability": "experiments.metrics", "rank": "experiments.metrics", "kl_divergence": "experiments.metrics",
    "causal_tracing": "experiments.causal_tracing", "path_patching": "experiments.path_patching",
    "summarize": "experiments.uncertainty", "sweep": "experiments.sweep", "ProgressLine": "experiments.watch",
    "logit_lens": "experiments.lens", "next_tokens": "experiments.lens",
    "lens_grid": "experiments.lens_grid", "LENS_SITES": "experiments.lens_grid", "decided_at": "experiments.decided",
    "tuned_lens": "experiments.tuned_lens", "TunedLens": "experiments.tuned_lens",
    "tuned_lens_kl": "experiments.tuned_lens",
    "routing_stats": "experiments.routing", "expert_coactivation": "experiments.routing",
    "expert_profile": "experiments.expert_profile", "expert_importance": "experiments.importance",
    "compare_runs": "experiments.compare",
    "expert_usage": "experiments.usage", "token_quantity": "experiments.quantities",
    "TOKEN_QUANTITIES": "experiments.quantities",
    "head_contributions": "experiments.decompose", "expert_contributions": "experiments.decompose",
    "decompose_residual": "experiments.decompose", "COMPONENT_SITES": "experiments.parts",
    "direct_logit_attribution": "experiments.direct_attribution", "gradients": "experiments.gradients",
    "contrast": "experiments.directions", "refusal_direction": "experiments.directions",
    "effort_direction": "experiments.directions", "dose_response": "experiments.dose",
    "probe": "experiments.probes", "SAE": "hooks.sae", "load_sae": "hooks.sae_files",
    "steer_features": "hooks.sae",
    "attribution": "experiments.attribution", "AttributionPlan": "experiments.attributing",
    "checked": "experiments.agreement",
}
_ROOMS = ("errors", "harmony", "hooks", "model", "experiments", "plots", "store", "nano", "planted")

__all__ = [*_WHERE, *_ROOMS, "explore"]

if TYPE_CHECKING:
    from gptoss_workbench import errors, experiments, harmony, hooks, model, nano, planted, plots, store
    from gptoss_workbench.checkup import doctor
    from gptoss_workbench.experiments.agreement import checked
    from gptoss_workbench.experiments.attributing import AttributionPlan
    from gptoss_workbench.experiments.attribution import attribution
    from gptoss_workbench.experiments.causal_tracing import causal_tracing
    from gptoss_workbench.experiments.compare import compare_runs
    from gptoss_workbench.experiments.decided import decided_at
    from gptoss_workbench.experiments.decompose import decompose_residual, expert_contributions, head_contributions
    from gptoss_workbench.experiments.direct_attribution import direct_logit_attribution
    from gptoss_workbench.experiments.directions import contrast, effort_direction, refusal_direction
    from gptoss_workbench.experiments.dose import dose_response
    from gptoss_workbench.experiments.expert_profile import expert_profile
    from gptoss_workbench.experiments.gradients import gradients
    from gptoss_workbench.experiments.importance import expert_importance
    from gptoss_workbench.experiments.lens import logit_lens, next_tokens
    from gptoss_workbench.experiments.lens_grid import LENS_SITES, lens_grid
    from gptoss_workbench.experiments.metrics import Metric, kl_divergence, logit_diff, probability, rank
    from gptoss_workbench.experiments.parts import COMPONENT_SITES
    from gptoss_workbench.experiments.patching import patching
    from gptoss_workbench.experiments.path_patching import path_patching
    from gptoss_workbench.experiments.probes import probe
    from gptoss_workbench.experiments.quantities import TOKEN_QUANTITIES, token_quantity
    from gptoss_workbench.experiments.routing import expert_coactivation, routing_stats
    from gptoss_workbench.experiments.sweep import sweep
    from gptoss_workbench.experiments.tuned_lens import TunedLens, tuned_lens, tuned_lens_kl
    from gptoss_workbench.experiments.uncertainty import summarize
    from gptoss_workbench.experiments.usage import expert_usage
    from gptoss_workbench.experiments.watch import ProgressLine
    from gptoss_workbench.harmony.conversation import chat
    from gptoss_workbench.hooks.attention import cut_attention, pin_attention, scale_sink
    from gptoss_workbench.hooks.capture import capture
    from gptoss_workbench.hooks.edits import add, apply, mean, noise, patch, project, scale, set, steer, zero
    from gptoss_workbench.hooks.routing import (
        ban_experts,
        force_experts,
        replay_routes,
        route_around,
        router_temperature,
        silence_experts,
        swap_experts,
    )
    from gptoss_workbench.hooks.sae import SAE, steer_features
    from gptoss_workbench.hooks.sae_files import load_sae
    from gptoss_workbench.hooks.selection import where
    from gptoss_workbench.hooks.serial import edit_from_json
    from gptoss_workbench.hooks.sites import POOLED, SITES
    from gptoss_workbench.model.generation import Generation
    from gptoss_workbench.model.model import Model, load
    from gptoss_workbench.model.run import Run
    from gptoss_workbench.model.verify import verify
    from gptoss_workbench.store.saved import open_data


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    elif name in _ROOMS:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def explore(model: Model | None = None, **options: Any) -> Any:
    """The live dashboard of a model (the embedded one by default); needs a notebook. See ``gptoss_jupyter.explore``."""
    from gptoss_jupyter.explore import explore as open_dashboard

    return open_dashboard(model, **options)


def load_ipython_extension(ipython: Any) -> None:
    """``%load_ext gptoss_workbench``: the one arrow that points up, to the notebook face."""
    from gptoss_jupyter import load_ipython_extension as load_face

    load_face(ipython)


def unload_ipython_extension(ipython: Any) -> None:
    """``%unload_ext gptoss_workbench``."""
    from gptoss_jupyter import unload_ipython_extension as unload_face

    unload_face(ipython)
