"""Two runs side by side: the same tokens found in both, and what differs in who served them."""

from __future__ import annotations

from collections import defaultdict
from difflib import SequenceMatcher

import numpy as np
import torch
import xarray as xr

from gptoss_workbench.errors import ExperimentError
from gptoss_workbench.experiments.parts import token_coords
from gptoss_workbench.experiments.routes import as_runs, routes_of
from gptoss_workbench.experiments.rows import log_probs
from gptoss_workbench.model.provenance import digest_of_json, with_method
from gptoss_workbench.model.run import Run


@torch.no_grad()
def compare_runs(a: Run, b: Run) -> xr.Dataset:
    """What differs in routes, weights and predictions between two runs, token by token.

    Effort low against high, clean against corrupt, with and without an edit: tokens are set side by side by what they
    are. Spans of equal role, channel, recipient and field face each other in order of appearance. In spans of equal
    length every token faces the one at its place, even where the words differ; else equal tokens are matched (longest
    common blocks, Ratcliff & Metzener 1988). A token without a partner is left out of the first group of results.

    Args:
        a, b: runs of one model that captured ``router``, of all tokens or the same part of them. Those that captured
            ``resid_post`` too are compared there.

    Returns:
        Dataset. Over (layer, token), float32, for tokens that face each other: ``overlap``, the part of the slots given
        to the same experts; ``moved``, the router weight that went to other experts (total variation, 0 to 1);
        ``distance``, |resid_post of b - that of a| / |that of a|, where captured. Over ``token``: ``kl``, KL(a || b) of
        the next token in nats. Over (layer, expert): ``load_a``, ``load_b``, the mean weight over *all* tokens of each
        run, and ``load_change`` over the tokens that face each other. Labels of tokens are those of a, with ``token_b``
        and ``text_b`` beside them. ``attrs`` count the tokens left out of each.

    Raises:
        ExperimentError: runs of different models or layers, or no tokens that face each other.
        SiteError: a run lacks the router.

    Pitfalls: where the tokens differ, so must the routes, since routers go by the token: ask what changes at tokens
    that are the same in both (``.where(c.text == c.text_b)``). And a run of another effort has read other tokens.
    """
    as_runs([a, b])
    model = a.model
    if model.weights is not b.model.weights:
        raise ExperimentError("The runs are of two models.", expected="one model", got=f"{model.name}, {b.model.name}")
    routes = [routes_of(run) for run in (a, b)]
    if routes[0].layers != routes[1].layers:
        raise ExperimentError("The runs captured the router of different layers.", expected=str(routes[0].layers),
                              got=str(routes[1].layers))
    pairs = aligned(a, b)
    if not pairs:
        raise ExperimentError("No token of one run faces one of the other.", expected="prompts of like spans",
                              got=f"{len(a)} and {len(b)} tokens that share no span")
    at_a, at_b = (list(side) for side in zip(*pairs, strict=True))
    count = model.config.num_local_experts
    received = [one.received(count) for one in routes]
    first, second = received[0][:, at_a], received[1][:, at_b]
    served = [(routes[0].served(count)[:, at_a]), routes[1].served(count)[:, at_b]]
    slots = routes[0].experts.shape[-1]
    by_token, by_expert = ("layer", "token"), ("layer", "expert")
    variables: dict[str, tuple] = {
        "overlap": (by_token, ((served[0] & served[1]).sum(-1) / slots).astype(np.float32)),
        "moved": (by_token, np.abs(first - second).sum(-1) / 2),
        "kl": ("token", _kl(a, b, at_a, at_b)),
        "load_a": (by_expert, received[0].mean(1)), "load_b": (by_expert, received[1].mean(1)),
        "load_change": (by_expert, second.mean(1) - first.mean(1)),
    }
    if a.layers("resid_post") == b.layers("resid_post") == routes[0].layers:
        x, y = a.tensor("resid_post")[:, at_a].float(), b.tensor("resid_post")[:, at_b].float()
        variables["distance"] = (by_token, ((y - x).norm(dim=-1) / x.norm(dim=-1)).cpu().numpy())
    text_b = np.empty(len(at_b), dtype=object)
    text_b[:] = [b.tokens[b.positions[column]] for column in at_b]
    return xr.Dataset(
        variables,
        coords={"layer": routes[0].layers, "expert": range(count),
                "band": ("layer", [model.config.bands[layer] for layer in routes[0].layers]),
                **token_coords(a, at_a), "token_b": ("token", [b.positions[column] for column in at_b]),
                "text_b": ("token", text_b)},
        attrs={"model": model.name, "only_a": len(a.positions) - len(pairs), "only_b": len(b.positions) - len(pairs),
               "provenance": with_method(a.provenance, "compare_runs", other=b.ids,
                                         other_edits=[repr(edit) for edit in b.edits],
                                         other_digest=digest_of_json(b.provenance.to_dict()))},
    )


def aligned(a: Run, b: Run) -> list[tuple[int, int]]:
    """Columns of captured tokens that face each other, ascending in both."""
    spans = [_by_kind(run) for run in (a, b)]
    pairs = []
    for kind, ours in spans[0].items():
        for mine, other in zip(ours, spans[1].get(kind, []), strict=False):
            if len(mine) == len(other):
                pairs += list(zip(mine, other, strict=True))
                continue
            ids = [[run.ids[run.positions[column]] for column in part] for run, part in ((a, mine), (b, other))]
            for block in SequenceMatcher(None, *ids, autojunk=False).get_matching_blocks():
                pairs += [(mine[block.a + i], other[block.b + i]) for i in range(block.size)]
    ascending, last = [], -1
    for one, two in sorted(pairs):
        if two > last:  # spans in another order in b: only what runs forward in both
            ascending.append((one, two))
            last = two
    return ascending


def _by_kind(run: Run) -> dict[tuple[object, ...], list[list[int]]]:
    """The captured columns of each span, by its labels."""
    column = {position: number for number, position in enumerate(run.positions)}
    found: dict[tuple[object, ...], list[list[int]]] = defaultdict(list)
    for span in run.spans:
        own = [column[position] for position in range(span.start, span.stop) if position in column]
        if own:
            found[span.role, span.channel, span.recipient, span.field].append(own)
    return found


def _kl(a: Run, b: Run, at_a: list[int], at_b: list[int]) -> np.ndarray:
    """KL(a || b) of the next token at tokens that face each other, (token,) float32."""
    out = []
    for one, two in zip(at_a, at_b, strict=True):
        p, q = (log_probs(run.model, run.hidden[run.positions[column]]) for run, column in ((a, one), (b, two)))
        out.append(float((p.exp() * (p - q)).sum()))
    return np.array(out, dtype=np.float32)
