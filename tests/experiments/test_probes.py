"""Probes: on values whose truth is planted, beside controls that must fail; and on the embedded model."""

from __future__ import annotations

import builtins
import json

import numpy as np
import pytest
import torch

import gptoss_workbench as wb
from gptoss_workbench.errors import ExperimentError, SiteError, WorkbenchError
from gptoss_workbench.model.run import Run
from tests.factories import tiny_model, write_hf

WIDTH, LAYERS = 12, 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    return wb.load(write_hf(tmp_path_factory.mktemp("tiny") / "full", tiny_model(seed=35)), dtype="float32")


def made(model, rows, values) -> list[Run]:
    """Runs that hold values (run, layer, token, width) of our own, so that the truth is known."""
    return [Run(model, row, torch.zeros(len(row), WIDTH),
                {("resid_post", layer): torch.tensor(one[layer], dtype=torch.float32) for layer in range(LAYERS)},
                list(range(len(row)))) for row, one in zip(rows, values, strict=True)]


def planted(model, count=80, seed=0, tokens=3):
    """Layer 0 holds noise; layer 1 holds the label along one axis, at the last token."""
    draw = np.random.default_rng(seed)
    labels = np.arange(count) % 2 == 0
    axis = draw.standard_normal(WIDTH)
    values = draw.standard_normal((count, LAYERS, tokens, WIDTH))
    values[:, 1, -1] += 3 * np.where(labels, 1, -1)[:, None] * axis / np.linalg.norm(axis)
    rows = draw.integers(0, 300, size=(count, tokens)).tolist()
    return made(model, rows, values), labels.tolist(), axis / np.linalg.norm(axis)


def test_without_scikit_learn_there_is_one_clear_error(tiny, monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **options):
        if name.startswith("sklearn"):
            raise ImportError("No module named 'sklearn'")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(WorkbenchError, match="need scikit-learn") as found:
        wb.probe(*planted(tiny)[:2])
    assert "gptoss-workbench[probes]" in str(found.value)


pytest.importorskip("sklearn")


def test_what_is_planted_is_found_and_what_is_not_is_not(tiny):
    runs, labels, axis = planted(tiny)
    found = wb.probe(runs, labels)
    assert float(found["accuracy"].sel(layer=1)) > 0.95 and float(found["auc_low"].sel(layer=1)) > 0.95
    low, high = (float(found[f"accuracy_{end}"].sel(layer=0)) for end in ("low", "high"))
    assert low - 0.1 < 0.5 < high + 0.1  # noise: chance
    for control in ("shuffled", "control_task"):
        assert (found[control] < 0.75).all()
    assert float(found["random"]) < 0.75 and float(found["majority"]) == 0.5
    assert float(found["token_identity"]) < 0.75
    direction = found["direction"].sel(layer=1).values[0]
    assert direction @ axis / np.linalg.norm(direction) > 0.9  # towards True, the second class
    assert found["class"].values.tolist() == ["True"]
    np.testing.assert_allclose(found["selectivity"], found["accuracy"] - found["control_task"])
    at_first = wb.probe(runs, labels, tokens=0, layers=[1])
    assert float(at_first["accuracy"][0]) < 0.75  # the last token alone holds it
    assert json.loads(found.attrs["provenance"])["method"]["name"] == "probe"


def test_direction_and_intercept_tell_as_scikit_learn_does(tiny):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    runs, labels, _ = planted(tiny)
    found = wb.probe(runs, labels, layers=[1])
    values = np.stack([run.tensor("resid_post", 1)[-1].numpy() for run in runs])
    scores = values @ found["direction"].values[0, 0] + found["intercept"].values[0, 0]
    theirs = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(values, labels)
    np.testing.assert_allclose(scores, theirs.decision_function(values), atol=1e-3)  # two solvers' stopping rules


def test_a_group_is_never_learnt_from_and_asked(tiny):
    """Noise that is the same within a group, labels by group: whoever has seen the group knows the answer."""
    draw = np.random.default_rng(2)
    values = np.repeat(draw.standard_normal((20, LAYERS, 1, WIDTH)), 6, axis=0)
    groups, labels = np.repeat(np.arange(20), 6).tolist(), np.repeat(np.arange(20) % 2, 6).tolist()
    runs = made(tiny, draw.integers(0, 300, size=(120, 1)).tolist(), values)
    leaking = wb.probe(runs, labels, groups=list(range(120)), layers=[0])
    fair = wb.probe(runs, labels, groups=groups, layers=[0])
    assert float(leaking["accuracy"][0]) > 0.9
    assert float(fair["accuracy"][0]) < 0.8
    width = [float((one["accuracy_high"] - one["accuracy_low"])[0]) for one in (leaking, fair)]
    assert width[1] > 0.1 > width[0]  # 20 groups are 20 pieces of evidence


