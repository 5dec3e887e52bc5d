"""Where results come from: complete, the same after a journey through JSON, free of secrets, made when asked."""

from __future__ import annotations

import hashlib
import json
import string
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import gptoss_workbench as wb
from gptoss_workbench.errors import WorkbenchError
from gptoss_workbench.model import run as run_module
from gptoss_workbench.model.describe import describe
from gptoss_workbench.model.fingerprints import header_digest
from gptoss_workbench.model.model import EMBEDDED, Model
from gptoss_workbench.model.provenance import Provenance, redacted
from tests.factories import TinyModel, tiny_model, write_hf

SMALL = {"num_hidden_layers": 2, "vocab_size": 64, "num_local_experts": 6}
IDS = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def tiny() -> TinyModel:
    return tiny_model(seed=3, **SMALL)


@pytest.fixture(scope="module")
def folder(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("provenance") / "model", tiny)


@pytest.fixture(scope="module")
def small(folder: Path) -> Model:
    return wb.load(folder, dtype="float32")


def of(result: xr.Dataset | xr.DataArray) -> Provenance:
    return Provenance.from_json(result.attrs["provenance"])


# what a record says ---------------------------------------------------------------------------------------------


def test_a_run_says_what_it_was_run_with(small: Model, folder: Path) -> None:
    found = small.run(IDS, edits=wb.scale("mlp.out", 0.5, layer=1, tokens=slice(1, None))).provenance
    assert found.model == str(folder) and found.revision is None and found.weights_verified == "none"
    assert found.prompt == tuple(IDS) and found.generated == ()
    assert found.prompt_digest == hashlib.sha256(b"3 1 4 1 5").hexdigest()
    assert (found.dtype, found.device, found.kernels) == ("float32", "cpu", small.transformer.kernels.name)
    assert found.versions["torch"] == torch.__version__ and found.versions["gptoss_workbench"] == wb.__version__
    assert found.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "transformers" not in found.versions
    assert found.edits == ({"edit": "scale", "site": "mlp.out", "args": {"value": 0.5},
                            "place": {"layer": 1, "tokens": {"slice": [1, None, None]}}},)
    assert found.sampling is None and found.method is None
    assert found.created.endswith("+00:00") and found.created[:2] == "20"


