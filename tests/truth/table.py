"""Tables of the results, in words and Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

CIRCUITS = (
    ("induction", "a previous-token head at the second token, a matching head at the last", "another first token"),
    ("fact", "the expert that holds the facts at the subject, the head that fetches them at the last", "the subject"),
    ("route", "two experts and the router at the subject, the head that fetches at the last", "the subject's kind"),
    ("sink gate", "the head that reads the switch, the head that its sink keeps quiet, both at the last", "the switch"),
    ("band", "the sliding head that copies the near letter, at the last", "near and far letter exchanged"),
    ("unfaithful reasoning", "the head that copies the hint, at the last", "letter, hint and written reasoning"),
    ("faithful reasoning", "the head that copies from the reasoning, at the last", "the same"),
)
TELLS = ("layer", "token", "head", "expert", "path")
SHARE, CHANCE, LENIENT = 0.25, 1 / 4096, 0.001  # of score.py, which the tests hold it to; and what is often used
Results = Mapping[str, Any]


def short(results: Results) -> str:
    """The table that is printed: hit rates by method over all circuits that have such a place."""
    return "\n\n".join([markdown(("method", "models", *TELLS), by_method(results)), *nothing(results)])


def by_method(results: Results) -> list[list[str]]:
    found = []
    for method in methods(results):
        rows = [row for row in asked(results["planted"], method) if row["hits"]]
        found.append([method, str(len(rows)), *(share([row["hits"][what] for row in rows if what in row["hits"]])
                                                for what in TELLS)])
    return found


def by_circuit(results: Results, what: Callable[[Mapping[str, Any]], float | None]) -> str:
    """One line a method, one column a circuit, of a number that ``what`` reads from a row."""
    circuits = list(dict.fromkeys(one["circuit"] for one in results["planted"]))
    lines = []
    for method in methods(results):
        cells = []
        for circuit in circuits:
            rows = asked([one for one in results["planted"] if one["circuit"] == circuit], method)
            cells.append(share([value for row in rows if (value := what(row)) is not None]))
        lines.append([method, *cells])
    return markdown(("method", *circuits), [line for line in lines if set(line[1:]) != {"–"}])


def all_hit(row: Mapping[str, Any]) -> float | None:
    """Whether everything that the method tells is right."""
    return None if not row["hits"] else float(min(row["hits"].values()) == 1)


def exactly_named(row: Mapping[str, Any]) -> float | None:
    """Whether the places named at the threshold are the true ones and no others."""
    return None if not row.get("true") else float(row["named"] == row["true"] and not row["false"])


def nothing(results: Results) -> list[str]:
    """What was named where there is nothing to name, one line a kind of model."""
    lines = []
    for group, title in (("blank", "Random models without a circuit"), ("cut", "Planted models, last head removed")):
        rows = measured(results[group])
        if rows:
            low, false = [row["chance"] <= 0.05 for row in rows], sum(len(row["false"]) for row in rows)
            lenient = sum(row["chance"] <= LENIENT and row["share"] >= SHARE for row in rows)
            lines.append(f"{title}: {len(results[group])} models, {len(rows)} examinations, "
                         f"{false} place{'s' * (false != 1)} named. "
                         f"{sum(low)} examinations ({sum(low) / len(low):.1%}) had a chance of 0.05 or less; at "
                         f"{LENIENT} instead of 1/{1 / CHANCE:.0f}, {lenient} would have named a place.")
    return lines


def measured(models: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for one in models for row in one["rows"] if "chance" in row]


def how_many(results: Results) -> str:
    """How many methods were asked about how many random models."""
    counts = Counter(row["method"] for one in results["blank"] for row in one["rows"] if "chance" in row)
    kinds = [(times, sum(n == times for n in counts.values())) for times in sorted({*counts.values()}, reverse=True)]
    return ", ".join(f"{many} methods about {times}" for times, many in kinds)


def minutes(results: Results) -> int:
    """Processor time of the methods."""
    models = [one for group in ("planted", "blank", "cut") for one in results[group]]
    return round(sum(row["seconds"] for one in models for row in one["rows"]) / 60)


def missed(results: Results) -> list[str]:
    """The goals that were not reached, in words."""
    wrong = []
    for one in results["planted"]:
        where = f"{one['circuit']}, seed {one['seed']}"
        if one["right"] < 1 or max(one["right without"]) == 1:
            wrong.append(f"{where}: the circuit does not work, or works without a part: {one['right']}, "
                         f"{one['right without']}")
        for row in one["rows"]:
            if row["method"].startswith("exact") and row["hits"] and min(row["hits"].values()) < 1:
                wrong.append(f"{where}: {row['method']} misses: {row['hits']}")
    wrong += alarms(results)
    return wrong


def alarms(results: Results) -> list[str]:
    """Examinations that name a place where there is nothing, in words."""
    words = {"blank": "the random model", "cut": "the cut model"}
    return [f"{row['method']}, {words[group]} of seed {one['seed']}, prompts of the {one['asked']}: "
            f"{', '.join(row['false'])} (chance {row['chance']:.5f}, {row['share']:.2f} of the whole)"
            for group in words for one in results[group] for row in one["rows"] if row.get("false")]


def methods(results: Results) -> list[str]:
    """In the order of the model that most were asked about."""
    models = sorted(results["planted"], key=lambda one: -len(one["rows"]))
    return list(dict.fromkeys(row["method"] for one in models for row in one["rows"]))


def asked(models: Iterable[Mapping[str, Any]], method: str) -> list[Mapping[str, Any]]:
    return [row for one in models for row in one["rows"] if row["method"] == method]


def share(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.0%}" if values else "–"


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def page(results: Results) -> str:
    """docs/truth.md."""
    about = results["about"]
    rows = [row for one in results["planted"] for row in one["rows"] if "named" in row]
    false = sum(len(row["false"]) for row in rows if row["method"].startswith("exact"))
    nulls = "\n".join(f"- {line}" for line in nothing(results))
    return f"""# What the methods find

