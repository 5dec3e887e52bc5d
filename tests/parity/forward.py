"""float32 end to end: every site of every layer, from the same ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import gptoss_workbench as wb
from tests.parity.cases import DEEP, EMBEDDED, Pair
from tests.parity.rows import Row, bits_differ, max_abs, max_of_largest, rel_l2, worst
from tests.parity.theirs import Trace, trace

AGAINST = "transformers"
ROUTES = "router.experts"

Measure = Callable[[Tensor, Tensor], float]


def sites(pair: Pair) -> list[Row]:
    """Every site of the forward pass, by layer; then the logits and the routes."""
    ours, theirs = pair.ours(), pair.theirs()
    runs = [ours.run(ids, capture=list(wb.SITES)) for ids in pair.prompts]
    traces = [trace(theirs, ids) for ids in pair.prompts]
    together = "F32_DEEP_REL_L2" if pair.name == DEEP else "F32_REL_L2"
    rows = []
    for site in wb.SITES:
        if site == ROUTES:
            continue
        for metric, measure, limit in (("rel L2", rel_l2, together),
                                       ("max abs / largest", max_of_largest, "F32_OF_LARGEST")):
            by_layer = per_layer(site, runs, traces, measure)
            rows.append(Row("float32", pair.name, site, AGAINST, "float32", metric, worst(by_layer), limit, by_layer,
                            line="float32, every site"))
    return [*rows, *masks(pair, runs, traces), *routes(pair, runs, traces), *logits(pair, runs, traces)]


def per_layer(site: str, runs: Sequence, others: Sequence, measure: Measure) -> tuple[float, ...]:
    """A metric of one site in each layer (one entry for a site outside the layers), the worst over the prompts.

    Scores are -inf where a query may not look, which counts as zero here: ``masks`` compares the places.
    """
    if site == "attn.scores":
        return _by_layer(site, runs, others, lambda ours, theirs: measure(_visible(ours), _visible(theirs)))
    return _by_layer(site, runs, others, measure)


def _by_layer(site: str, runs: Sequence, others: Sequence, measure: Measure) -> tuple[float, ...]:
    layers = range(len(runs[0].model.weights.layers)) if wb.SITES[site].per_layer else [None]
    return tuple(worst([measure(run.tensor(site, layer), other.tensor(site, layer))
                        for run, other in zip(runs, others)]) for layer in layers)


def _visible(scores: Tensor) -> Tensor:
    return scores.masked_fill(scores.isinf(), 0)


def masks(pair: Pair, runs: list, traces: list[Trace]) -> list[Row]:
    """Which keys each query may look at: one wrong place is a failure."""
    def differ(ours: Tensor, theirs: Tensor) -> float:
        return float((ours.isinf() != theirs.isinf()).sum())

    by_layer = _by_layer("attn.scores", runs, traces, differ)
    count = sum(run.tensor("attn.scores").numel() for run in runs)
    return [Row("float32", pair.name, "who sees whom", AGAINST, "float32", "places that differ", worst(by_layer),
                "NONE", by_layer, count=count, line="float32, who sees whom")]


def routes(pair: Pair, runs: list, traces: list[Trace]) -> list[Row]:
    """The chosen experts, in order."""
    def differ(ours: Tensor, theirs: Tensor) -> float:
        return float((ours != theirs).any(-1).double().mean())

    by_layer = _by_layer(ROUTES, runs, traces, differ)
    count = sum(len(run) for run in runs) * len(by_layer)
    return [Row("float32", pair.name, ROUTES, AGAINST, "float32", "share of token-layers that differ",
                worst(by_layer), "NONE", by_layer, count=count, line="float32, routes")]


@torch.no_grad()
def logits(pair: Pair, runs: list, traces: list[Trace]) -> list[Row]:
    """Next-token logits in their own unit, with both expert kernels of transformers."""
    limit = {EMBEDDED: "EMBEDDED_LOGITS_F32", DEEP: "DEEP_LOGITS_F32"}.get(pair.name, "TINY_LOGITS_F32")
    theirs = pair.theirs()
    grouped = [theirs(torch.tensor([ids])).logits[0] for ids in pair.prompts]
    kernel = theirs.get_experts_implementation()[""]
    found = []
    for against, wanted in ((AGAINST, [other.tensor("logits") for other in traces]),
                            (f"{AGAINST}, {kernel}", grouped)):
        value = worst([max_abs(run.logits, want) for run, want in zip(runs, wanted)])
        found.append(Row("float32", pair.name, "logits", against, "float32", "max abs", value, limit,
                         line="float32, logits"))
    return found


def clamps(pair: Pair) -> list[Row]:
    """Evidence that both clamps bite: how many values lie beyond them, in our run and in theirs."""
    limit = pair.ours().config.swiglu_limit
    run = pair.ours().run(pair.prompts[0], capture=["expert.gate", "expert.up"])
    other = trace(pair.theirs(), pair.prompts[0])
    rows = []
    for who, of in (("ours", run.tensor), ("theirs", other.tensor)):
        for what, site, beyond in ((f"gate above {limit:g}", "expert.gate", lambda x: x > limit),
                                   (f"linear part above {limit:g}", "expert.up", lambda x: x > limit),
                                   (f"linear part below -{limit:g}", "expert.up", lambda x: x < -limit)):
            by_layer = tuple(float(beyond(of(site, layer)).double().mean())
                             for layer in range(pair.ours().config.num_hidden_layers))
            rows.append(Row("clamps", pair.name, what, who, "float32", "share of values", min(by_layer),
                            "CLAMPED", by_layer, at_least=True, line=""))
    return rows


def hooks(pair: Pair) -> list[Row]:
    """Looking changes nothing: logits with every site captured have the bits of logits with none."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        plain, watched = (pair.ours(dtype).run(pair.prompts[0], capture=what).logits for what in (None, list(wb.SITES)))
        rows.append(Row("captures", pair.name, "logits, nothing captured", "ours, all sites captured", dtype,
                        "values that differ in a bit", bits_differ(plain, watched), "NONE", count=plain.numel()))
    return rows
