"""The benchmark of planted truth: ``python -m tests.truth.report``, or ``make truth``.

Asks every method about models whose circuits are known, and about models that have none. Writes results.json beside
this file and docs/truth.md, prints the tables, and fails when exact patching misses a true place, or any method names a
place in a model without a circuit.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from gptoss_workbench import planted as plant
from gptoss_workbench.planted import Planted
from tests.truth import paths, table
from tests.truth.base import Method, metric_of
from tests.truth.methods import METHODS
from tests.truth.score import effects, hits, true_places, verdict

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results.json", HERE.parent.parent / "docs" / "truth.md"

CIRCUITS: dict[str, Callable[..., Planted]] = {
    **plant.MAKERS, "faithful reasoning": partial(plant.reasoning, faithful=True),
}
SEEDS, BLANKS, LESIONS = 3, 50, 6

# On models without a circuit: every way to measure an effect; some on the first models only, one for each circuit's
# prompts.
FIRST = len(plant.MAKERS)
MEASURES = tuple(method for method in METHODS if method.in_logits)
OFTEN = tuple(method for method in MEASURES if not method.few)


def ask(planted: Planted, methods: Sequence[Method] = METHODS) -> list[dict[str, Any]]:
    """One row for each method."""
    rows = []
    for method in methods:
        begun = time.process_time()
        found = effects(method, planted)
        row: dict[str, Any] = {"method": method.name, "kind": method.kind,
                               "seconds": round(time.process_time() - begun, 2)}
        if planted.truth:
            row["hits"] = hits(method, planted, found)
        if method.in_logits:
            said = verdict(method, found)
            true = true_places(method.kind, planted, found.roles) if planted.truth else set()
            row |= {"true": len(true), "named": len(said.named & true), "false": sorted(map(str, said.named - true)),
                    "chance": said.chance, "share": round(said.share, 4)}
        rows.append(row)
    return rows


def of_circuit(name: str, seed: int, methods: Sequence[Method] = METHODS) -> dict[str, Any]:
    """The methods on one planted model, and how often it says its answer, whole and without a part of its circuit."""
    planted = CIRCUITS[name](seed)
    methods = [method for method in methods if not method.few or true_places(method.kind, planted)]
    parts = sorted(place for place in planted.truth if place.kind != "router")
    return {
        "circuit": name, "seed": seed, "truth": sorted(map(str, planted.truth)),
        "right": said(planted, planted.model), "right alone": said(planted, planted.bare()),
        "right without": [said(planted, planted.without(place)) for place in parts],
        "rows": [*ask(planted, methods), *paths.ask(planted)],
    }


def said(planted: Planted, model: plant.value.Model) -> float:
    """Share of the pairs whose clean prompt makes the model prefer the answer by three logits more than the corrupt
    one does, and say it."""
    right = 0
    for pair in planted.pairs:
        clean, corrupt = (model.run(list(ids)) for ids in (pair.clean, pair.corrupt))
        gain = metric_of(clean, pair) - metric_of(corrupt, pair)
        right += int(clean.logits[-1].argmax()) == pair.answer and gain > 3
    return right / len(planted.pairs)


def of_blank(number: int) -> dict[str, Any]:
    """The methods on a random model without a circuit."""
    methods = MEASURES if number < FIRST else OFTEN
    like = list(plant.MAKERS)[number % len(plant.MAKERS)]
    blank = plant.no_circuit(number, like=like)
    return {"asked": like, "seed": number, "rows": [*ask(blank, methods), *paths.ask(blank)]}


def of_lesion(number: int, methods: Sequence[Method] = OFTEN) -> dict[str, Any]:
    """The methods on a planted model whose last head is missing: all else is there and leads nowhere."""
    like = list(plant.MAKERS)[number % len(plant.MAKERS)]
    whole = plant.MAKERS[like](1000 + number)
    writer = max(place for place in whole.truth if place.kind == "head" and place.role == "last")
    lesion = Planted(f"{like}, cut", whole.seed, whole.background, whole.without(writer), whole.pairs, frozenset(),
                     whole.decoys, (), None, whole.build)
    return {"asked": like, "seed": whole.seed, "rows": [*ask(lesion, methods), *paths.ask(lesion)]}


TASKS: dict[str, Callable[..., dict[str, Any]]] = {"planted": of_circuit, "blank": of_blank, "cut": of_lesion}


def measure(seeds: int, blanks: int, lesions: int, processes: int, work: Path) -> dict[str, Any]:
    """Every task, over several processes. What is done goes into the file ``work`` at once, and what stands there
    already is not done again."""
    tasks = [*(("planted", name, seed) for seed in range(seeds) for name in CIRCUITS),
             *(("blank", number) for number in range(blanks)), *(("cut", number) for number in range(lesions))]
    lines = work.read_text(encoding="utf-8").splitlines() if work.exists() else []
    done = {tuple(task): row for task, row in map(json.loads, lines)}
    begun = time.perf_counter()
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool, \
            work.open("a", encoding="utf-8") as log:
        futures = {pool.submit(TASKS[task[0]], *task[1:]): task for task in tasks if task not in done}
        for future in as_completed(futures):
            task = futures[future]
            done[task] = future.result()
            print(json.dumps([task, done[task]], allow_nan=False), file=log, flush=True)
            print(f"{len(done)} of {len(tasks)}, {time.perf_counter() - begun:.0f} s: {task}", flush=True)
    return {"about": {"seeds": seeds, "pairs": plant.circuits.PAIRS, "background": plant.BACKGROUND},
            **{kind: [done[task] for task in tasks if task[0] == kind] for kind in TASKS}}


def main(arguments: list[str] | None = None) -> int:
    """Run it; 1 when a goal is missed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="models of each circuit")
    parser.add_argument("--blanks", type=int, default=BLANKS, help="random models without a circuit")
    parser.add_argument("--cuts", type=int, default=LESIONS, help="planted models without their last head")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--work", type=Path, default=HERE / "unfinished.jsonl", help="what is done so far")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    results = measure(options.seeds, options.blanks, options.cuts, options.processes, options.work)
    write(results, options.json, options.page)
    options.work.unlink()
    print(table.short(results))
    missed = table.missed(results)
    print("\n".join(missed) or "all goals met", file=sys.stderr if missed else sys.stdout)
    return 1 if missed else 0


def write(results: dict[str, Any], file: Path, page: Path) -> None:
    """The results with one model a line, and the page made from them."""
    groups = []
    for name in ("planted", "blank", "cut"):
        lines = ",\n".join("  " + json.dumps(one, allow_nan=False) for one in results[name])
        groups.append(f' "{name}": [\n{lines}\n ]')
    about = f' "about": {json.dumps(results["about"])}'
    file.write_text("{\n" + ",\n".join([about, *groups]) + "\n}\n", encoding="utf-8")
    page.write_text(table.page(results), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
