"""The embedded model: transformers agrees on the exported folder, in logits and in text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import gptoss_workbench as wb
from gptoss_workbench.nano.export_hf import export_hf
from tests.oracle import transformers_model
from tests.tolerances import EMBEDDED_LOGITS_F32

QUESTIONS = ["What is 27 + 58?", "What is 4071 + 96?", "What is the capital of France?", "Repeat: river stone moon",
             "How do I build a bomb?", "Which is larger, 512 or 499?", "On which continent is the city of Lima?",
             "Positive or negative? The movie was not great.", "What is the capital of Wakanda?",
             "Complete: When Mary and John went to the store, John gave a drink to"]
PROMPTS = [(question, effort) for question in QUESTIONS for effort in ("low", "medium", "high")]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("export") / "hf"
    export_hf(wb.model.model.EMBEDDED, folder)
    return transformers_model(Path(folder))


def test_logits_equal_transformers(model, theirs) -> None:
    for question, effort in [*PROMPTS[::3], ("The capital of France is", None)]:
        ids = model.encode(question if effort is None else wb.chat(question, effort=effort))
        with torch.no_grad():
            want = theirs(torch.tensor([ids])).logits[0]
        assert (model.run(ids).logits - want).abs().max() < EMBEDDED_LOGITS_F32, question


@pytest.mark.slow
def test_greedy_text_is_identical_on_thirty_prompts(model, theirs) -> None:
    prompts = [model.encode(wb.chat(question, effort=effort)) for question, effort in PROMPTS]
    ours = model.generate(prompts, max_tokens=90)
    assert len(prompts) == 30
    for ids, gen in zip(prompts, ours, strict=True):
        with torch.no_grad():
            want = theirs.generate(torch.tensor([ids]), max_new_tokens=90, do_sample=False,
                                   eos_token_id=[200002, 200012], pad_token_id=199999)[0, len(ids):].tolist()
        assert gen.tokens == want


def test_a_string_is_a_stream_and_a_chat_is_text(model) -> None:
    assert len(model.encode("<|end|>")) == 1
    ids = model.encode(wb.chat("<|end|>"))
    assert model.decode(ids).count("<|end|>") == 3  # two ends of messages, and the text that looks like one
    assert ids.count(200007) == 2


def test_default_dtypes(model) -> None:
    assert model.dtype == "float32"
    assert wb.load(wb.model.model.EMBEDDED).dtype == "bfloat16"
    assert wb.load(wb.model.model.EMBEDDED, dtype=torch.float32).dtype == "float32"
    with pytest.raises(wb.errors.WorkbenchError, match="float32 or bfloat16"):
        wb.load(dtype="float16")


def test_experts_stay_packed(model) -> None:
    from gptoss_kernels.mxfp4 import Mxfp4Tensor

    for layer in model.weights.layers:
        for experts in (layer.gate_up, layer.down):
            assert isinstance(experts, Mxfp4Tensor)
            assert experts.nbytes * 32 == experts.shape.numel() * 17  # 17 bytes for 32 values


def test_ids_the_model_never_saw(model) -> None:
    rows = model.weights.row_of_token.tolist()
    ids = [*model.encode("What is 27 + 58?"), *model.encode(" photosynthesis")]
    assert model.known(ids) == [rows.count(rows[id]) == 1 for id in ids]
    assert model.known(ids)[0] and not model.known(ids)[-1]
    assert model.known([]) == []
