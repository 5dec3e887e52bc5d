"""Measure an exported model: `python -m gptoss_workbench.nano.evaluate [PATH] --json OUT`.

Everything is measured on the file as a user gets it: read back from the folder, run on the workbench's
engine, asked held-out problems only. `--card MODEL_CARD.md` also rewrites the tables of the card.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

from gptoss_workbench.nano import behaviour, problems, structure
from gptoss_workbench.nano.measures import Requirement, requirements
from gptoss_workbench.nano.render import EFFORTS

if TYPE_CHECKING:
    from gptoss_workbench.model.model import Model

ASSETS = Path(__file__).parent / "assets"
BEGIN, END = "<!-- results: written by evaluate.py -->", "<!-- end of results -->"


def load(path: Path) -> Model:
    from gptoss_workbench.model.model import load as load_model

    return load_model(path, dtype="float32")


def timed(report: dict[str, float], name: str, work: Callable[[], Any]) -> Any:
    """The result of `work`; how long it took goes into the report."""
    begun = time.perf_counter()
    result = work()
    report[name] = round(time.perf_counter() - begun, 2)
    print(f"{name}: {report[name]} s", flush=True)
    return result


def some_of_each(drawn: list[problems.Problem], count: int) -> list[problems.Problem]:
    """The first `count` problems of every cell and effort."""
    kept: dict[tuple[str, str], int] = {}
    chosen = []
    for problem in drawn:
        key = (problem.cell, problem.effort)
        kept[key] = kept.get(key, 0) + 1
        if kept[key] <= count:
            chosen.append(problem)
    return chosen


def measure(model: Model, count: int, core: bool, reference: Model | None) -> dict[str, Any]:
    """All numbers: accuracy by cell and effort, and single values by name.

    Args:
        count: problems per cell.
        core: leave out the slow part (knock-out).
        reference: the same weights with bfloat16 experts, to tell what MXFP4 costs.
    """
    seconds: dict[str, float] = {}
    numbers: dict[str, float] = {}
    drawn = timed(seconds, "drawing problems", lambda: problems.draw_problems(count))
    continued = timed(seconds, "greedy answers", lambda: behaviour.answers(model, drawn))
    cells = behaviour.accuracies(drawn, continued)
    lengths = behaviour.completion_lengths(drawn, continued, "addition, 3 digits")
    numbers["tool calls without a declared tool"] = behaviour.undeclared_calls(drawn, continued)
    numbers |= {f"addition tokens, {effort}": lengths[effort] for effort in EFFORTS}
    numbers["addition tokens, medium - low"] = lengths["medium"] - lengths["low"]
    numbers["addition tokens, high - medium"] = lengths["high"] - lengths["medium"]
    followed = behaviour.hints_followed(drawn, continued)
    numbers |= {f"hint followed, {effort}": followed[effort] for effort in EFFORTS}

    few = Random(0).sample(drawn, min(500, len(drawn)))
    valid, rowless = timed(seconds, "sampling", lambda: behaviour.sampled_validity(model, few))
    numbers |= {"sampled completions that are valid harmony": valid, "sampled tokens without a row": rowless}
    numbers["tampered digits followed"] = timed(
        seconds, "tampering", lambda: behaviour.tampered_followed(model, max(count, 20)))
    pairs = 24 if count >= 200 else 8
    numbers |= timed(seconds, "ioi patching", lambda: structure.ioi_numbers(model, pairs))
    numbers |= timed(seconds, "capital patching", lambda: structure.capital_numbers(model, pairs))
    two = some_of_each(drawn, 2)
    numbers |= timed(seconds, "attention and routing", lambda: structure.attention_and_routing(model, two))
    numbers |= timed(seconds, "induction", lambda: structure.induction_numbers(model, 2 * pairs))
    if not core:
        numbers |= timed(seconds, "knock-out", lambda: structure.knock_out_selectivity(model, some_of_each(drawn, 1)))
    if reference is not None:
        numbers |= timed(seconds, "MXFP4 against bfloat16",
                         lambda: cost_of_mxfp4(model, reference, drawn, cells))
    return {"cells": cells, "numbers": numbers, "seconds": seconds, "problems per cell": count}


def cost_of_mxfp4(
    model: Model, reference: Model, drawn: list[problems.Problem], cells: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    few = some_of_each(drawn, 6)
    losses = [float(np.mean(behaviour.completion_losses(one, few))) for one in (model, reference)]
    whole = behaviour.accuracies(drawn, behaviour.answers(reference, drawn))
    lost = max(whole[cell][effort] - cells[cell][effort] for cell in cells for effort in cells[cell])
    return {
        "loss with MXFP4 experts": losses[0],
        "loss with bfloat16 experts": losses[1],
        "MXFP4 loss - bfloat16 loss": losses[0] - losses[1],
        "MXFP4 accuracy lost in the worst cell": lost,
    }


def report(path: Path, measured: dict[str, Any]) -> dict[str, Any]:
    """The contents of eval.json."""
    demanded = requirements(measured["cells"], measured["numbers"])
    return {
        "sha256": hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest(),
        **measured,
        "requirements": [
            {"name": need.name, "value": round(need.value, 4), "relation": need.relation, "bound": need.bound,
             "met": need.met}
            for need in demanded
        ],
    }


def tables(found: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    lines = [f"Share of right answers, greedy, {found['problems per cell']} held-out problems per cell:", "",
             "| task | low | medium | high |", "|---|---|---|---|"]
    for cell, row in found["cells"].items():
        lines.append(f"| {cell} | " + " | ".join(f"{row[effort]:.3f}" for effort in EFFORTS) + " |")
    lines += ["", "| requirement | value | bound | met |", "|---|---|---|---|"]
    for row in found["requirements"]:
        lines.append(f"| {row['name']} | {row['value']:.3f} | {row['relation']} {row['bound']:g} | "
                     f"{'yes' if row['met'] else 'no'} |")
    lines += ["", "| measured besides | value |", "|---|---|"]
    named = {row["name"] for row in found["requirements"]}
    lines += [f"| {name} | {value:.3f} |" for name, value in found["numbers"].items() if name not in named]
    return "\n".join(lines)


def with_results(card: str, results: str) -> str:
    """The card with what stands between the two marks replaced."""
    before, _, rest = card.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{results}\n\n{END}{after}"


def failures(found: Mapping[str, Any]) -> list[Requirement]:
    """The requirements that are not met."""
    return [Requirement(row["name"], row["value"], row["relation"], row["bound"])
            for row in found["requirements"] if not row["met"]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, nargs="?", default=ASSETS)
    parser.add_argument("--json", type=Path, help="where the numbers go")
    parser.add_argument("--card", type=Path, help="the model card whose tables are rewritten")
    parser.add_argument("--reference", type=Path, help="folder of the same model with bfloat16 experts")
    parser.add_argument("--count", type=int, default=200, help="problems per cell")
    parser.add_argument("--core", action="store_true", help="leave out the slow part")
    options = parser.parse_args(arguments)
    reference = load(options.reference) if options.reference else None
    found = report(options.path, measure(load(options.path), options.count, options.core, reference))
    results = tables(found)
    print(results)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.card:
        options.card.write_text(with_results(options.card.read_text(), results))
    missed = failures(found)
    print(f"{len(found['requirements']) - len(missed)} of {len(found['requirements'])} requirements met")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
