"""Path patching on planted circuits: the edges by hand, the truth from places that were given, the two steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gptoss_workbench as wb
from gptoss_workbench.model.transformer import Transformer
from tests.tolerances import SITE_F32
from tests.truth import paths
from tests.truth.base import both, metric_of
from tests.truth.report import CIRCUITS


def test_true_edges_of_places_that_were_given() -> None:
    """Two query heads share a kv head, so head 3 hears with keys and values of group 1."""
    found = wb.planted.induction(0, previous=(0, 1), match=(2, 3), pairs=1)
    assert paths.true_edges(found) == ({(("head", 2, 3), ("logits",))}, {(("head", 0, 1), ("k", 2, 1))})
    found = wb.planted.route(0, expert=(1, 5), second_expert=(1, 2), mover=(3, 0), pairs=1)
    assert paths.true_edges(found)[1] == {(("expert", 1, 5), ("v", 3, 0)), (("expert", 1, 2), ("v", 3, 0))}
    found = wb.planted.sink_gate(0, switch=(1, 2), gated=(2, 2), pairs=1)
    assert paths.true_edges(found)[1] == {(("head", 1, 2), ("q", 2, 2))}
    found = wb.planted.band(0, head=(2, 1), pairs=1)
    assert paths.true_edges(found) == ({(("head", 2, 1), ("logits",))}, {(("embed",), ("v", 2, 0))})


@torch.no_grad()
@pytest.mark.parametrize("name", ["induction", "fact", "sink gate"])
def test_a_true_edge_by_hand(name: str) -> None:
    """What the sender writes more in the clean run goes into the stream before the receiver's layer, of which the one
    projection alone is kept: two runs with a tap each, no edit of the workbench."""
    planted = CIRCUITS[name](3, pairs=2)
    model, pair = planted.model, planted.pairs[0]
    ((sender, heard),) = paths.true_edges(planted)[1]
    (kind, layer, index), (letter, to, group) = sender, heard
    assert isinstance(layer, int) and isinstance(index, int) and isinstance(group, int)
    clean, corrupt = both(model, pair)
    if kind == "head":
        own = slice(index * model.config.head_dim, (index + 1) * model.config.head_dim)
        delta = (clean.tensor("attn.z", layer) - corrupt.tensor("attn.z", layer))[:, index] @ \
            model.weights.layers[layer].o_weight[:, own].T
    else:
        shares = [(run.tensor("router.weights", layer) * (run.tensor("router.experts", layer) == index))[..., None]
                  * run.tensor("expert.out", layer) for run in (clean, corrupt)]
        delta = (shares[0] - shares[1]).sum(1)
    plain = Transformer(model.config, model.weights, model.transformer.kernels, scores_at_once=None)
    batch, positions = model.pad_left([list(pair.corrupt)])
    kept: list[torch.Tensor] = []

    def hear(site: str, at: int | None, x: torch.Tensor, start: int = 0) -> torch.Tensor:
        if (site, at) == (f"attn.{letter}", to):
            kept.append(x.clone())
        return x + delta if (site, at) == ("resid_pre", to) else x

    def tell(site: str, at: int | None, x: torch.Tensor, start: int = 0) -> torch.Tensor:
        if (site, at) == (f"attn.{letter}", to):
            x = x.clone()
            x[:, :, group] = kept[0][:, :, group]
        return x

    plain(batch, positions, model.new_cache(1), hear)
    hidden = plain(batch, positions, model.new_cache(1), tell)[:, -1]
    want = float(pair.metric.of(model, plain.unembed(hidden))[0]) - metric_of(corrupt, pair)
    found = paths.gains(planted, pair, [heard])[paths.senders(planted).index(sender), 0]
    assert found == pytest.approx(want, abs=SITE_F32) and want > 3


def test_edges_are_named_in_their_order() -> None:
    """The strongest of a made-up table, one that is no edge, and one that is strong in one pair alone."""
    planted = wb.planted.fact(0, pairs=12)
    values = np.random.default_rng(0).normal(0, 0.01, (12, len(paths.senders(planted)), 2))
    values[:, 0], values[:, 5, 1], values[0, 7, 0] = np.nan, 10, 60
    step = paths.Step(planted, [("q", 1, 0), ("k", 1, 0)], values)
    true = (paths.senders(planted)[5], ("k", 1, 0))
    assert step.strongest(2) == [true, (paths.senders(planted)[7], ("q", 1, 0))]
    named, chance, share = step.verdict()
    assert named == {true} and chance < 0.001 and share > 0.25
    assert paths.written(true) == f"head {true[0][1]} {true[0][2]} to k 1 0"


@pytest.mark.parametrize("name", ["induction", "route", "sink gate", "faithful reasoning"])
def test_both_steps_name_the_path(name: str) -> None:
    first, second = paths.ask(CIRCUITS[name](11, pairs=12))
    for row in (first, second):
        assert row["hits"] == {"path": 1.0} and row["named"] == row["true"] and row["false"] == []


def test_without_a_circuit_it_stops_after_the_first_step() -> None:
    rows = paths.ask(wb.planted.no_circuit(1, like="induction", pairs=12))
    assert [row["method"] for row in rows] == [paths.TO_LOGITS]
    assert rows[0]["true"] == 0 and rows[0]["false"] == [] and "hits" not in rows[0]
