"""Labelled arrays to what the views take: plain lists and bytes. Nothing is computed here, only arranged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from gptoss_workbench.plots.labels import pieces, visible

if TYPE_CHECKING:
    from gptoss_workbench.harmony.spans import Span
    from gptoss_workbench.harmony.vocabulary import Vocabulary
    from gptoss_workbench.model.run import Run

CHANNELS = ("analysis", "commentary", "final")
LONGEST = 400  # characters of one token that a page is asked to lay out


def nice_ceiling(value: float) -> float:
    """The next of 1, 2, 5 times a power of ten, so that a colour scale does not move at every key."""
    if not math.isfinite(value) or value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value * (1 - 1e-9))


def shown_pieces(source: str | bytes, spaces: bool = True) -> list[list[str]]:
    """Token pieces as a page gets them: lone surrogates are spelled out, overlong tokens end in an ellipsis."""
    shown = [list(piece) for piece in pieces(source[: LONGEST + 1] if spaces else source, spaces)]
    return [*shown, ["mark", f"… {len(source)} long"]] if spaces and len(source) > LONGEST else shown


def token_pieces(vocabulary: Vocabulary, token: int, text: str) -> list[list[str]]:
    """The pieces of a token id; id -1 is the row that all never-used ids share, and has only a description."""
    return [["mark", text]] if token < 0 else shown_pieces(vocabulary.token_bytes(token))


def label(span: Span) -> str:
    """Whose words these are, in a few words: "user", "assistant analysis", "assistant to functions.f"."""
    parts = [span.role or "text", span.channel or "", f"to {span.recipient}" if span.recipient else ""]
    return visible(" ".join(part for part in parts if part), 48).replace("·", " ")


def groups(spans: Sequence[Span]) -> list[dict[str, Any]]:
    """Spans put together to messages: [{"label", "kind", "start", "stop"}], contiguous."""
    found: list[dict[str, Any]] = []
    for span in spans:
        if found and found[-1]["message"] == span.message:
            found[-1]["stop"] = span.stop
            if span.field != "control":
                found[-1]["label"] = label(span)
        else:
            kind = span.role if span.role in ("system", "developer", "user", "assistant", "tool") else "text"
            found.append({"label": label(span), "kind": kind, "start": span.start, "stop": span.stop,
                          "message": span.message})
    return [{key: value for key, value in group.items() if key != "message"} for group in found]


def strip(
    vocabulary: Vocabulary, ids: Sequence[int], spans: Sequence[Span], values: xr.DataArray, known: Sequence[bool],
) -> dict[str, Any]:
    """Traits of the token strip.

    Args:
        known: for each id, whether the model has an embedding of its own for it.
        values: (token), one for each id or for the first of them, NaN where there is nothing to measure; its
            name and ``units`` attribute are shown.
    """
    fields = [span.field for span in spans for _ in range(span.start, span.stop)]
    tokens = []
    for i, token in enumerate(ids):
        data = vocabulary.token_bytes(token)
        tokens.append({
            "pieces": shown_pieces(data), "id": int(token), "hex": data[:LONGEST].hex(" ").upper(),
            "field": fields[i], "special": token in vocabulary.special_ids, "breaks": data.endswith(b"\n"),
            "known": bool(known[i]),
        })
    numbers = np.full(len(ids), np.nan, dtype=np.float32)
    given = np.asarray(values.values, dtype=np.float32)[: len(ids)]
    numbers[: len(given)] = given
    finite = numbers[np.isfinite(numbers)]
    return {
        "tokens": tokens, "groups": groups(spans), "values": numbers.tobytes(),
        "quantity": str(values.name or "").replace("_", " "), "unit": str(values.attrs.get("units", "")),
        "about": str(values.attrs.get("long_name", "")),
        "low": 0.0, "high": nice_ceiling(float(finite.max()) if finite.size else 0.0),
    }


def grid(usage: xr.DataArray, chosen: list[list[int]], whole_text: bool, token: str) -> dict[str, Any]:
    """Traits of the expert grid from mean router weights (layer, expert) and the selected token's experts."""
    usage = usage.transpose("layer", "expert")
    numbers = np.ascontiguousarray(usage.values, dtype=np.float32)
    finite = numbers[np.isfinite(numbers)]
    return {
        "title": "Which experts read the whole text?" if whole_text else f"Which experts read {token}?",
        "weights": numbers.tobytes(), "layers": numbers.shape[0], "experts": numbers.shape[1], "chosen": chosen,
        "high": nice_ceiling(float(finite.max())) if whole_text and finite.size else 1.0,
        "measure": "mean router weight" if whole_text else "router weight",
    }


