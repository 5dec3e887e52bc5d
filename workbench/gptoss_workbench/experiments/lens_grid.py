"""What the stream says on its way: every layer, half of a layer, or single contribution, read at every token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from gptoss_kernels import reference
from gptoss_workbench.errors import ExperimentError
from gptoss_workbench.experiments.parts import captured, columns, token_coords
from gptoss_workbench.experiments.rows import log_probs, row_counts, row_id_and_text, single_id
from gptoss_workbench.hooks.selection import Indices, freeze
from gptoss_workbench.model.model import Model
from gptoss_workbench.model.provenance import with_method
from gptoss_workbench.model.run import Run

if TYPE_CHECKING:
    from gptoss_workbench.experiments.tuned_lens import TunedLens

LENS_SITES = ("resid_pre", "attn.out", "resid_mid", "mlp.out", "resid_post")
"""Where a lens can look, in the order of the forward pass."""

_AFTER = {"attn.out": "resid_mid", "mlp.out": "resid_post"}  # the stream right after a contribution was added
TOKENS_AT_ONCE = 128  # a row of log-probabilities over 201,088 ids takes 0.8 MB


@torch.no_grad()
def lens_grid(
    model: Model, run: Run, tokens: Indices = None, sites: str | Sequence[str] = "resid_post", *,
    answer: str | int | None = None, lens: TunedLens | None = None,
) -> xr.Dataset:
    """The logit lens at every step and token: what would be said if the model ended there (nostalgebraist 2020).

    Args:
        run: captured ``sites``; for ``attn.out`` also ``resid_mid``, for ``mlp.out`` also ``resid_post``.
        tokens: the positions whose prediction is read, e.g. ``wb.where(channel="analysis")``; None for all captured.
            A single index drops the dimension.
        sites: any of ``wb.LENS_SITES``. ``resid_*`` is the stream at that place, through final norm and unembedding.
            ``attn.out`` and ``mlp.out`` are what that half of a layer adds, *by itself*: divided by the root mean
            square of the stream right after it was added, so the logits of ``resid_mid`` are those of ``attn.out`` plus
            those of ``resid_pre`` at the same size.
        answer: a text that is one token, or an id, that is followed through the steps. By default, at each token, what
            the model says there in the end.
        lens: a lens that was trained, ``wb.tuned_lens``; for ``resid_post`` only.

    Returns:
        Dataset over (step, token); ``step`` has the coordinates ``layer``, ``site``, ``band``. ``said``,
        ``said_id`` and ``prob``: the likeliest next token, as in ``wb.logit_lens``; ``answer_prob`` and ``answer_rank``
        (0 is first) of the answer, whose text is the coordinate ``answer``; ``entropy`` of the distribution and ``kl``,
        KL(what the model says || lens), in nats. float32. Ids that share a row of the unembedding rank as one.

    Raises:
        SiteError: the run lacks a site, a layer or a token.
        ExperimentError: a site that no lens can read.

    Pitfalls: early layers need not speak the output's language, so a late appearance is not a late computation (compare
    with ``wb.tuned_lens``); a contribution by itself says nothing of what it takes back from what stood there before.
    """
    sites = [sites] if isinstance(sites, str) else list(sites)
    _check(sites, lens)
    at = columns(run, tokens)
    positions, read, row = [run.positions[column] for column in at], [], []
    layers, names = _steps(run, sites)
    for start in range(0, len(at), TOKENS_AT_ONCE):
        part = at[start:start + TOKENS_AT_ONCE]
        final = log_probs(model, run.hidden[positions[start:start + TOKENS_AT_ONCE]])
        row.append(final.argmax(-1) if answer is None else torch.full_like(final.argmax(-1), _row(model, answer)))
        each = [_read(model, log_probs(model, states), final, row[-1])
                for states in lens_states(model, run, part, layers, names, lens)]
        read.append([torch.stack(column) for column in zip(*each, strict=True)])
    top, prob, followed, rank, entropy, kl = (torch.cat(parts, 1).cpu() for parts in zip(*read, strict=True))
    if answer is not None:  # the mass of a row is that of all its ids
        followed = followed - row_counts(model)[_row(model, answer)].log().cpu()
    ids, texts = _labels(model, top)
    answers = np.empty(len(at), dtype=object)
    answers[:] = [row_id_and_text(model, index)[1] for index in torch.cat(row).tolist()] if answer is None else \
        model.vocabulary.token_text(single_id(model, answer))
    dims, steps = ("step", "token"), np.empty(len(layers), dtype=object)
    steps[:] = [f"layer {layer} {site}" for layer, site in zip(layers, names, strict=True)]
    out = xr.Dataset(
        {"said": (dims, texts), "said_id": (dims, ids), "prob": (dims, prob.numpy()),
         "answer_prob": (dims, followed.exp().numpy()),
         "answer_rank": (dims, rank.numpy()), "entropy": (dims, entropy.numpy()), "kl": (dims, kl.numpy())},
        coords={"step": steps, "layer": ("step", layers), "site": ("step", np.array(names, dtype=object)),
                "band": ("step", [model.config.bands[layer] for layer in layers]),
                **token_coords(run, at), "answer": ("token", answers)},
        attrs={"model": model.name, "lens": "logit lens" if lens is None else repr(lens), "units": "nats",
               "provenance": with_method(run.provenance, "lens_grid", tokens=positions, sites=sites, answer=answer,
                                         lens=None if lens is None else lens.digest)},
    )
    return out.isel(token=0) if isinstance(freeze(tokens), int) else out


def lens_states(
    model: Model, run: Run, at: list[int], layers: Sequence[int], sites: Sequence[str], lens: TunedLens | None = None,
) -> Iterator[Tensor]:
    """States ready for the unembedding, (token, d_model), of each layer and site."""
    for layer, site in zip(layers, sites, strict=True):
        values = captured(model, run, site, layer)[at]
        if site in _AFTER:
            stream = captured(model, run, _AFTER[site], layer)[at].float()
            size = stream.pow(2).mean(-1, keepdim=True).add(model.config.rms_norm_eps).sqrt()
            yield (values.float() / size * model.weights.final_norm).to(values.dtype)
        else:
            values = values if lens is None else lens.translated(values, layer)
            yield reference.rms_norm(values, model.weights.final_norm, model.config.rms_norm_eps)


def _steps(run: Run, sites: list[str]) -> tuple[list[int], list[str]]:
    """Layer and site of each step, in the order of the forward pass."""
    for site in sites:
        run.tensor(site)  # says what is missing
    steps = [(layer, LENS_SITES.index(site)) for site in dict.fromkeys(sites) for layer in run.layers(site)]
    return [layer for layer, _ in sorted(steps)], [LENS_SITES[index] for _, index in sorted(steps)]


def _read(model: Model, log_p: Tensor, final: Tensor, row: Tensor) -> tuple[Tensor, ...]:
    """(token, row) log-probabilities -> top row, its probability, the answer's log-probability, rank, entropy, KL."""
    best, followed = log_p.max(-1), log_p.gather(-1, row[:, None])
    of_one = log_p - row_counts(model).log()  # ids that share a row are alike, but each is an outcome of its own
    entropy = -(log_p.exp() * of_one).sum(-1)
    kl = (final.exp() * (final - log_p)).sum(-1)
    return best.indices, best.values.exp(), followed[:, 0], (log_p > followed).sum(-1), entropy, kl


def _labels(model: Model, rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Ids and texts of (step, token) rows."""
    known = {row: row_id_and_text(model, row) for row in set(rows.flatten().tolist())}
    ids, texts = np.empty(rows.shape, dtype=np.int64), np.empty(rows.shape, dtype=object)
    for place in np.ndindex(*rows.shape):
        ids[place], texts[place] = known[int(rows[place])]
    return ids, texts


def _row(model: Model, answer: str | int) -> int:
    rows, token = model.weights.row_of_token, single_id(model, answer)
    return token if rows is None else int(rows[token])


def _check(sites: list[str], lens: TunedLens | None) -> None:
    odd = [site for site in sites if site not in LENS_SITES]
    if odd or not sites:
        raise ExperimentError("No lens can read that.", expected=", ".join(LENS_SITES), got=", ".join(odd) or "nothing")
    if lens is not None and set(sites) != {"resid_post"}:
        raise ExperimentError("A tuned lens reads the stream after each layer only.", expected="sites='resid_post'",
                              got=", ".join(sites))
