"""Linear probes: what can be read off a site, layer by layer, and what a probe would find without the model.

A probe that works shows that something is linearly there, not that the model uses it; and it may read the tokens
rather than what was made of them. So every result stands beside its controls.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from gptoss_workbench.errors import ExperimentError, SiteError, WorkbenchError
from gptoss_workbench.experiments.reading import stream_site
from gptoss_workbench.experiments.uncertainty import LEVEL, mean_interval
from gptoss_workbench.experiments.watch import Cost, Watch, completeness, identity, resumed
from gptoss_workbench.hooks.prompts import Prompts
from gptoss_workbench.hooks.selection import Indices, freeze
from gptoss_workbench.model.provenance import with_method
from gptoss_workbench.model.run import Run

STRENGTH = 1.0  # inverse of the L2 penalty on standardised values: scikit-learn's own default
MOST_STEPS = 1000
BY_LAYER = ("accuracy", "accuracy_low", "accuracy_high", "auc", "auc_low", "auc_high", "shuffled", "control_task")


@dataclass(frozen=True, kw_only=True)
class Fits(Cost):
    """What probing costs. The model is not run.

    Attributes:
        passes, tokens: see ``Cost``; 0.
        fits: regressions.
        samples, width: how many samples of how many values each learns from, at most.
    """

    fits: int
    samples: int
    width: int

    def __str__(self) -> str:
        return f"{self.fits} fits of {self.samples} samples by {self.width} values"


@dataclass(frozen=True)
class _Samples:
    """What a probe sees: values (sample, layer, d_model), and of each sample its label, group, type and tokens."""

    values: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    types: np.ndarray
    tokens: list[tuple[int, ...]]

    @property
    def digest(self) -> str:
        """sha256 of all of it."""
        said = hashlib.sha256(repr([self.labels.tolist(), self.groups.tolist(), self.types.tolist(),
                                    self.tokens, self.values.shape]).encode())
        said.update(np.ascontiguousarray(self.values).tobytes())
        return said.hexdigest()


def probe(
    runs: Sequence[Run], labels: Sequence[Any], *, site: str = "resid_post", layers: Sequence[int] | int | None = None,
    tokens: Indices = -1, groups: Sequence[Hashable] | None = None, folds: int = 5, seed: int = 0,
    resume: xr.Dataset | None = None, on_plan: Callable[[Fits], object] | None = None,
    on_progress: Callable[[int, int], object] | None = None, should_stop: Callable[[], bool] | None = None,
) -> xr.Dataset:
    """How well a linear probe tells labels at each layer, in prompts it has not seen, beside its controls.

    L2-regularised logistic regression on standardised values (Alain & Bengio 2016, arXiv 1610.01644), scored on the
    held-out folds of a stratified cross-validation in which no group is both learnt from and asked. Beside it:

    - ``shuffled``: the same with the labels dealt out anew among the samples; what overfitting alone gives.
    - ``control_task``: labels dealt out by type, the same for every sample of a type, and ``selectivity``, the accuracy
      less that of the control task (Hewitt & Liang 2019, arXiv 1909.03368): how much is read rather than learnt by
      heart. The type is the token where every token has a label, else the group.
    - ``random``: Gaussian noise in place of the values, as many dimensions.
    - ``token_identity``: which tokens stand at the places that are read, without any model. A probe that does not beat
      it has found no more than the text.
    - ``majority``: the commonest label's share.

    Args:
        runs: captured ``site``; a ``RunBatch`` or a list of runs.
        labels: one for each run, and the values of its chosen tokens are averaged; or for each run one for each chosen
            token. Text, numbers or truth values; two or more classes.
        layers: which of those captured; None for all.
        tokens: which of those captured, in the forms of ``wb.capture``.
        groups: what each run belongs to; runs of a group stay together. By default runs with the same tokens do, and
            all tokens of a run. Give groups where prompts share a template, a person or a fact.
        folds: of the cross-validation; fewer where a class has fewer groups.
        seed: of folds, shuffles and noise.
        resume: an earlier result of the same question, stopped or not: only what is NaN in it is fitted.
        on_plan: told how many fits it will take (``Fits``), before the first; the model itself is not run.
        on_progress: told (fits done, fits in all).
        should_stop: asked before each fit; True ends early and leaves NaN for what was not fitted on every fold.

    Returns:
        Dataset over ``layer``: accuracy, accuracy_low, accuracy_high (95 % bootstrap over groups); auc, auc_low,
        auc_high (two classes; else NaN); shuffled, control_task, selectivity; ``direction`` (layer, class, d_model), in
        the units of the site, one class for two labels (towards the second), and ``intercept`` (layer, class), fitted
        to all samples. Without a layer: random, token_identity, majority. attrs: classes, samples, groups, whether it
        is ``complete`` (else what is ``missing``), provenance.

    Raises:
        WorkbenchError: scikit-learn is not installed.
        ExperimentError: labels that don't fit the runs, one class alone, too few groups to hold any out, or ``resume``
            of another question.
        SiteError: a run lacks the site, a layer or a token.

    Pitfalls: with many layers the best one is best by chance too; decide the layer on other prompts. Accuracy means
    little where classes are uneven: look at ``majority`` and ``auc``. High accuracy at layer 0 is about the tokens.
    """
    sklearn()
    runs = [*runs]
    samples, numbers = _samples(runs, labels, stream_site(site), layers, tokens, groups)
    model = runs[0].model
    classes, wanted = np.unique(samples.labels, return_inverse=True)
    splits = _splits(samples, wanted, folds, seed)
    draw = np.random.default_rng(seed)
    shuffled, control = draw.permutation(wanted), _by_type(wanted, samples.types, draw)
    noise = draw.standard_normal(samples.values[:, 0].shape).astype(np.float32)
    question = identity(model, "probe", site, numbers, samples.digest, folds, seed)
    count, width, sides = len(numbers), samples.values.shape[-1], 1 if len(classes) == 2 else len(classes)
    found = {name: resumed(resume, question, (count,), name, np.float64) for name in BY_LAYER}
    flat = {name: resumed(resume, question, (), name, np.float64) for name in ("random", "token_identity")}
    normals = resumed(resume, question, (count, sides, width), "direction")
    intercepts = resumed(resume, question, (count, sides), "intercept")

    def left() -> int:
        folded = (*flat.values(), *(found[name] for name in ("accuracy", "shuffled", "control_task")))
        return sum(int(np.isnan(some).sum()) for some in folded) * len(splits) + int(np.isnan(intercepts[:, 0]).sum())

    total = (3 * len(splits) + 1) * count + 2 * len(splits)
    watch = Watch(on_plan, on_progress, should_stop)
    watch.plan(Fits(0, 0, fits=left(), samples=len(wanted), width=width))
    clock = _Clock(total - left(), total, watch)

    def accuracy(values: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return _held_out(values, truth, len(classes), splits, clock)

    for name, values in (("random", noise), ("token_identity", _one_hot(samples.tokens))):
        if np.isnan(flat[name]):
            flat[name][...] = accuracy(values, wanted)[0].mean()
    for index in range(count):
        values = samples.values[:, index]
        if np.isnan(found["accuracy"][index]):
            right, scores = accuracy(values, wanted)
            for name, value in zip(BY_LAYER[:3], mean_interval(right, samples.groups.tolist(), seed=seed), strict=True):
                found[name][index] = value
            if len(classes) == 2:
                ends = _auc_interval(scores, wanted, samples.groups, seed)
                found["auc"][index], found["auc_low"][index], found["auc_high"][index] = ends
        for name, truth in (("shuffled", shuffled), ("control_task", control)):
            if np.isnan(found[name][index]):
                found[name][index] = accuracy(values, truth)[0].mean()
        if np.isnan(intercepts[index, 0]) and clock.goes_on():
            normals[index], intercepts[index] = fit(values, wanted)
    per_layer = {name: ("layer", values) for name, values in found.items()}
    per_layer["selectivity"] = ("layer", found["accuracy"] - found["control_task"])
    towards = [str(one) for one in (classes[1:] if len(classes) == 2 else classes)]
    return xr.Dataset(
        {**per_layer, **{name: ((), value) for name, value in flat.items()},
         "majority": ((), np.bincount(wanted).max() / len(wanted)),
         "direction": (("layer", "class", "d_model"), normals), "intercept": (("layer", "class"), intercepts)},
        coords={"layer": numbers, "band": ("layer", [model.config.bands[layer] for layer in numbers]),
                "class": towards},
        attrs={"site": site, "classes": [str(one) for one in classes], "samples": len(wanted), "level": LEVEL,
               "groups": len(np.unique(samples.groups)), "folds": len(splits), "model": model.name,
               "question": question, **completeness(total - left(), total, "fits"),
               "provenance": with_method(
                   model.provenance, "probe", site=site, layers=numbers, tokens=repr(freeze(tokens)), folds=len(splits),
                   seed=seed, prompts=[run.ids for run in runs], labels=[str(one) for one in samples.labels],
                   groups=samples.groups.tolist(), edits=[[repr(edit) for edit in run.edits] for run in runs])},
    )


def sklearn() -> Any:
    """scikit-learn, or one clear error."""
    try:
        import sklearn.linear_model
        import sklearn.metrics
        import sklearn.model_selection
    except ImportError as error:
        raise WorkbenchError("Probes need scikit-learn.", expected="scikit-learn 1.5 or later", got=str(error),
                             hint="pip install 'gptoss-workbench[probes]'") from error
    return sklearn


def fit(values: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values (sample, d), labels (sample) from 0 -> normals (class, d) and intercepts (class) in units of the values.

    Two classes have one normal, towards the second.
    """
    middle, spread = _scales(values)
    made = _logistic((values - middle) / spread, labels)
    normals = made.coef_ / spread
    return normals, made.intercept_ - normals @ middle


