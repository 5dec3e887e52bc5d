"""Causal tracing and path patching against runs with every edit written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gptoss_workbench as wb
from gptoss_workbench.errors import ExperimentError
from tests.factories import tiny_model, write_hf
from tests.tolerances import PATCHED_F32, SITE_F32

CLEAN = [5, 17, 300, 8, 90, 91, 12, 3, 44, 210]
CORRUPT = [5, 17, 301, 8, 90, 77, 12, 3, 44, 210]
METRIC = wb.logit_diff(7, 450)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    return wb.load(write_hf(tmp_path_factory.mktemp("tiny") / "hf", tiny_model(seed=21)), dtype="float32")


def value(run) -> float:
    return float(run.logits[-1, 7] - run.logits[-1, 450])


@pytest.mark.parametrize("site, window", [("resid_post", 1), ("mlp.out", 3)])
def test_tracing_equals_runs_with_noise_and_restoring(tiny, site, window) -> None:
    found = wb.causal_tracing(tiny, CLEAN, [2, 3], metric=METRIC, site=site, window=window, seeds=2, scale=2.0)
    clean = tiny.run(CLEAN, capture=[site, "embed"])
    spread = 2.0 * float(clean.tensor("embed").std())
    for seed in range(2):
        blur = wb.noise("embed", spread, seed=seed, tokens=[2, 3])
        assert float(found["blurred"][seed]) == pytest.approx(value(tiny.run(CLEAN, edits=blur)), abs=PATCHED_F32)
        for layer, token in ((0, 1), (0, 2), (1, 3), (2, 9), (3, 9)):
            around = [at for at in range(4) if abs(at - layer) <= window // 2]
            run = tiny.run(CLEAN, edits=[blur, wb.patch(site, clean, layer=around, tokens=token)])
            assert float(found[seed, layer, token]) == pytest.approx(value(run), abs=PATCHED_F32)
    assert found.attrs["clean"] == pytest.approx(value(clean), abs=PATCHED_F32)
    assert found["subject"].values.nonzero()[0].tolist() == [2, 3]
    assert wb.summarize(found - found["blurred"], "noise")["mean"].dims == ("layer", "token")


def test_tracing_mistakes(tiny) -> None:
    for options, words in (({"site": "embed"}, "layer by token"), ({"seeds": 0}, "no noise"),
                           ({"scale": 0}, "no noise")):
        with pytest.raises(ExperimentError, match=words):
            wb.causal_tracing(tiny, CLEAN, 2, metric=METRIC, **options)


SENDERS = ["embed", ("head", 0, 3), ("expert", 0, 1), ("attn", 1), ("mlp", 1), ("head", 2, 5)]
RECEIVERS = [("q", 2, 4), ("k", 2, 1), ("v", 3, 0), ("expert", 2, 6), ("router", 2), ("mlp", 3), "logits"]


def test_paths_equal_runs_that_freeze_everything_between(tiny) -> None:
    """By hand: patch the sender and hold every other writer at its corrupt value, read what the receiver then gets,
    and put that alone into a corrupt run."""
    found = wb.path_patching(tiny, CLEAN, CORRUPT, SENDERS, RECEIVERS, metric=METRIC, normalize=False)
    inside = ["attn.q", "attn.k", "attn.v", "router.logits", "mlp.norm", "expert.gate", "expert.up", "router.experts",
              "resid_post"]
    writers = ["embed", "attn.z", "attn.out", "mlp.out", "expert.out", "router.experts", "router.weights"]
    clean, corrupt = (tiny.run(ids, capture=[*writers, *inside]) for ids in (CLEAN, CORRUPT))
    for row, sender in enumerate(SENDERS):
        name, *where = [sender] if isinstance(sender, str) else sender
        hold = [wb.patch(site, corrupt) for site in ("attn.out", "mlp.out")]
        if name == "embed":
            send = wb.patch("embed", clean)
        elif name in ("attn", "mlp"):
            send = wb.patch(f"{name}.out", clean, layer=where[0])
        elif name == "head":
            start = 16 * int(where[1])
            w = tiny.weights.layers[where[0]].o_weight[:, start:start + 16]
            change = (clean.tensor("attn.z", where[0]) - corrupt.tensor("attn.z", where[0]))[:, where[1]] @ w.T
            send = wb.add("attn.out", change, layer=where[0])
        else:
            shares = [(run.tensor("router.weights", where[0])[..., None] * run.tensor("expert.out", where[0])
                       * (run.tensor("router.experts", where[0]) == where[1])[..., None]).sum(1)
                      for run in (clean, corrupt)]
            send = wb.add("mlp.out", shares[0] - shares[1], layer=where[0])
        for column, receiver in enumerate(RECEIVERS):
            kind, *to = [receiver] if isinstance(receiver, str) else receiver
            got = float(found[row, column])
            before = bool(to) and where and (to[0], kind in ("expert", "router", "mlp")) <= (where[0], name in
                                                                                             ("expert", "mlp"))
            if before:
                assert np.isnan(got)
                continue
            heard = tiny.run(CORRUPT, capture=inside, edits=[*hold, send])
            if kind == "logits":
                last = wb.patch("resid_post", heard, layer=3)
            elif kind in ("q", "k", "v"):
                last = wb.patch(f"attn.{kind}", heard, layer=to[0], **{"head" if kind == "q" else "kv_head": to[1]})
            elif kind == "router":
                last = wb.patch("router.logits", heard, layer=to[0])
            elif kind == "mlp":
                last = wb.patch("mlp.norm", heard, layer=to[0])
            else:  # the experts as routed in the corrupt run, which heard the new stream
                heard = tiny.run(CORRUPT, capture=inside, edits=[*hold, send, wb.replay_routes(corrupt)])
                last = [wb.patch(site, heard, layer=to[0], expert=to[1]) for site in ("expert.gate", "expert.up")]
            want = value(tiny.run(CORRUPT, edits=last))
            assert got == pytest.approx(want, abs=PATCHED_F32), (sender, receiver)


def test_all_writers_together_are_the_clean_run(tiny) -> None:
    """Direct effects of everything, as one: the residual stream before the end."""
    parts = ["embed", *(("attn", layer) for layer in range(4)), *(("mlp", layer) for layer in range(4))]
    found = wb.path_patching(tiny, CLEAN, CORRUPT, parts, ["logits"], metric=METRIC)
    clean, corrupt = (tiny.run(ids, capture=["embed", "attn.out", "mlp.out", "resid_post"]) for ids in (CLEAN, CORRUPT))
    total = sum(clean.tensor(site).sum(0) - corrupt.tensor(site).sum(0) for site in ("attn.out", "mlp.out"))
    total = total + clean.tensor("embed") - corrupt.tensor("embed")
    whole = clean.tensor("resid_post", 3) - corrupt.tensor("resid_post", 3)
    torch.testing.assert_close(total, whole, rtol=0, atol=SITE_F32)
    assert found.shape == (9, 1) and np.isfinite(found).all() and found.dims == ("sender", "receiver")
    assert found["sender"].values[1] == "attn 0"


@pytest.mark.parametrize("senders, receivers", [([("head", 0)], ["logits"]), ([("head", 0, 8)], ["logits"]),
                                                ([("q", 0, 1)], ["logits"]), (["embed"], [("head", 1, 2)])])
def test_path_mistakes(tiny, senders, receivers) -> None:
    with pytest.raises(ExperimentError, match="end of an edge"):
        wb.path_patching(tiny, CLEAN, CORRUPT, senders, receivers, metric=METRIC)
