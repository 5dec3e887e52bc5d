"""The exported file: the training form and transformers agree on it, and the tokenizer is harmony's."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file

import gptoss_workbench as wb
from gptoss_workbench.harmony import load_vocabulary
from gptoss_workbench.nano import corpus, render
from gptoss_workbench.nano.batching import Rows, collate
from gptoss_workbench.nano.corpus import NO_PREFIX, Example
from gptoss_workbench.nano.export import Checkpoint, export
from gptoss_workbench.nano.export_hf import export_hf, merges
from gptoss_workbench.nano.quant import round_to_mxfp4
from gptoss_workbench.nano.training_model import Config, TrainingModel
from tests.oracle import transformers_model

TEXT = "<|start|>user<|message|>What is 123456 + 78?<|end|><|start|>assistant<|channel|>final<|message|>"

ROWS = Rows(tuple(sorted({*render.encode(TEXT), *range(1000, 1100)})))


@pytest.fixture(scope="module")
def trained() -> TrainingModel:
    """A small random model whose weights are already what the file can hold."""
    torch.manual_seed(1)
    model = TrainingModel(Config(rows=len(ROWS.ids) + 1, hidden_size=64, num_hidden_layers=3, num_local_experts=6,
                                 num_experts_per_tok=3, intermediate_size=32, sliding_window=6))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "sinks")):
                parameter.normal_()
            held = round_to_mxfp4(parameter) if name.endswith((".up", ".down")) else parameter.bfloat16().float()
            parameter.copy_(held)
    return model


@pytest.fixture(scope="module")
def folder(trained: TrainingModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compact")
    export(Checkpoint(trained.config, ROWS, trained.state_dict(), 0, 0), folder)
    return folder


def training_logits(model: TrainingModel, ids: list[int]) -> torch.Tensor:
    """(token, 201088) by the training form."""
    batch = collate([Example("any", NO_PREFIX, (), tuple(ids))], ROWS, model.config.sliding_window)
    with torch.no_grad():
        return torch.nn.functional.linear(model(batch)[0], model.unembedding)[:, ROWS.of_token()]


def test_the_engine_computes_what_was_trained(trained: TrainingModel, folder: Path) -> None:
    ids = render.encode(TEXT)
    logits = wb.load(folder, dtype="float32").run(ids).logits
    torch.testing.assert_close(logits, training_logits(trained, ids), atol=2e-5, rtol=1e-4)


def test_unpacked_experts_are_the_same_model(trained: TrainingModel, folder: Path, tmp_path: Path) -> None:
    export(Checkpoint(trained.config, ROWS, trained.state_dict(), 0, 0), tmp_path, packed=False)
    ids = render.encode(TEXT)
    first, second = (wb.load(one, dtype="float32").run(ids).logits for one in (folder, tmp_path))
    torch.testing.assert_close(first, second, atol=2e-5, rtol=1e-4)


def test_transformers_agrees_on_the_full_folder(trained: TrainingModel, folder: Path, tmp_path: Path) -> None:
    export_hf(folder, tmp_path, tokenizer=False)
    ids = render.encode(TEXT)
    with torch.no_grad():
        theirs = transformers_model(tmp_path)(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(theirs, training_logits(trained, ids), atol=2e-5, rtol=1e-4)


def test_the_full_folder_holds_every_row(folder: Path, tmp_path: Path) -> None:
    export_hf(folder, tmp_path, tokenizer=False)
    compact, full = (load_file(one / "model.safetensors") for one in (folder, tmp_path))
    rows = compact["row_of_token"].long()
    for name in ("model.embed_tokens", "lm_head"):
        assert torch.equal(full[f"{name}.weight"], compact[f"{name}.rows"][rows])
    assert set(full) == {n.replace(".rows", ".weight") for n in compact if n != "row_of_token"}
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [200002, 199999, 200012]


def test_exporting_twice_gives_the_same_bytes(trained: TrainingModel, folder: Path, tmp_path: Path) -> None:
    digest = export(Checkpoint(trained.config, ROWS, trained.state_dict(), 0, 0), tmp_path)
    assert (folder / "SHA256").read_text() == f"{digest}  model.safetensors\n"
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_merges_of_a_small_vocabulary() -> None:
    ranks = [b"a", b"b", b"ab", b"abb"]
    assert merges(ranks) == [(b"a", b"b"), (b"ab", b"b")]


@pytest.mark.slow
def test_the_tokenizer_is_harmonys(folder: Path, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    export_hf(folder, tmp_path)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    texts = [TEXT, "na\u00efve caf\u00e9", "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0",
             "def f(x):\r\n\treturn x**2  # ok\n\n",
             "e\u0301 \U0001f469\u200d\U0001f52c it's 1234567", "<|start|>assistant<|channel|>analysis<|message|>x"]
    for text in [*texts, *(render.decode(one.ids) for one in corpus.draw_step(Random(0), 20) if one.turn)]:
        assert theirs.encode(text, add_special_tokens=False) == load_vocabulary().encode(text)
        assert theirs.decode(theirs.encode(text, add_special_tokens=False)) == text