def normal_between(plus: np.ndarray, minus: np.ndarray) -> np.ndarray:
    """The unit normal (d) float64 of a logistic regression between two kinds of vectors (sample, d)."""
    sklearn()
    values = np.concatenate((plus, minus)).astype(np.float64)
    normal = fit(values, np.repeat([1, 0], [len(plus), len(minus)]))[0][0]
    return normal / np.linalg.norm(normal)


def _logistic(values: np.ndarray, labels: np.ndarray) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sklearn().exceptions.ConvergenceWarning)  # separable: it goes on for ever
        return sklearn().linear_model.LogisticRegression(C=STRENGTH, max_iter=MOST_STEPS).fit(values, labels)


def _scales(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    spread = values.std(0)
    return values.mean(0), np.where(spread > 0, spread, 1.0)


class _Clock:
    """Counts fits, tells of them, and knows whether to go on."""

    def __init__(self, done: int, total: int, watch: Watch) -> None:
        self._done, self._total, self._watch, self._stopped = done, total, watch, False

    def goes_on(self) -> bool:
        """Asked before each fit."""
        self._stopped = self._stopped or self._watch.stopped()
        if not self._stopped:
            self._done += 1
            self._watch.done(self._done, self._total)
        return not self._stopped


def _held_out(
    values: np.ndarray, labels: np.ndarray, classes: int, splits: Sequence[tuple[np.ndarray, np.ndarray]],
    clock: _Clock,
) -> tuple[np.ndarray, np.ndarray]:
    """Whether each sample was told right by a probe that had not seen its group, and the score of the second class.

    All NaN when it was stopped before the last fold.
    """
    right, scores = np.full(len(labels), np.nan), np.full(len(labels), np.nan)
    for learnt, asked in splits:
        if not clock.goes_on():
            return np.full(len(labels), np.nan), np.full(len(labels), np.nan)
        middle, spread = _scales(values[learnt])
        known = np.unique(labels[learnt])
        if len(known) == 1:  # shuffled or control labels can come out so
            right[asked] = labels[asked] == known[0]
            scores[asked] = 0.0
            continue
        made = _logistic((values[learnt] - middle) / spread, labels[learnt])
        seen = (values[asked] - middle) / spread
        right[asked] = made.predict(seen) == labels[asked]
        if classes == 2:
            scores[asked] = made.decision_function(seen)
    return right, scores


def _splits(samples: _Samples, labels: np.ndarray, folds: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    counts = [len(np.unique(samples.groups[labels == label])) for label in np.unique(labels)]
    if len(counts) < 2 or min(counts) < 2:
        raise ExperimentError(
            "There is nothing to hold out." if len(counts) > 1 else "All labels are the same.",
            expected="two or more classes, each in two or more groups",
            got=f"{len(counts)} classes in {counts} groups", hint="groups= says which runs belong together.")
    folds = min(folds, *counts)
    made = sklearn().model_selection.StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    splits = [(learnt, asked) for learnt, asked in made.split(np.zeros(len(labels)), labels, samples.groups)]
    return [(learnt, asked) for learnt, asked in splits if len(asked)]


def _by_type(labels: np.ndarray, types: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """A random label for each type, with the labels' own frequencies."""
    every, at = np.unique(types, return_inverse=True)
    return draw.choice(labels, size=len(every))[at]


def _one_hot(tokens: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Which tokens each sample has: (sample, different tokens) float32 counts, a share of the sample's own."""
    every = {token: column for column, token in enumerate(sorted({token for some in tokens for token in some}))}
    found = np.zeros((len(tokens), len(every)), dtype=np.float32)
    for row, some in enumerate(tokens):
        for token in some:
            found[row, every[token]] += 1 / len(some)
    return found


def _auc_interval(
    scores: np.ndarray, labels: np.ndarray, groups: np.ndarray, seed: int, draws: int = 200,
) -> tuple[float, float, float]:
    """AUC of held-out scores, groups drawn with replacement."""
    if not np.isfinite(scores).all():
        return float("nan"), float("nan"), float("nan")
    area = sklearn().metrics.roc_auc_score
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    draw, found = np.random.default_rng(seed), []
    for _ in range(draws):
        chosen = np.concatenate([members[i] for i in draw.integers(len(members), size=len(members))])
        if 0 < labels[chosen].sum() < len(chosen):
            found.append(area(labels[chosen], scores[chosen]))
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if found else (np.nan, np.nan)
    return float(area(labels, scores)), float(low), float(high)


# from runs to samples -------------------------------------------------------------------------------------------


def _samples(
    runs: Sequence[Run], labels: Sequence[Any], site: str, layers: Sequence[int] | int | None, tokens: Indices,
    groups: Sequence[Hashable] | None,
) -> tuple[_Samples, list[int]]:
    if not runs or not all(isinstance(run, Run) for run in runs):
        raise ExperimentError("A probe learns from runs.", expected="what model.run([...], capture=site) gives",
                              got=type(runs[0]).__name__ if runs else "none")
    if len(labels) != len(runs) or (groups is not None and len(groups) != len(runs)):
        raise ExperimentError("Every run needs a label, and a group where groups are given.",
                              expected=f"{len(runs)} of each",
                              got=f"{len(labels)} labels" + (f", {len(groups)} groups" if groups is not None else ""))
    numbers = runs[0].layers(site) if layers is None else [layers] if isinstance(layers, int) else list(layers)
    if not numbers:
        raise SiteError(f"The runs hold no {site!r}.", expected=f"runs that captured {site}", got=repr(runs[0])[:120],
                        hint=f'Run again with capture=["{site}"].')
    each = not isinstance(labels[0], str) and isinstance(labels[0], Iterable)
    values, told, belong, types, seen = [], [], [], [], []
    for number, (run, label) in enumerate(zip(runs, labels, strict=True)):
        columns = _columns(run, tokens, number)
        found = np.stack([run.tensor(site, layer)[columns].float().cpu().numpy() for layer in numbers], axis=1)
        group = repr(groups[number]) if groups is not None else repr(run.ids)
        ids = [run.ids[run.positions[column]] for column in columns]
        if each:
            some = list(label)
            if len(some) != len(columns):
                raise ExperimentError("Every chosen token needs a label.", expected=f"{len(columns)} for run {number}",
                                      got=f"{len(some)}")
            values.append(found)
            told += some
            belong += [group] * len(some)
            types += ids
            seen += [(one,) for one in ids]
        else:
            values.append(found.mean(0, keepdims=True))
            told.append(label)
            belong.append(group)
            types.append(group)
            seen.append(tuple(ids))
    index = np.unique(np.array(belong, dtype=object).astype(str), return_inverse=True)[1]
    return _Samples(np.concatenate(values), np.array(told), index, np.array([str(one) for one in types]), seen), numbers


def _columns(run: Run, tokens: Indices, number: int) -> list[int]:
    """Where the chosen tokens stand among those that the run captured."""
    chosen = freeze(tokens)
    if chosen is None:
        return list(range(len(run.positions)))
    prompt = Prompts([run.ids], lambda: run.model.vocabulary, open_ended=False)
    prompt.check(chosen, [0])
    at = {position: column for column, position in enumerate(run.positions)}
    wanted = [*prompt.chosen(chosen, 0)]
    missing = [position for position in wanted if position not in at]
    if missing or not wanted:
        raise SiteError("A run did not keep the chosen tokens." if missing else "A run has none of the chosen tokens.",
                        expected="tokens that were captured", got=f"run {number}: {missing[:5] or repr(tokens)}")
    return [at[position] for position in wanted]

