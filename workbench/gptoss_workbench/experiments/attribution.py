"""Attribution: what patching each place would do to a metric, estimated for all places and checked at the top."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import xarray as xr

from gptoss_workbench.experiments.attributed import places_of
from gptoss_workbench.experiments.attributing import AttributionPlan, Method, Work
from gptoss_workbench.experiments.metrics import Metric
from gptoss_workbench.experiments.watch import Watch
from gptoss_workbench.hooks.selection import Indices
from gptoss_workbench.model.model import Model, Prompt


def attribution(
    model: Model, clean: Prompt | Sequence[Prompt], corrupt: Prompt | Sequence[Prompt], *,
    metric: Metric | Sequence[Metric], site: str = "resid_pre", by: Literal["expert"] | None = None,
    layers: Indices = None, router: Literal["live", "frozen"] = "live", method: Method = "gradient", steps: int = 16,
    top: int = 10, others: int = 10, resume: xr.Dataset | None = None,
    on_plan: Callable[[AttributionPlan], object] | None = None,
    on_progress: Callable[[int, int], object] | None = None, should_stop: Callable[[], bool] | None = None,
) -> xr.Dataset:
    """For each place, how much the corrupt prompt's metric would change if that place held the clean run's value.

    The exact answer is one run a place (``wb.patching``). Estimated here for all places from a few passes, then
    computed exactly for the ``top`` ones, and for ``others`` drawn from the rest.

    Methods, with x the corrupt and x' the clean value of a place, summed over its features:

    - "gradient": (x' - x) . dM/dx at the corrupt run. Attribution patching: Nanda 2023; Syed et al. 2023 (arXiv
      2310.10348). One backward pass a pair. First order, so it fails where the metric bends: at norms, at saturated
      attention, and in early layers most.
    - "relp": (x' - x) . c, with c the slope under rules that take norms, activations and attention patterns as
      constants. Relevance patching: Jafari et al. 2025 (arXiv 2508.21258). The same cost. Chosen over AtP* (Kramar et
      al. 2024, arXiv 2403.00745) because most of a gpt-oss layer is norms and gated experts, which is what its rules
      are about and what AtP* leaves as it is. On the embedded model's capital fact (two pairs, live router) its
      correlation with exact patching of the residual stream is 0.92 and 0.93, the plain gradient's 0.75 and 0.53; of
      single heads neither is better throughout. It can't see what acts through queries and keys: there take
      "gradient" or "integrated".
    - "integrated": the slope averaged over ``steps`` points (Gauss-Legendre) between corrupt and clean, all tokens of
      a layer moving together. Integrated gradients: Sundararajan et al. 2017 (arXiv 1703.01365), with each layer's
      site as the input; ``site="embed"`` is theirs. Complete: the estimates of a layer sum to ``total``, the exact
      effect of patching the whole layer, as far as no choice of experts jumps on the way. Costs layers x steps
      backward passes a pair.

    Args:
        clean, corrupt: two prompts of equally many tokens, or two lists of prompts, all equally long, so that the
            tokens of all pairs face each other.
        metric: e.g. ``wb.logit_diff(" Paris", " Rome")``; a list for one each pair. It must be differentiable.
        site: any site that has a gradient. Places are its dimensions without d_model, d_head, d_ff and vocab:
            ``resid_pre`` gives (layer, token), ``attn.z`` (layer, token, head), ``expert.out`` (layer, token, slot),
            ``router.logits`` (layer, token, expert), ``attn.pattern`` (layer, head, query, key).
        by: "expert" at ``mlp.out``: (layer, token, expert), what each expert adds to the stream, nothing where it
            does not serve. Unlike slots this stays the same expert when the two runs route differently.
        layers: which; None for all.
        router: "live" lets the estimate flow into the router through the weights of the chosen experts; "frozen" takes
            them as constants, and "integrated" also keeps the corrupt run's choices on its way. The exact checks are
            always of the model as it is, router and all.
        top: how many of the largest estimates are patched exactly.
        others: how many of the rest, drawn at random with seed 0, to see what the ranking may have missed.
        resume: an earlier result of the same question, stopped or not; only what is NaN in it is computed. ``top`` and
            ``others`` may differ.
        on_plan: called with an ``AttributionPlan`` before anything runs.
        on_progress: called with (passes done, passes in all).
        should_stop: asked between passes; True ends early and leaves NaN where nothing was computed.

    Returns:
        Dataset over the places, with ``pair`` before them where lists were given, in units of the metric (divide by
        ``clean - corrupt`` for the fraction recovered): ``estimate``; ``exact``, NaN where not checked;
        ``difference``, the L2 norm of x' - x; the metric of both prompts as ``clean`` and ``corrupt``; and for
        "integrated" ``total`` (layer). For lists also ``estimate_mean``, ``_low`` and ``_high`` (95 %, Student's), and
        the same of ``exact``. attrs hold the agreement over the top places: ``rank_correlation`` (Spearman),
        ``sign_agreement`` (share), and ``largest_other``, the largest exact effect found outside the top; and
        ``complete`` (else what is ``missing``) and the provenance. ``wb.checked(result)`` lists what was checked.

    Raises:
        ExperimentError: prompts that do not face each other, a metric without a gradient, or a result to resume that
            is of another question.
        SiteError: the site does not exist or has no gradient under this method.

    Pitfalls: An estimate is no measurement: report ``exact``. The rank correlation is over the top only, so it is lower
    than over all places, and it says nothing of what was missed; ``largest_other`` does, as far as it was drawn. The
    choice of experts has no gradient: a place that acts by rerouting shows in ``exact`` alone. Effects do not add up
    over layers. An interval over pairs is about prompts like these and supposes that effects spread about normally.
    How often each method puts the right place first where it is known: docs/truth.md.
    """
    work = Work(model, clean, corrupt, metric, places_of(model, site, by, layers), router, method, steps, top, others)
    work.start(resume, Watch(on_plan, on_progress, should_stop))
    with torch.no_grad():
        work.compute()
    return work.result()
