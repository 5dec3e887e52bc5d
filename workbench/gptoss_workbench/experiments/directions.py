"""Directions between two kinds of prompts, to steer along or to take away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Literal

import numpy as np
import xarray as xr

from gptoss_workbench.errors import ExperimentError
from gptoss_workbench.experiments.reading import layer_numbers, read_vectors, stream_site
from gptoss_workbench.experiments.watch import Cost, Watch, check_question, completeness, identity
from gptoss_workbench.hooks.selection import Indices, freeze
from gptoss_workbench.model.model import Model, Prompt
from gptoss_workbench.model.provenance import with_method

Method = Literal["mean", "pca", "probe"]
METHODS = ("mean", "pca", "probe")
FOLDS = 2


def contrast(
    model: Model, positive: Sequence[Prompt], negative: Sequence[Prompt], site: str = "resid_post", *,
    tokens: Indices = -1, method: Method = "mean", layers: Indices = None, resume: xr.DataArray | None = None,
    on_plan: Callable[[Cost], object] | None = None, on_progress: Callable[[int, int], object] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> xr.DataArray:
    """The direction at each layer that leads from one kind of prompts to another.

    With a+ and a- the means of the two kinds, each prompt counted by the mean of its chosen tokens:

    - "mean": a+ - a-, the difference of means (Marks & Tegmark 2023, arXiv 2310.06824; Rimsky et al. 2024, arXiv
      2312.06681; Arditi et al. 2024, arXiv 2406.11717, for refusal).
    - "pca": the first principal direction of the pairs' differences, not centred, since the mean is what they share
      (after Zou et al. 2023, arXiv 2310.01405); positive[i] is paired with negative[i].
    - "probe": the normal of a logistic regression between the two kinds on standardised values (Alain & Bengio 2016,
      arXiv 1610.01644); needs scikit-learn.

    Every method gives the direction the length and sign of a+ - a- seen along it, so that scale 1 in ``wb.steer``
    means the same for all: from the one mean to the other.

    Args:
        positive, negative: prompts of the two kinds, alike in everything else; equally many for "pca".
        site: one that holds vectors of the stream, e.g. resid_pre, attn.out, mlp.out.
        tokens: where to read, in the forms of ``wb.capture``; several are averaged. By default the last token.
        layers: None for all.
        resume: an earlier result of the same question that was stopped: only the prompts that are missing are read.
        on_plan: told the ``Cost`` before anything runs; print it.
        on_progress: told (prompts read, prompts in all).
        should_stop: asked before each batch; True ends early, and the direction is made of what was read so far.

    Returns:
        (layer, d_model) float32. Coordinates: ``auc`` (layer), how well the direction made of one half of the prompts
        ranks the other half (0.5 is chance, NaN below four prompts of a kind), and ``norm`` (layer). attrs: site,
        method, how many prompts were read, whether these were all (``complete``), provenance; when stopped, also what
        is ``missing``, and what was read, to go on from: ``vectors`` (prompt, layer, d_model).
        ``wb.steer(site, layer=3, vector=v.sel(layer=3))`` adds it, ``wb.project`` takes it away, both also for one
        channel: ``tokens=wb.where(channel="analysis")``.

    Raises:
        ExperimentError: too few prompts, prompts without the chosen tokens, or ``resume`` of another question.
        SiteError: no such site or layer.

    Pitfalls: whatever differs between the kinds beside what you mean is in the direction too. A direction that tells
    the kinds apart need not be one the model uses: steer along it, with a random direction of the same length as
    control (``wb.dose_response(..., controls=3)``). The length grows with the stream: compare layers by ``auc``.
    """
    site, numbers = stream_site(site), layer_numbers(model, layers)
    _check(positive, negative, method)
    pairs = chain.from_iterable(zip(positive, negative, strict=False))  # in turn, so that a stopped half is balanced
    shared = min(len(positive), len(negative))
    order = [*pairs, *positive[shared:], *negative[shared:]]
    kinds = np.array([True, False] * shared + [True] * (len(positive) - shared) + [False] * (len(negative) - shared))
    ids = [model.encode(prompt) for prompt in order]
    question = identity(model, "contrast", site, numbers, freeze(tokens), method, ids, kinds.tolist())
    begun, watch = None, Watch(on_plan, on_progress, should_stop)
    if resume is not None:
        check_question(resume, question)
        if resume.attrs["complete"]:
            watch.plan(Cost(0, 0))
            return resume.copy()
        begun = np.asarray(resume.attrs["vectors"], np.float32).reshape(-1, len(numbers), model.config.hidden_size)
    values = read_vectors(model, ids, site, layers=numbers, tokens=tokens, watch=watch, begun=begun)
    read = np.asarray(~np.isnan(values).any(axis=(1, 2)))
    how_far = completeness(int(read.sum()), len(read), "prompts")
    if not how_far["complete"]:
        how_far["vectors"] = values[read]
    if method == "pca":
        read[: 2 * shared] &= np.repeat(read[1 : 2 * shared : 2], 2)  # a pair counts when both were read
    plus, minus = values[kinds & read], values[~kinds & read]
    shape = (len(numbers), values.shape[-1])
    made = np.full(shape, np.nan, dtype=np.float32)
    auc = np.full(len(numbers), np.nan)
    for index in range(len(numbers)) if len(plus) and len(minus) else ():
        made[index] = direction_of(plus[:, index], minus[:, index], method)
        auc[index] = _held_out_auc(plus[:, index], minus[:, index], method)
    record = with_method(model.provenance, "contrast", site=site, by=method, layers=numbers,
                         tokens=repr(freeze(tokens)), positive=[ids[i] for i in np.flatnonzero(kinds & read)],
                         negative=[ids[i] for i in np.flatnonzero(~kinds & read)])
    return xr.DataArray(
        made, dims=("layer", "d_model"), name=f"direction ({method})",
        coords={"layer": numbers, "band": ("layer", [model.config.bands[layer] for layer in numbers]),
                "auc": ("layer", auc), "norm": ("layer", np.linalg.norm(made, axis=-1))},
        attrs={"site": site, "method": method, "positive": len(plus), "negative": len(minus), "model": model.name,
               "question": question, **how_far, "provenance": record},
    )


def refusal_direction(
    model: Model, harmful: Sequence[str], harmless: Sequence[str], *, effort: str = "medium", after: str = "",
    site: str = "resid_post", method: Method = "mean", **options: object,
) -> xr.DataArray:
    """What sets requests that are refused apart from those that are not (Arditi et al. 2024, arXiv 2406.11717).

    Args:
        harmful, harmless: user messages.
        effort: of the system message.
        after: what the assistant has written so far; the direction is read at the last token. Behind
            ``"<|channel|>final<|message|>"`` that is where it begins to answer.
        site, method, options: as for ``contrast``, whose result this is.
    """
    asked = [[_asked(model, text, effort, after) for text in texts] for texts in (harmful, harmless)]
    return contrast(model, *asked, site=site, method=method, **options)  # type: ignore[arg-type]


def effort_direction(
    model: Model, questions: Sequence[str], *, high: str = "high", low: str = "low", after: str = "<|channel|>",
    site: str = "resid_post", method: Method = "mean", **options: object,
) -> xr.DataArray:
    """What asking for more thought changes: the same questions under two efforts, paired.

    Args:
        questions: user messages.
        high, low: the efforts that the direction leads to and from.
        after: as for ``refusal_direction``; behind ``<|channel|>`` the model decides whether to think at all.
        site, method, options: as for ``contrast``, whose result this is.
    """
    asked = [[_asked(model, text, effort, after) for text in questions] for effort in (high, low)]
    return contrast(model, *asked, site=site, method=method, **options)  # type: ignore[arg-type]


def _asked(model: Model, text: str, effort: str, after: str) -> list[int]:
    from gptoss_workbench.harmony.conversation import chat

    return model.encode(chat(text, effort=effort)) + (model.vocabulary.encode(after) if after else [])


def direction_of(plus: np.ndarray, minus: np.ndarray, method: Method) -> np.ndarray:
    """One direction (d_model) float32 from two kinds (prompt, d_model); see ``contrast``."""
    apart = plus.mean(0, dtype=np.float64) - minus.mean(0, dtype=np.float64)
    if method == "mean":
        return apart.astype(np.float32)
    if method == "pca":
        count = min(len(plus), len(minus))
        unit = np.linalg.svd((plus[:count] - minus[:count]).astype(np.float64), full_matrices=False)[2][0]
    else:
        from gptoss_workbench.experiments.probes import normal_between

        unit = normal_between(plus, minus)
    return (unit * (unit @ apart)).astype(np.float32)


def _held_out_auc(plus: np.ndarray, minus: np.ndarray, method: Method) -> float:
    """How well the direction of each half of the prompts ranks the other half, mean of both ways."""
    if min(len(plus), len(minus)) < 2 * FOLDS:
        return float("nan")
    found = []
    for fold in range(FOLDS):
        direction = direction_of(_without(plus, fold), _without(minus, fold), method)
        found.append(auc_of(plus[fold::FOLDS] @ direction, minus[fold::FOLDS] @ direction))
    return float(np.mean(found))


def _without(values: np.ndarray, fold: int) -> np.ndarray:
    return values[np.arange(len(values)) % FOLDS != fold]


def auc_of(plus: np.ndarray, minus: np.ndarray) -> float:
    """The share of pairs in which the positive one is higher, ties half (Mann & Whitney 1947)."""
    return float(np.mean(plus[:, None] > minus) + np.mean(plus[:, None] == minus) / 2)


def _check(positive: Sequence[Prompt], negative: Sequence[Prompt], method: str) -> None:
    if method not in METHODS:
        raise ExperimentError("There is no such way to make a direction.", got=repr(method),
                              expected=", ".join(METHODS))
    if any(isinstance(prompts, str) for prompts in (positive, negative)) or not len(positive) or not len(negative):
        raise ExperimentError("A contrast needs prompts of two kinds.", expected="two lists of prompts",
                              got=f"{positive!r:.60} and {negative!r:.60}")
    if method == "pca" and len(positive) != len(negative):
        raise ExperimentError("PCA takes differences of pairs.", expected="equally many prompts of both kinds",
                              got=f"{len(positive)} and {len(negative)}", hint='Pair them, or use method="mean".')