Made by `make truth` ({about["seeds"]} models of each circuit, {about["pairs"]} prompt pairs each, background
{about["background"]}); change the text in tests/truth/table.py.

## The models

`wb.planted` makes small gpt-oss models (4 layers, sliding and full in turn, 4 heads with sinks, 8 experts of which 2
serve a token, YaRN) whose circuit is written into the weights: which head, which expert, at which token is not an
interpretation but how they were built. Every other weight is Gaussian noise; the stream is turned by a random rotation,
so no coordinate means anything; and beside every true component stands a decoy that looks at the same tokens, or serves
them, as firmly, and writes what nobody reads. Layers, heads, experts, tables and prompts are drawn from the seed.

{markdown(("circuit", "true places", "how the prompts differ"), CIRCUITS)}

That they are true is checked without any of the methods below: with every part the model says its answer, the circuit
alone says it too, and with any one part left out of the weights it does not (tests/truth/test_planted.py).

## Hit rates

Told how many true places there are, does the method put them first? Layer, token, head and expert are counted apart: a
method may find the right layer at the wrong token. A place counts at the token whose role it is in; the tokens without
a role count as one. For the residual stream, "token" asks at each layer's input which token carries the difference and
"layer" whether it moves from token to token in the right layers.

Exact patching is what `wb.patching` computes (a test holds every row to it, and to taps of the tests' own). Also asked
by the public call, with its options as they come:

- **Expert importance** (`wb.expert_importance`) takes an expert out of the whole clean prompt, so it tells no token.
- **Causal tracing** (`wb.causal_tracing`: noise of three standard deviations, 8 draws) blurs the tokens in which the
  two prompts differ. It restores whole sublayers; "attention" and "experts together" are right where a true head or
  expert is inside. Its effects are held against what the noise took away.
- **RelP**, **integrated gradients by layer** and **gradient, top 10 patched** are `wb.attribution`, its router live, on
  its way from the corrupt to the clean prompt. The last keeps what was patched of the ten largest estimates, and says 0
  of all other places. The other rows of gradients are made from `wb.gradients`, integrated ones between the embeddings.
- **Path patching** (`wb.path_patching`) names edges, counted as "path": of the true ones, how many are among as many
  strongest ones? It is asked in two steps. First, which of the embeddings, heads and experts speak to the logits? One
  edge is true: from the head that writes the answer. Then, which speak to the queries, keys and values of the head that
  came out strongest? True are the edges from the circuit's components before it, or from the embeddings where there are
  none, into the one of the three with which that head was built to read them (queries in the sink gate, keys in the
  induction, values else). A wrong head in the first step makes all of the second wrong.

{markdown(("method", "models", *TELLS), by_method(results))}

Share of the models of each circuit in which everything that the method tells is right:

{by_circuit(results, all_hit)}

What the tables say:

- **Gradients** put the right heads and experts first here, but not with the right size: where the circuit is shut in
  the corrupt prompt (induction, sink gate) a head that must first look elsewhere has little slope, so its share stays
  under the threshold of the second table below, and the head that was shut gets up to four times its due. Integrated
  gradients pass the slope on their way and mend most of that.
- Gradients **of the residual stream** don't see a route: which experts are chosen is discrete, and what the choice
  would change has no slope. The router's own logits do show it. Integrated layer by layer they rank it right,
  but what comes before the choice differs so much from pair to pair that the threshold is missed.
- **RelP** takes attention patterns as constants, so it is blind to a head that speaks to another's keys (induction) or
  queries (sink gate), and to the tokens that carry what it says. Where a circuit acts through values and experts it
  names the right places, the route included, with sizes nearer to the exact ones than the gradient's.
- **Patching the top 10** of the gradient mends the sizes of what is on the list. It can't mend the list: a head with
  little slope is not on it in every pair, which is seen in the second table.
- **Causal tracing** finds what the noise destroys. Three standard deviations of these prompts' embeddings, most of
  which are short, take half of the whole effect away in the induction, a third or less elsewhere, and nothing in the
  sink gate (ten take away half there too); where there is nothing to restore, what is left over is chance.
- **Experts silenced** or **routed around**: in the route each expert serves about half of the clean prompts. By rank
  both come out; at the threshold below one is missing, since what shows in half of 12 pairs is seldom that unlikely.
- **Direct logit attribution** sees who writes the answer, never who told the writer or what an expert held ready.
- **Attention** and **expert usage** can't tell a component from its decoy, which is as attentive and as busy.

## False alarms

Told nothing, a method names a place when two things hold over the {about["pairs"]} pairs. Its mean effect is at least
a quarter of the whole effect (the root mean square over the pairs of clean minus corrupt, in logits). And of the
{1 / CHANCE:.0f} ways to call one of the two tokens of each pair the answer none but the true one gives *any* place of
the model so large a mean effect: a permutation test over all places together, as strict as so many pairs allow. By
that threshold:

{nulls}
- In the planted models exact patching names {false} places that are not true ones.

The first are models of unit-size random weights, asked the prompts of every circuit; the second have a circuit whose
last head was left out, so the rest of it and its decoys work as hard as before and lead nowhere. Of the methods that
measure an effect on the logits, those that cost little were asked about all of them, the others (causal tracing,
integrated gradients by layer, what was patched of the top 10, variants) about the first random ones and none of the
cut: {how_many(results)} random ones. An examination is one method on one model. The share
of them at 0.05 or less says whether the test is honest (it should be near 5 %).

With so many examinations a threshold of one in a thousand would name a place or two by chance. `make truth` fails when
any method names one.

Path patching goes on to its second step only where the first named the head: to pick a head for its large effect and
then ask whether what it hears has a large effect would find something anywhere.

Share of the models of each circuit in which the places named at the threshold are exactly the true ones:

{by_circuit(results, exactly_named)}

## Another method

A method is a function of (model, pair) that gives scores (layer, head or expert, token). Add a line to `METHODS` in
tests/truth/methods.py and run `make truth`. All of it takes about {minutes(results)} minutes of one core.
"""