def routes(run: Run, token: int) -> list[list[Any]]:
    """Per layer the chosen experts of one token, heaviest first: [[layer, [[expert, weight], ...]], ...]."""
    experts, weights = (run.tensor(site)[:, token].tolist() for site in ("router.experts", "router.weights"))
    return [
        [layer, sorted(map(list, zip(chosen, shares, strict=True)), key=lambda slot: -slot[1])]
        for layer, chosen, shares in zip(run.layers("router.experts"), experts, weights, strict=True)
    ]


def lens(vocabulary: Vocabulary, guesses: xr.Dataset) -> list[list[Any]]:
    """Rows of the lens from ``wb.logit_lens``: [[layer, [{"pieces", "prob", "id"}, ...]], ...]."""
    guesses = guesses.transpose("layer", "rank")
    return [
        [int(layer), [
            {"pieces": token_pieces(vocabulary, int(id), str(text)), "prob": float(prob), "id": int(id)}
            for id, text, prob in zip(ids, texts, probs, strict=True)
        ]]
        for layer, ids, texts, probs in zip(
            guesses["layer"].values, guesses["id"].values, guesses["text"].values, guesses["prob"].values, strict=True
        )
    ]


def next_tokens(
    vocabulary: Vocabulary, edited: xr.Dataset, clean: xr.Dataset | None, top: int,
) -> dict[str, Any]:
    """Traits of the next-token bars from ``wb.next_tokens`` with the edits and without.

    Both lists are longer than ``top``, to find the other side's probability; a token that is in one of them
    alone has less than the other's last, and gets None there.
    """
    def rows(found: xr.Dataset) -> dict[int, tuple[str, float]]:
        return {int(i): (str(t), float(p)) for i, t, p in
                zip(found["id"].values, found["text"].values, found["prob"].values, strict=True)}

    now, before = rows(edited), rows(clean) if clean is not None else {}
    ids = list(now)[:top]
    best = next(iter(before), None)
    if best is not None and best not in ids:
        ids = [*ids[: top - 1], best]  # what the model would have said must not go missing
    made = []
    for id in ids:
        text, prob = now.get(id, (before.get(id, ("", 0.0))[0], None))
        made.append({"pieces": token_pieces(vocabulary, id, text), "id": id, "prob": prob,
                     "clean": before[id][1] if id in before else None})
    least = min([p for _, p in now.values()] + [p for _, p in before.values()], default=0.0)
    return {"rows": made, "edited": clean is not None, "below": least}


def heat(result: xr.DataArray) -> dict[str, Any]:
    """Traits of the heatmap from ``wb.patching``'s (layer, token), the other prompt's token beside one that differs."""
    result = result.transpose("layer", "token")
    numbers = np.ascontiguousarray(result.values, dtype=np.float32)
    finite = np.abs(numbers[np.isfinite(numbers)])
    texts = [str(text) for text in result["text"].values]
    others = [str(text) for text in result["corrupt_text"].values]
    labels = [{"pieces": shown_pieces(text), "other": shown_pieces(other) if other != text else None}
              for text, other in zip(texts, others, strict=True)]
    return {"values": numbers.tobytes(), "layers": [int(layer) for layer in result["layer"].values], "labels": labels,
            "high": nice_ceiling(round(float(finite.max()), 1)) if finite.size else 1.0}


def messages(vocabulary: Vocabulary, spans: Sequence[Span]) -> list[dict[str, Any]]:
    """The messages that hold anything: [{"label", "kind", "pieces"}]; kind is the channel, or "" for others."""
    found = []
    content = (span for span in spans if span.field == "content")
    for _, group in groupby(content, key=lambda span: span.message):
        parts = list(group)
        name = parts[0].channel or parts[0].role or "text"
        if parts[0].recipient:
            name += f" to {parts[0].recipient}"
        data = b"".join(vocabulary.token_bytes(token) for span in parts for token in span.ids)
        found.append({"label": visible(name, 48).replace("·", " "), "pieces": shown_pieces(data, spaces=False),
                      "kind": parts[0].channel if parts[0].channel in CHANNELS else ""})
    return found
