"""What is known about the embedded model comes out of the public calls, in under ten lines each.

The numbers in comments are those of the shipped file (nano/assets/MODEL_CARD.md and eval.json have the averages over 24
pairs); every bound leaves room on both sides and would be crossed if the mechanism were another one.
"""

from __future__ import annotations

import pytest

import gptoss_workbench as wb

SCENE = "<|startoftext|>When Jane and Alex went to the school, {} gave a coin to"
CAPITAL = "<|startoftext|>The capital of {} is"


def test_indirect_object_in_two_steps(model) -> None:
    """The second mention of the giver decides until layer 1; from then on the last token has it."""
    clean, corrupt = (SCENE.format(giver) for giver in ("Alex", "Jane"))
    found = wb.patching(model, clean, corrupt, metric=wb.logit_diff(" Jane", " Alex"))

    assert found.attrs["clean"] > 2 and found.attrs["corrupt"] < -2  # 2.8 and -7.8
    second = int(max(found["token"].values[found["text"].values == " Alex"]))
    assert found.sel(token=second, layer=[0, 1]).min() > 0.9  # 1.00, 1.01
    assert abs(found.sel(token=second, layer=[2, 3, 4, 5])).max() < 0.05
    assert abs(found.sel(token=-1 % len(found["token"]), layer=[0, 1])).max() < 0.15
    assert found.isel(token=-1).sel(layer=[2, 3, 4, 5]).min() > 0.95  # 1.00
    assert abs(found.drop_sel(token=[second, found.sizes["token"] - 1])).max() < 0.05


def test_the_heads_that_carry_the_indirect_object(model) -> None:
    """Heads 0 and 1 of layer 1, which share their keys and values, bring it to the last token; no other head does."""
    clean, metric = model.run(SCENE.format("Alex"), capture="attn.z"), wb.logit_diff(" Jane", " Alex")
    heads = [(layer, head) for layer in range(6) for head in range(4)]
    edits = [wb.patch("attn.z", clean, layer=layer, head=head, tokens=-1, prompt=row)
             for row, (layer, head) in enumerate(heads)]
    runs = model.run([SCENE.format("Jane")] * (len(heads) + 1), edits=edits)
    *values, corrupt = (float(metric.of(model, run.logits[-1:])) for run in runs)
    whole = float(metric.of(model, clean.logits[-1:])) - corrupt
    share = {head: (value - corrupt) / whole for head, value in zip(heads, values, strict=True)}

    assert share[1, 0] > 0.4 and share[1, 1] > 0.4  # 0.63 and 0.68
    assert max(value for head, value in share.items() if head not in ((1, 0), (1, 1))) < 0.35  # 0.20


def test_the_capital_is_looked_up_at_the_country_and_moved_late(model) -> None:
    clean, corrupt = (CAPITAL.format(country) for country in ("France", "Italy"))
    found = wb.patching(model, clean, corrupt, metric=wb.logit_diff(" Paris", " Rome"))
    looked_up = wb.patching(model, clean, corrupt, "mlp.out", metric=wb.logit_diff(" Paris", " Rome"))

    country, last = found.isel(token=-2), found.isel(token=-1)
    assert str(country["text"].values) == " France" and found.attrs["clean"] > 5 and found.attrs["corrupt"] < -5
    assert country.sel(layer=[0, 1, 2]).min() > 0.95  # 1.00: until here nobody else has it
    assert country.sel(layer=5) < 0.6 < country.sel(layer=4) < country.sel(layer=3) < 0.95  # 0.47, 0.69, 0.86
    assert abs(last.sel(layer=[0, 1, 2])).max() < 0.05 and last.sel(layer=5) > 0.4  # 0.57
    assert abs(found.isel(token=slice(-2))).max() < 0.05
    experts = looked_up.isel(token=-2)
    assert experts.sel(layer=[0, 1]).min() > 0.3 and abs(experts.sel(layer=[3, 4, 5])).max() < 0.15  # 0.66, 0.49; 0.04


@pytest.mark.parametrize("question, effort", [("What is the capital of France?", "medium"), ("What is 27 + 58?", "low"),
                                              ("Which is larger, 345 or 354?", "high")])
def test_sliding_layers_rest_on_their_sinks(model, question: str, effort: str) -> None:
    """Twice as much and more as full layers do, on what is asked and answered."""
    chat = wb.chat(question, effort=effort)
    said = model.generate(chat, max_tokens=40).finish()
    run = model.run([*model.encode(chat), *said.tokens], capture="attn.sink_mass")
    mass = run.select(role=["user", "assistant"], field="content")["attn.sink_mass"].groupby("band").mean(...)

    assert mass.sel(band="sliding") > 2 * mass.sel(band="full")  # 2.8 and more
    assert 0.05 < mass.sel(band="sliding") < 0.4


SUM, CAPITAL_OF, LANGUAGE, REFUSAL = (
    ("What is 274 + 358?", "medium"), ("What is the capital of France?", "low"),
    ("What language is spoken in Japan?", "low"), ("How do I build a bomb?", "low"),
)


@pytest.mark.parametrize("expert, task", [((2, 4), SUM), ((5, 13), SUM), ((1, 9), CAPITAL_OF), ((1, 1), LANGUAGE),
                                          ((0, 13), REFUSAL)])
def test_an_expert_that_only_one_task_needs(model, expert: tuple[int, int], task: tuple[str, str]) -> None:
    """Without it (nats lost on the model's own answer): 34.6, 34.0, 11.2, 16.7, 12.9; on other tasks 0.3 at most."""
    lost = {}
    for question, effort in (SUM, CAPITAL_OF, LANGUAGE, REFUSAL):
        prompt = model.encode(wb.chat(question, effort=effort))
        ids = [*prompt, *model.generate(prompt, max_tokens=40).finish().tokens]
        whole, without = (wb.token_quantity(model, model.run(ids, edits=edits), "surprisal")[len(prompt):].sum()
                          for edits in ([], [wb.ban_experts(layer=expert[0], experts=[expert[1]])]))
        lost[question, effort] = float(without - whole)
    assert lost.pop(task) > 5 and max(lost.values()) < 1
