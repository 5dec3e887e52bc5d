"""Tables of the results, in words and Markdown."""

from __future__ import annotations

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
TELLS = ("layer", "token", "head", "expert")
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
            both = max((row["share"] for row in rows if row["chance"] <= 0.001), default=0.0)
            lines.append(f"{title}: {len(results[group])} models, {len(rows)} examinations, {false} places named. "
                         f"{sum(low)} examinations ({sum(low) / len(low):.1%}) had a chance of 0.05 or less; the "
                         f"largest effect in those of 0.001 or less was {both:.2f} of the whole.")
    return lines


def measured(models: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for one in models for row in one["rows"] if "chance" in row]


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
    for group in ("blank", "cut"):
        for one in results[group]:
            wrong += [f"{group} {one['seed']}, asked as {one['asked']}: {row['method']} names {row['false']}"
                      for row in one["rows"] if row.get("false")]
    return wrong


def methods(results: Results) -> list[str]:
    return list(dict.fromkeys(row["method"] for one in results["planted"] for row in one["rows"]))


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

{markdown(("method", "models", *TELLS), by_method(results))}

Share of the models of each circuit in which everything that the method tells is right:

{by_circuit(results, all_hit)}

What the tables say:

- **Gradients** put the right heads and experts first here, but not with the right size: where the circuit is shut in
  the corrupt prompt (induction, sink gate) a head that must first look elsewhere has little slope, so its share stays
  under the threshold of the second table below. Integrated gradients pass the slope on their way and mend most of that.
- **Gradients** put the right heads and experts first here, but not with the right size: where the circuit is shut
  in the corrupt prompt (induction, sink gate) a head that must first look elsewhere has little slope, so its share
  stays under the threshold of the second table below. Integrated gradients pass the slope on their
  way and mend most of that.
- Gradients **of the residual stream** don't see a route: which experts are chosen is discrete, and what the choice
  would change has no slope. The router's own logits do show it.
- **Direct logit attribution** sees who writes the answer, never who told the writer or what an expert held ready.
- **Attention** and **expert usage** can't tell a component from its decoy, which is as attentive and as busy.

## False alarms

Told nothing, a method names a place when two things hold over the {about["pairs"]} pairs. Its mean effect is at least
a quarter of the whole effect (the root mean square over the pairs of clean minus corrupt, in logits). And no more than
one in a thousand assignments of random signs to the pairs (which of the two tokens is called the answer) gives *any*
place of the model so large a mean effect: a permutation test over all places together. By that threshold:

{nulls}
- In the planted models exact patching names {false} places that are not true ones.

The first are models of unit-size random weights, asked the prompts of every circuit; the second have a circuit whose
last head was left out, so the rest of it and its decoys work as hard as before and lead nowhere. Exact patching was
asked about all of them, attributions and direct logit attribution about the first random ones. An examination is one
method on one model. The share of them at 0.05 or less says whether the test is honest (it should be near 5 %).

Share of the models of each circuit in which the places named at the threshold are exactly the true ones:

{by_circuit(results, exactly_named)}

## Another method

A method is a function of (model, pair) that gives scores (layer, head or expert, token). Add a line to `METHODS` in
tests/truth/methods.py and run `make truth`.
"""
