"""The picture in the README, from results/bench_20b.json: ``python -m tests.benchmarks.plot`` writes docs/speed.svg.

Bars of two groups are little enough to be written as SVG by hand: a plotting library for it would be one more thing to
install, and what plotly draws needs a browser to become a picture.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULT, PICTURE = HERE / "results" / "bench_20b.json", HERE.parent.parent / "docs" / "speed.svg"
PEERS = {"bf16": "llama.cpp, dense in BF16", "q8_0": "llama.cpp, dense in Q8_0 (inexact)"}
WIDTH, LEFT, ROW, HEAD = 720, 250, 26, 34
STYLE = """text { font: 13px system-ui, sans-serif; fill: #24292f } .head { font-weight: 600 } .peer { fill: #8c959f }
.ours { fill: #0969da } line { stroke: #cf222e; stroke-width: 2; stroke-dasharray: 4 3 }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .ours { fill: #4493f8 } .peer { fill: #6e7681 } }"""


def groups(found: Mapping[str, Any]) -> list[tuple[str, str, list[tuple[str, float]], float | None]]:
    """Title, unit, bars and where memory's own limit stands."""
    threads = max(found["prefill_512"])
    ours, prompt, peers = found["decode"][threads], found["prefill_512"][threads], found["llama.cpp"]
    decode = [("gptoss-workbench", ours["milliseconds_a_token"]),
              *(("gptoss-workbench, model.pack()", value) for name, value in ours.items()
                if name == "packed_milliseconds_a_token"),
              *((PEERS[name], peer["milliseconds_a_token"]) for name, peer in peers.items())]
    read = [("gptoss-workbench", min(prompt["seconds"])),
            *((PEERS[name], min(peer["prefill_512"]["seconds"])) for name, peer in peers.items())]
    return [(f"Decoding, milliseconds a token ({threads}); dashed: reading the weights alone", "ms", decode,
             ours.get("floor_milliseconds_median")), (f"A prompt of 512 tokens, seconds ({threads})", "s", read, None)]


def picture(found: Mapping[str, Any]) -> str:
    """The whole SVG."""
    lines, y = [], 0
    for title, unit, bars, floor in groups(found):
        scale = (WIDTH - LEFT - 90) / max(value for _, value in bars)
        lines.append(f'<text class="head" x="8" y="{y + 22}">{title}</text>')
        for number, (name, value) in enumerate(bars):
            top, kind = y + HEAD + number * ROW, "ours" if name.startswith("gptoss") else "peer"
            lines += [f'<text x="8" y="{top + 16}">{name}</text>',
                      f'<rect class="{kind}" x="{LEFT}" y="{top + 3}" width="{value * scale:.1f}" height="18"/>',
                      f'<text x="{LEFT + value * scale + 6:.1f}" y="{top + 16}">{value:.4g} {unit}</text>']
        bottom = y + HEAD + len(bars) * ROW
        if floor:
            x = LEFT + floor * scale
            lines.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y + HEAD}" y2="{bottom}"/>')
        y = bottom + 10
    size = f'viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}"'
    return (f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
            f"<style>{STYLE}</style>{''.join(lines)}</svg>\n")


def write() -> None:
    PICTURE.write_text(picture(json.loads(RESULT.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    write()
