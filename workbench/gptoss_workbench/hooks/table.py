"""The table of sites as text, for the documentation."""

from __future__ import annotations

from collections.abc import Iterable

from gptoss_workbench.hooks.sites import Site


def as_markdown(sites: Iterable[Site]) -> str:
    """A Markdown table of sites, e.g. of ``wb.SITES.values()``: name, dimensions as captured, meaning."""
    lines = ["| site | dimensions | what is there |", "|---|---|---|"]
    for site in sites:
        dims = ("layer", *site.dims) if site.per_layer else site.dims
        lines.append(f"| `{site.name}` | {', '.join(dims)} | {site.meaning} |")
    return "\n".join(lines)