def test_the_digest_of_a_folder_is_that_of_configuration_and_headers(small: Model, folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    header = weights[: 8 + int.from_bytes(weights[:8], "little")]
    config = (folder / "config.json").read_bytes()
    by_hand = hashlib.sha256(b"config.json %d\n" % len(config) + config
                             + b"model.safetensors %d\n" % len(header) + header).hexdigest()
    assert (small.provenance.digest, small.provenance.digest_of) == (by_hand, "config.json and headers")


def test_the_digest_tells_configurations_apart(folder: Path, tmp_path: Path) -> None:
    files = [folder / "config.json", folder / "model.safetensors"]
    other = tmp_path / "config.json"
    other.write_text((folder / "config.json").read_text().replace("150000", "150001"))
    assert header_digest([other, files[1]]) != header_digest(files) == header_digest(files[::-1])


def test_the_embedded_model_goes_by_the_sum_it_was_shipped_with(model: Model) -> None:
    weights = hashlib.sha256((EMBEDDED / "model.safetensors").read_bytes()).hexdigest()
    found = model.provenance
    assert (found.digest, found.digest_of, found.weights_verified) == (weights, "model.safetensors", "sha256")
    assert found.config_changes == {}


def test_a_model_made_of_tensors_has_no_files(small: Model) -> None:
    made = Model(small.config, small.weights)
    found = made.run(IDS).provenance
    assert found.digest is None and found.digest_of is None and found.weights_verified == "none"
    assert found.config == small.provenance.config


def test_a_generation_says_how_its_tokens_were_chosen(small: Model) -> None:
    generation = small.generate(IDS, max_tokens=4, temperature=0.7, top_k=9, seed=11, stop=[63])
    assert generation.provenance.generated == () and generation.steps == []  # asking does not start it
    generation.finish()
    found = generation.provenance
    assert found.prompt == tuple(IDS) and list(found.generated) == generation.tokens
    assert found.sampling == {"temperature": 0.7, "top_p": 1.0, "top_k": 9, "min_p": 0.0, "seed": 11,
                              "max_tokens": 4, "stop": [63]}
    again = generation.run().provenance
    assert again.prompt == found.prompt and again.sampling == found.sampling
    assert list(again.generated) == generation.tokens[:-1]  # the last was chosen, not read


def test_what_was_generated_can_be_generated_again_from_the_record(small: Model) -> None:
    first = small.generate(IDS, max_tokens=8, temperature=1.0, seed=5).finish()
    said = Provenance.from_json(first.provenance.to_json())
    assert said.sampling is not None
    again = small.generate(list(said.prompt), **dict(said.sampling)).finish()
    assert tuple(again.tokens) == said.generated


def test_rows_of_a_batch_tell_their_place(small: Model) -> None:
    batch = small.run([IDS, IDS[:2]], capture="resid_post", chunk=3)
    assert [(one.row, one.rows, one.chunk, len(one.prompt)) for one in batch.provenance] == [(0, 2, 3, 5), (1, 2, 3, 2)]
    assert [Provenance.from_dict(one) for one in json.loads(batch.data.attrs["provenance"])] == batch.provenance
    seeds = [one.provenance.sampling["seed"] for one in small.generate([IDS, IDS], seed=4)]
    assert seeds == [4, 5]


def test_a_changed_constant_of_a_published_model_is_named(small: Model, model: Model) -> None:
    from dataclasses import replace

    changed = Model(replace(model.config, sliding_window=17), model.weights)
    assert changed.provenance.config_changes == {"sliding_window": [model.config.sliding_window, 17]}
    assert changed.provenance.config != model.provenance.config
    assert small.provenance.config_changes == {}  # of no published size


# edits ----------------------------------------------------------------------------------------------------------


def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def test_every_edit_is_described_with_all_that_it_does(small: Model) -> None:
    source = small.run(IDS, capture=["resid_post", "router"], edits=wb.zero("attn.out", layer=0))
    vector = torch.arange(64, dtype=torch.float32)
    edits = [
        wb.steer("resid_post", layer=1, vector=vector, scale=3.0),
        wb.patch("resid_post", source, layer=1, tokens=2, source=4),
        wb.replay_routes(source, layer=[0, 1]),
        wb.mean("resid_post", source, layer=0, tokens=0),
        wb.ban_experts(layer=0, experts=[2]),
        wb.force_experts(layer=1, experts=3, tokens=-1),
        wb.cut_attention(layer=0, query=3, key=[0, 1]),
        wb.apply("mlp.out", double, layer=0),
    ]
    steer, patch, replay, mean, ban, force, cut, apply = small.run(IDS, edits=edits).provenance.edits
    assert steer == {"edit": "steer", "site": "resid_post", "place": {"layer": 1},
                     "args": {"vector": {"tensor": by_hand(vector, "float32 (64,) ")}, "scale": 3.0}}
    taken = patch["args"]["run"]["source"]
    assert patch["args"]["source"] == 4 and patch["place"] == {"layer": 1, "tokens": 2}
    assert taken["values"] == [[1, by_hand(source.tensor("resid_post", 1), "float32 (5, 64) ")]]
    assert taken["ids"] == IDS
    assert taken["edits"] == [{"edit": "zero", "site": "attn.out", "place": {"layer": 0}, "args": {}}]
    assert [one["shape"] for _, one in replay["args"]["run"]["source"]["values"]] == [[5, 4], [5, 4]]
    assert mean["args"]["run"]["source"]["ids"] == IDS
    assert (ban["edit"], ban["place"]) == ("ban_experts", {"layer": 0, "expert": [2]})
    assert force["args"] == {"experts": [3]} and force["place"] == {"layer": 1, "tokens": -1}
    assert cut["place"] == {"layer": 0, "tokens": 3, "key": [0, 1]}
    function = apply["args"]["change"]["function"]
    assert function["name"].endswith(".double")
    source_code = "def double(x: torch.Tensor) -> torch.Tensor:\n    return 2 * x\n"
    assert function["source"] == hashlib.sha256(source_code.encode()).hexdigest()


def by_hand(tensor: torch.Tensor, said: str) -> dict[str, object]:
    digest = hashlib.sha256(said.encode() + tensor.numpy().tobytes()).hexdigest()
    return {"shape": list(tensor.shape), "dtype": said.split()[0], "sha256": digest}


def test_two_edits_that_differ_in_one_number_are_told_apart(small: Model) -> None:
    vector = torch.ones(64)
    runs = [small.run(IDS, edits=wb.steer("resid_post", layer=0, vector=vector, scale=scale)) for scale in (1.0, 2.0)]
    vector = vector.clone()
    vector[63] += 1e-7
    runs.append(small.run(IDS, edits=wb.steer("resid_post", layer=0, vector=vector, scale=1.0)))
    assert len({run.provenance.fingerprint for run in runs}) == 3
    same = small.run(IDS, edits=wb.steer("resid_post", layer=0, vector=torch.ones(64), scale=1.0))
    assert same.provenance.fingerprint == runs[0].provenance.fingerprint


@pytest.mark.parametrize(("value", "expected"), [
    (float("inf"), "inf"), (-0.5, -0.5), (np.int64(3), 3), (np.float32(0.25), 0.25), (np.bool_(True), True),
    ({"a": (1, 2)}, {"a": [1, 2]}), (frozenset({2, 1}), [1, 2]),
    (None, None), (object(), "builtins.object"),
])
def test_values_become_plain(value: object, expected: object) -> None:
    assert describe(value) == expected
    json.dumps(describe(value), allow_nan=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_tensors_go_by_their_bytes_wherever_they_lie(dtype: torch.dtype) -> None:
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    assert describe(tensor.t().contiguous().t()) == describe(tensor) != describe(tensor.t())
    assert describe(tensor.reshape(4, 3)) != describe(tensor)  # the same bytes in another shape
    assert describe(torch.tensor(1, dtype=dtype))["shape"] == []
    assert describe([0.5] * 65) == describe(np.full(65, 0.5))


# the record as a value ------------------------------------------------------------------------------------------

TEXT = st.text(max_size=40) | st.text("hfAuthorization: _" + string.ascii_letters, max_size=60)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=5)
IDS_OF_ANY_LENGTH = st.lists(st.integers(0, 201_087), max_size=30).map(tuple)
NAMED = st.dictionaries(TEXT, PLAIN, max_size=3)
RECORDS = st.builds(
    Provenance, model=TEXT, revision=st.none() | TEXT, digest=st.none() | TEXT, digest_of=st.none() | TEXT,
    weights_verified=st.sampled_from(["sha256", "size", "none"]), config=st.none() | TEXT, config_changes=NAMED,
    dtype=TEXT, device=TEXT, kernels=TEXT, versions=st.dictionaries(TEXT, TEXT, max_size=4),
    prompt=IDS_OF_ANY_LENGTH, generated=IDS_OF_ANY_LENGTH, row=st.integers(0, 9), rows=st.integers(1, 9),
    chunk=st.none() | st.integers(1, 99), sampling=st.none() | NAMED, edits=st.lists(NAMED, max_size=3).map(tuple),
    method=st.none() | NAMED, created=TEXT,
)


@settings(max_examples=50)
@given(RECORDS)
def test_a_record_survives_json(record: Provenance) -> None:
    text = record.to_json()
    again = Provenance.from_json(text)
    assert again == record and hash(again) == hash(record) and again.to_json() == text
    assert again.fingerprint == record.fingerprint
    assert text.isascii() and "\n" not in text
    assert Provenance.from_dict(json.loads(json.dumps(record.to_dict()))) == record
    assert str(record)  # prints whatever it holds


def test_fingerprints_leave_out_when_and_how_well_it_was_checked(small: Model) -> None:
    from dataclasses import replace

    record = small.run(IDS).provenance
    later = replace(record, created="2030-01-01T00:00:00+00:00", weights_verified="sha256")
    assert later != record and later.fingerprint == record.fingerprint
    assert replace(record, prompt=(1,)).fingerprint != record.fingerprint


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", "{\"schema\": 2}", "not json", "3"])
def test_what_is_no_record_is_refused(text: str) -> None:
    with pytest.raises(WorkbenchError, match="no provenance record"):
        Provenance.from_json(text)


