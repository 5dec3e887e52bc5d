"""The report as text: a long page, and the short table of the README. Both are made from results.json alone."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests import tolerances

Result = dict[str, Any]  # a Row as JSON
START, END = "<!-- parity -->", "<!-- /parity -->"

# group -> what it is about
ABOUT = {
    "float32": "float32, end to end: every site of every layer from the same ids.",
    "captures": "Looking changes nothing.",
    "clamps": "Evidence that both SwiGLU clamps bite where the case says so: the smallest share over the layers.",
    "MXFP4 and weights": "Bit for bit: MXFP4 decoding, and every weight as loaded.",
    "YaRN": "Bit for bit: rotary frequencies and tables.",
    "bfloat16 sublayers": "bfloat16, each sublayer taught: it starts from transformers' float32 residual, with the "
                          "float32 routes.",
    "bfloat16, routes replayed": "bfloat16, the whole model, with the float32 routes replayed.",
    "route flips": "How often rounding to bfloat16 changes a token's set of experts in a layer (mean over layers). "
                   "Running free, one flip changes what follows; random weights flip most.",
    "greedy text": "Greedy text, token for token.",
    "cache and padding": "Reading in pieces, in forks and in padded batches.",
}


def short(results: dict[str, Any]) -> str:
    """The table between the README's markers: one line for each group, metric and second source."""
    lines = ["| what | compared with | metric | worst | allowed | |", "|---|---|---|---|---|---|"]
    for key, rows in _summary(results["rows"]).items():
        row = max(rows, key=_closeness)
        name, against, metric = key
        lines.append(_line(name, against, metric, _number(row["value"]), _allowed(row), _verdict(rows)))
    versions = results["about"]["versions"]
    judged = [row for row in results["rows"] if row["passed"] is not None]
    passed, models = sum(row["passed"] for row in judged), {row["case"] for row in judged if row["group"] == "float32"}
    lines += ["", f"{passed} of {len(judged)} comparisons on {len(models)} models pass (transformers "
                  f"{versions['transformers']}, torch {versions['torch']}). Each line shows the value nearest to its "
                  "limit; all sites, layers and models are in [PARITY.md](tests/parity/PARITY.md). `make parity` makes "
                  "both anew."]
    return "\n".join(lines)


def page(results: dict[str, Any]) -> str:
    """The whole report as Markdown: the models, failures if any, each group, then the tolerances with their reasons."""
    about, rows = results["about"], results["rows"]
    failed = [row for row in rows if row["passed"] is False]
    judged = sum(row["passed"] is not None for row in rows)
    lines = [
        "# Parity", "",
        "Made by `make parity`; not written by hand. The second source is transformers' GptOssForCausalLM on a CPU, "
        "with eager attention and MXFP4 decoded, unless a table says otherwise. The numbers of all layers stand in "
        "[results.json](results.json).", "",
        f"**{judged - len(failed)} of {judged} comparisons pass.** " + ", ".join(
            f"{name} {version}" for name, version in about["versions"].items())
        + f"; {about['machine']}; embedded weights sha256 {about['embedded_sha256'][:16]}…", "",
    ]
    models = [_line(*one) for one in about["models"].items()]
    lines += ["## Models", "", _line("case", "sizes"), "|---|---|", *models, ""]
    if failed:
        lines += ["## Failed", "", *_lines(failed), ""]
    for group, what in ABOUT.items():
        members = [row for row in rows if row["group"] == group]
        if not members:
            continue
        lines += [f"## {group}", "", what, ""]
        if group in ("float32", "bfloat16 sublayers"):
            by_site = [row for row in members if row.get("by_layer") and row["tolerance"] and row["metric"] in _MATRIX]
            for metric in _MATRIX:
                lines += _matrix([row for row in by_site if row["metric"] == metric], metric)
            members = [row for row in members if row not in by_site]
        if members:
            lines += [*_lines(members), ""]
    used = dict.fromkeys(row["tolerance"] for row in rows if row.get("tolerance"))
    lines += ["## Tolerances", "", "| name | value | why |", "|---|---|---|"]
    lines += [_line(name, f"{getattr(tolerances, name):g}", reason) for name, reason in reasons(used).items()]
    return "\n".join(lines) + "\n"


def into_readme(text: str, table: str) -> str:
    """The README with what stands between the markers replaced; as it is when it has none."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    return f"{before}{START}\n{table}\n{END}{after}" if start and end else text


def reasons(names: Iterable[str]) -> dict[str, str]:
    """Name of a tolerance -> the text that stands under it in tests/tolerances.py."""
    body = ast.parse(Path(tolerances.__file__).read_text()).body
    found = {}
    for statement, following in pairwise(body):
        if isinstance(statement, ast.Assign) and isinstance(following, ast.Expr):
            target, text = statement.targets[0], following.value
            if isinstance(target, ast.Name) and isinstance(text, ast.Constant):
                found[target.id] = str(text.value)
    return {name: " ".join(found[name].split()) for name in names}


_MATRIX = ("rel L2", "max abs / largest")


def _summary(rows: list[Result]) -> dict[tuple[str, str, str], list[Result]]:
    """Rows that are judged, by (line of the short table, second source, metric)."""
    lines: dict[tuple[str, str, str], list[Result]] = {}
    for row in rows:
        if row["passed"] is not None and row["line"]:
            lines.setdefault((row["line"], row["against"].partition(",")[0], row["metric"]), []).append(row)
    return lines


def _closeness(row: Result) -> float:
    """How near a row comes to its limit: the line shows the nearest."""
    value = float(row["value"])
    return math.inf if math.isnan(value) else value / row["limit"] if row["limit"] else value


def _matrix(rows: list[Result], metric: str) -> list[str]:
    """Sites down, cases across: the worst layer of each."""
    if not rows:
        return []
    cases = list(dict.fromkeys((row["case"], row["against"]) for row in rows))
    sites = list(dict.fromkeys(row["what"] for row in rows))
    cell = {(row["what"], row["case"], row["against"]): _number(row["value"]) + ("" if row["passed"] else " **fail**")
            for row in rows}
    many = len({against for _, against in cases}) > 1
    names = [f"{case}, {against}" if many else case for case, against in cases]
    limits = ", ".join(f"{name} {limit:g}" for name, limit in {row["tolerance"]: row["limit"] for row in rows}.items())
    lines = [f"{metric}, the worst layer; allowed: {limits}.", "",
             _line("site", *names), "|---" * (1 + len(cases)) + "|"]
    lines += [_line(site, *(cell.get((site, *case), "") for case in cases)) for site in sites]
    return [*lines, ""]


def _lines(rows: list[Result]) -> list[str]:
    lines = [_line("case", "what", "dtype", "compared with", "metric", "worst", "allowed", ""), "|---" * 8 + "|"]
    for row in rows:
        metric = row["metric"] + (f" (of {row['count']:,})" if row.get("count") else "")
        lines.append(_line(row["case"], row["what"], row["dtype"], row["against"], metric, _number(row["value"]),
                           _allowed(row), _verdict([row])))
    return lines


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _allowed(row: Result) -> str:
    if row.get("limit") is None:
        return "reported only"
    return ("at least " if row.get("at_least") else "") + f"{row['limit']:g}"


def _verdict(rows: list[Result]) -> str:
    if all(row["passed"] is None for row in rows):
        return ""
    return "pass" if all(row["passed"] for row in rows) else "**fail**"


def _number(value: Any) -> str:
    value = float(value)
    return str(int(value)) if value in (0, 1) else f"{value:.2g}"
