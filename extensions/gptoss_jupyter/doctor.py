"""``%gptoss doctor``: what this machine can run (``wb.doctor``), and the notebook packages beside it."""

from __future__ import annotations

from dataclasses import replace

from gptoss_workbench.checkup import Checkup, doctor, installed, version

NOTEBOOK = ("jupyterlab", "ipykernel", "ipywidgets", "anywidget", "plotly")
FLOORS = {"jupyterlab": "4.6.2", "notebook": "7.5.6", "jupyter-server": "2.20.0", "nbconvert": "7.17.1"}
"""Versions that closed a known hole; older ones let a shared notebook run code at a click or at its conversion."""


def report() -> Checkup:
    """All findings, in the same order every time."""
    found = doctor()
    at = [what for what, _ in found.rows].index("packages") + 1
    rows = [("notebook", installed(NOTEBOOK))]
    outdated = too_old({package: version(package) for package in FLOORS})
    if outdated:
        rows.append(("update these", ", ".join(outdated)))
    return replace(found, rows=(*found.rows[:at], *rows, *found.rows[at:]))


def too_old(versions: dict[str, str]) -> list[str]:
    """Packages below their floor, in words; those that are not installed do no harm."""
    return [f"{package} {found} (a hole was closed in {FLOORS[package]})" for package, found in versions.items()
            if found[:1].isdigit() and _numbers(found) < _numbers(FLOORS[package])]


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: 4.6.2rc1 -> (4, 6, 2)."""
    numbers = []
    for part in version.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
