"""bfloat16: what can be compared when one flipped route changes everything after it.

Each sublayer by itself, taught: every layer starts from transformers' float32 residual and every token goes to the
experts it went to there, so that only the rounding inside the sublayer is left. Then the whole model with those
routes replayed. Then how often routes flip when nobody replays them.
"""

from __future__ import annotations

import gptoss_workbench as wb
from tests.parity.cases import DEEP, Pair
from tests.parity.forward import per_layer
from tests.parity.rows import Row, rel_l2, worst
from tests.parity.theirs import Trace, trace

TAUGHT = tuple(site for site, spec in wb.SITES.items()
               if spec.per_layer and site not in ("resid_pre", "resid_mid", "resid_post", "router.experts"))
SUBLAYERS = ("attn.out", "mlp.out")
EXACT = "transformers float32"
ROUNDED = "transformers bfloat16"


def exact(pair: Pair) -> list[Trace]:
    """transformers in float32 on the pair's prompts: the teacher of what follows."""
    return [trace(pair.theirs(), ids) for ids in pair.prompts]


def sublayers(pair: Pair, teachers: list[Trace]) -> list[Row]:
    """Every site between a taught residual and what the sublayer adds to it, by layer."""
    ours, theirs = pair.ours("bfloat16"), pair.theirs("bfloat16")
    runs = [ours.run(ids, capture=list(TAUGHT), edits=[*_taught(teacher), wb.replay_routes(teacher)])
            for ids, teacher in zip(pair.prompts, teachers)]
    rows = []
    for site in TAUGHT:
        by_layer = per_layer(site, runs, teachers, rel_l2)
        rows.append(Row("bfloat16 sublayers", pair.name, site, EXACT, "bfloat16", "rel L2", worst(by_layer),
                        "BF16_SUBLAYER" if site in SUBLAYERS else "BF16_SITE", by_layer,
                        line="bfloat16, each sublayer" if site in SUBLAYERS else "bfloat16, sites inside sublayers"))
    others = [trace(theirs, ids, teacher, teacher) for ids, teacher in zip(pair.prompts, teachers)]
    for site in SUBLAYERS:
        by_layer = per_layer(site, runs, others, rel_l2)
        rows.append(Row("bfloat16 sublayers", pair.name, site, ROUNDED, "bfloat16", "rel L2", worst(by_layer),
                        "BF16_TWO", by_layer, line="bfloat16, each sublayer"))
        by_layer = tuple(worst([rel_l2(other.tensor(site, layer), teacher.tensor(site, layer))
                                for other, teacher in zip(others, teachers)]) for layer in range(len(by_layer)))
        rows.append(Row("bfloat16 sublayers", pair.name, f"{site}, transformers' own", EXACT, "bfloat16", "rel L2",
                        worst(by_layer), None, by_layer))
    return rows


def replayed(pair: Pair, teachers: list[Trace]) -> list[Row]:
    """The whole model in bfloat16 with the float32 routes, and transformers' own rounding for comparison."""
    ours, theirs = pair.ours("bfloat16"), pair.theirs("bfloat16")
    runs = [ours.run(ids, capture=["resid_post"], edits=[wb.replay_routes(teacher)])
            for ids, teacher in zip(pair.prompts, teachers)]
    others = [trace(theirs, ids, routes=teacher) for ids, teacher in zip(pair.prompts, teachers)]

    def row(what: str, against: str, metric: str, value: float, limit: str | None, by_layer: tuple = ()) -> Row:
        return Row("bfloat16, routes replayed", pair.name, what, against, "bfloat16", metric, value, limit, by_layer)

    def apart(ones: list, twos: list) -> float:
        return worst([rel_l2(one, two) for one, two in zip(ones, twos)])

    mine = [run.logits for run in runs]
    rounded, right = ([found.tensor("logits") for found in traces] for traces in (others, teachers))
    by_layer = per_layer("resid_post", runs, teachers, rel_l2)
    limit = "BF16_DEEP_REPLAYED" if pair.name == DEEP else "BF16_REPLAYED"
    own = apart(rounded, right)
    return [
        row("resid_post", EXACT, "rel L2", worst(by_layer), limit, by_layer),
        row("logits", EXACT, "rel L2", apart(mine, right), limit),
        row("logits", ROUNDED, "rel L2", apart(mine, rounded), limit),
        row("logits, transformers' own", EXACT, "rel L2", own, None),
        row("logits", EXACT, "error, times transformers' own", apart(mine, right) / own, "BF16_TIMES_THEIRS"),
    ]


def flips(pair: Pair, teachers: list[Trace]) -> list[Row]:
    """Share of (token, layer) whose set of experts differs: from the same input to each layer, and running free."""
    ours, theirs = pair.ours("bfloat16"), pair.theirs("bfloat16")
    single = [pair.ours().run(ids, capture=["router.experts"]) for ids in pair.prompts]
    rows = []
    for taught in (True, False):
        runs = [ours.run(ids, capture=["router.experts"], edits=_taught(teacher) if taught else [])
                for ids, teacher in zip(pair.prompts, teachers)]
        others = [trace(theirs, ids, teacher if taught else None) for ids, teacher in zip(pair.prompts, teachers)]
        setting, limit = ("same input to each layer", "BF16_FLIPS") if taught else ("running free", None)
        for who, against, ones, twos, bound in (
            ("ours", EXACT, runs, teachers, limit),
            ("ours", ROUNDED, runs, others, limit),
            ("ours", "ours float32", runs, single, limit),
            ("transformers' own", EXACT, others, teachers, None),
        ):
            by_layer = tuple(
                sum(_flipped(one.tensor("router.experts", layer), two.tensor("router.experts", layer))
                    for one, two in zip(ones, twos)) / sum(map(len, pair.prompts))
                for layer in range(ours.config.num_hidden_layers))
            rows.append(Row("route flips", pair.name, f"{setting}, {who}", against, "bfloat16", "share of token-layers",
                            sum(by_layer) / len(by_layer), bound, by_layer,
                            count=sum(map(len, pair.prompts)) * len(by_layer),
                            line="bfloat16, route flips from the same input"))
    return rows


def _taught(teacher: Trace) -> list:
    return [wb.patch("resid_pre", teacher), wb.patch("resid_mid", teacher)]


def _flipped(one, two) -> int:
    return int((one.sort(-1).values != two.sort(-1).values).any(-1).sum())