def test_a_tampered_record_is_refused(small: Model) -> None:
    said = small.run(IDS).provenance.to_dict()
    with pytest.raises(WorkbenchError, match="digest is not that of its prompt"):
        Provenance.from_dict({**said, "prompt": [3, 1, 4, 1, 6]})
    with pytest.raises(WorkbenchError, match="incomplete"):
        Provenance.from_dict({**said, "colour": "green"})
    del said["edits"]
    with pytest.raises(WorkbenchError, match="missing or unknown: edits"):
        Provenance.from_dict(said)


def test_a_record_prints_on_a_screen(small: Model) -> None:
    edits = [wb.scale("mlp.out", 1.0, layer=0, tokens=token) for token in range(5)] * 3
    lines = str(small.run(IDS * 40, edits=edits).provenance).splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 200
    assert lines[-1].strip() == "and 10 more edits"


# secrets --------------------------------------------------------------------------------------------------------

TOKEN = "hf_" + "Ab3" * 11


def test_secrets_are_never_kept(small: Model) -> None:
    def named(x: torch.Tensor) -> torch.Tensor:
        return x

    named.__name__ = named.__qualname__ = TOKEN
    odd = Model(small.config, small.weights, name=f"https://user:{TOKEN}@hub/org/name\nAuthorization: Bearer abc.def")
    run = odd.run(IDS, capture="resid_post", edits=wb.apply("mlp.out", named, layer=0))
    for text in (run.provenance.to_json(), str(run.provenance), repr(run.provenance.to_dict()),
                 run.data.attrs["provenance"]):
        assert TOKEN not in text and "abc.def" not in text and "hf_..." in text