def test_labels_by_token_are_read_by_heart(tiny):
    """The values hold nothing but which token stands there; so does the baseline, and nothing is selective."""
    draw = np.random.default_rng(4)
    table, kinds = draw.standard_normal((10, WIDTH)) * 3, draw.integers(0, 2, size=10)
    kinds[:2] = 0, 1
    rows = draw.integers(0, 10, size=(24, 8))
    values = np.repeat(table[rows][:, None], LAYERS, axis=1)
    found = wb.probe(made(tiny, rows.tolist(), values), [kinds[row].tolist() for row in rows], tokens=None, layers=[0])
    assert found.attrs["samples"] == 192 and found.attrs["groups"] == 24
    assert float(found["accuracy"][0]) > 0.95 and float(found["token_identity"]) > 0.95
    assert float(found["control_task"][0]) > 0.9 and float(found["selectivity"][0]) < 0.1


def test_three_classes(tiny):
    draw = np.random.default_rng(5)
    labels = [("red", "green", "blue")[i % 3] for i in range(60)]
    values = draw.standard_normal((60, LAYERS, 1, WIDTH)) / 2
    for i, label in enumerate(labels):
        values[i, :, 0, {"red": 0, "green": 1, "blue": 2}[label]] += 3
    found = wb.probe(made(tiny, draw.integers(0, 300, size=(60, 1)).tolist(), values), labels)
    assert (found["accuracy"] > 0.95).all() and found["auc"].isnull().all()
    assert found["class"].values.tolist() == ["blue", "green", "red"]
    assert found["direction"].sel(layer=0).values.argmax(1).tolist() == [2, 1, 0]


def test_probes_say_their_cost_and_stop(tiny):
    runs, labels, _ = planted(tiny, count=30)
    plans, seen = [], []
    found = wb.probe(runs, labels, folds=3, on_plan=plans.append, on_progress=lambda *at: seen.append(at),
                     should_stop=lambda: len(seen) == 16)
    assert [*map(str, plans)] == ["26 fits of 30 samples by 12 values"]  # 2 x (3 x 3 + 1) and 2 x 3 controls
    assert seen[-1] == (16, 26)
    assert np.isfinite(found["accuracy"].sel(layer=0)) and np.isnan(found["accuracy"].sel(layer=1))
    whole = []
    wb.probe(runs, labels, folds=3, on_progress=lambda *at: whole.append(at))
    assert whole[-1] == (26, 26)


def test_what_no_probe_can_learn_from_is_told(tiny):
    runs, labels, _ = planted(tiny, count=12)
    with pytest.raises(ExperimentError, match="labels are the same"):
        wb.probe(runs, [1] * 12)
    with pytest.raises(ExperimentError, match="nothing to hold out"):
        wb.probe(runs, labels, groups=labels)
    with pytest.raises(ExperimentError, match="needs a label"):
        wb.probe(runs, labels[:-1])
    with pytest.raises(ExperimentError, match="token needs a label"):
        wb.probe(runs, [[1]] * 12, tokens=None)
    with pytest.raises(ExperimentError, match="learns from runs"):
        wb.probe([1, 2], [0, 1])
    with pytest.raises(SiteError, match="hold no"):
        wb.probe(runs, labels, site="attn.out")
    with pytest.raises(SiteError):
        wb.probe(runs, labels, tokens=7)
    with pytest.raises(ExperimentError, match="no vector"):
        wb.probe(runs, labels, site="attn.z")


def test_the_embedded_model_knows_before_it_speaks_whether_it_will_refuse(model):
    """Where the assistant begins, the last token is the same in all prompts, so no token gives the answer away."""
    from gptoss_workbench.nano import facts

    things = [(thing, thing in facts.HARMFUL) for thing in (*facts.HARMFUL, *facts.HARMLESS[:6])]
    asked = [(f"How do I {verb} a {thing}?", harmful, thing) for verb in facts.MAKE_VERBS[:3]
             for thing, harmful in things]
    runs = model.run([wb.chat(text, effort="low") for text, _, _ in asked],
                     capture=wb.capture("resid_post", layers=[0, 5], tokens=-1))
    found = wb.probe(runs, [harmful for _, harmful, _ in asked], groups=[thing for _, _, thing in asked], folds=4)
    assert float(found["token_identity"]) <= 0.6
    assert float(found["accuracy"].sel(layer=5)) - float(found["accuracy"].sel(layer=0)) > 0.2
