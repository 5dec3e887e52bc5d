"""Path patching, scored by the edges it names instead of places.

Asked as one would ask it: first which heads, experts or embeddings speak to the logits directly, then who speaks to the
queries, keys and values of the head that came out strongest. An edge counts over all tokens together.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import gptoss_workbench as wb
from gptoss_workbench.planted import Pair, Place, Planted
from tests.truth.base import both, metric_of, whole_effect
from tests.truth.score import threshold

Node = tuple[str | int, ...]
Edge = tuple[Node, Node]

READS = {"induction": "k", "fact": "v", "route": "v", "sink gate": "q", "band": "v", "unfaithful reasoning": "v",
         "faithful reasoning": "v"}
"""By circuit, with what the head that writes the answer reads the sender, as it was built."""

LOGITS: Node = ("logits",)
TO_LOGITS, ONE_BACK = "path patching, to the logits", "path patching, to that head"


def writer(planted: Planted) -> Place:
    """The head that writes the answer."""
    return max(place for place in planted.truth if place.kind == "head" and place.role == "last")


def true_edges(planted: Planted) -> tuple[set[Edge], set[Edge]]:
    """Edges into the logits, and into the head that writes the answer: from the components before it, or from the
    embeddings where there are none."""
    last = writer(planted)
    before = {(place.kind, place.layer, place.index) for place in planted.truth - {last} if place.kind != "router"}
    heard = receivers(planted, ("head", last.layer, last.index))["qkv".index(READS[planted.name])]
    return {(("head", last.layer, last.index), LOGITS)}, {(sender, heard) for sender in before or {("embed",)}}


def senders(planted: Planted) -> list[Node]:
    config = planted.model.config
    sizes = {"head": config.num_attention_heads, "expert": config.num_local_experts}
    return [("embed",), *((kind, layer, index) for kind, count in sizes.items()
                          for layer in range(config.num_hidden_layers) for index in range(count))]


def receivers(planted: Planted, head: Node) -> list[Node]:
    """What a head hears with: queries of its own, keys and values of its group."""
    config, (_, layer, index) = planted.model.config, head
    group = int(index) // (config.num_attention_heads // config.num_key_value_heads)
    return [("q", layer, index), ("k", layer, group), ("v", layer, group)]


@dataclass(frozen=True, eq=False)
class Step:
    """One call's edges on every pair.

    Attributes:
        hears: the receivers.
        values: (pair, sender, receiver), what each edge adds to the corrupt prompt's metric, in logits; NaN where there
            is no such edge.
    """

    planted: Planted
    hears: list[Node]
    values: np.ndarray

    def edges(self, flat: Iterable[int]) -> list[Edge]:
        names = senders(self.planted)
        return [(names[at // len(self.hears)], self.hears[at % len(self.hears)]) for at in flat]

    def strongest(self, count: int | None = None) -> list[Edge]:
        """The edges with the largest mean effects, best first."""
        mean = np.nan_to_num(self.values.mean(0), nan=-np.inf)
        return self.edges(np.argsort(-mean, axis=None, kind="stable")[:count].tolist())

    def verdict(self) -> tuple[set[Edge], float, float]:
        """Edges at the threshold of score.py, the smallest chance and the largest share of any edge."""
        whole = np.array([whole_effect(self.planted.model, pair) for pair in self.planted.pairs])
        passed, chance, share = threshold(self.values, whole)
        return {*self.edges(np.flatnonzero(passed).tolist())}, float(chance.min()), float(np.nanmax(share))


def step(planted: Planted, hears: list[Node]) -> Step:
    return Step(planted, hears, np.stack([gains(planted, pair, hears) for pair in planted.pairs]))


def gains(planted: Planted, pair: Pair, hears: Sequence[Node]) -> np.ndarray:
    """(sender, receiver), see ``Step``."""
    found = wb.path_patching(planted.model, list(pair.clean), list(pair.corrupt), senders(planted), hears,
                             metric=pair.metric, normalize=False)
    return found.values - metric_of(both(planted.model, pair)[1], pair)


def ask(planted: Planted) -> list[dict[str, Any]]:
    """A row for each step. The second goes on from the head with the largest direct effect, and names an edge only if
    the first named that head: else picking the head by its effect would make its edges look large by chance. Without a
    circuit it is asked only then."""
    true = true_edges(planted) if planted.truth else (set(), set())
    begun = time.process_time()
    direct = step(planted, [LOGITS])
    rows = [_row(TO_LOGITS, direct, true[0], begun)]
    head = next(edge for edge in direct.strongest() if edge[0][0] == "head")
    goes_on = head in direct.verdict()[0]
    if planted.truth or goes_on:
        begun = time.process_time()
        rows.append(_row(ONE_BACK, step(planted, receivers(planted, head[0])), true[1], begun, goes_on))
    return rows


def _row(name: str, found: Step, true: set[Edge], begun: float, may_name: bool = True) -> dict[str, Any]:
    named, chance, share = found.verdict()
    named = named if may_name else set()
    row: dict[str, Any] = {"method": name, "kind": "path", "seconds": round(time.process_time() - begun, 2)}
    if true:
        row["hits"] = {"path": len(true & {*found.strongest(len(true))}) / len(true)}
    return row | {"true": len(true), "named": len(named & true), "false": sorted(map(written, named - true)),
                  "chance": chance, "share": round(share, 4)}


def written(edge: Edge) -> str:
    return " to ".join(" ".join(map(str, node)) for node in edge)