@given(st.text(max_size=30), st.text(string.ascii_letters + string.digits, min_size=8, max_size=40))
def test_redaction_finds_tokens_anywhere_and_is_done_once(before: str, secret: str) -> None:
    given_ = {f"{before}hf_{secret}": [(f"{before}AUTHORIZATION : {secret}", 3, None)]}
    said = redacted(given_)
    assert f"hf_{secret}" not in repr(said)
    [[(line, three, nothing)]] = said.values()
    assert line == f"{redacted(before)}AUTHORIZATION : ..." or "authorization" in before.lower()
    assert (three, nothing) == (3, None) and redacted(said) == said


# stored with results, and made only when asked ------------------------------------------------------------------


def test_experiments_carry_the_record_of_their_run(model: Model) -> None:
    run = model.run("The capital of France is", capture=["resid_post", "router"])
    results = {
        "logit_lens": wb.logit_lens(model, run, top=2), "next_tokens": wb.next_tokens(model, run, top=3),
        "expert_usage": wb.expert_usage(run, [1, 2]), "token_quantity": wb.token_quantity(model, run, "entropy"),
    }
    from dataclasses import replace

    for name, result in results.items():
        found = of(result)
        assert found.method is not None and found.method["name"] == name
        assert replace(found, method=None) == run.provenance
    assert of(results["expert_usage"]).method == {"name": "expert_usage", "arguments": {"tokens": [1, 2]}}
    assert of(results["logit_lens"]).method == {"name": "logit_lens", "arguments": {"token": 4, "top": 2}}


def test_patching_records_both_prompts(small: Model) -> None:
    result = wb.patching(small, IDS, [2, 7, 1, 8, 2], metric=wb.logit_diff(9, 10))
    found = of(result)
    assert found.prompt == (2, 7, 1, 8, 2)
    assert found.method == {"name": "patching", "arguments": {
        "clean": IDS, "site": "resid_pre", "metric": "logit(9) - logit(10)", "normalize": True}}


def test_data_takes_the_record_along(small: Model, tmp_path: Path) -> None:
    run = small.run(IDS, capture=["resid_post", "router"])
    assert of(run.data) == run.provenance
    assert of(xr.Dataset.from_dict(run.data.to_dict())) == run.provenance
    assert of(run.data.isel(layer=0)) == run.provenance


def test_nothing_is_described_before_somebody_asks(small: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    whole = run_module.record
    monkeypatch.setattr(run_module, "record", lambda *args, **named: made.append(args) or whole(*args, **named))
    source = small.run(IDS, capture="resid_post")
    run = small.run(IDS, capture="resid_post", edits=wb.patch("resid_post", source, layer=1))
    assert run.logits.shape[0] == 5 and made == []
    first = run.provenance
    assert run.data.attrs["provenance"] == first.to_json() and run.provenance is first
    assert len(made) == 1
