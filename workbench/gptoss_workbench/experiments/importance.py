"""Which experts a behaviour needs: take each away, and see what it costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from gptoss_workbench.errors import ExperimentError, SiteError
from gptoss_workbench.experiments.metrics import Metric
from gptoss_workbench.experiments.rows import token_log_probs
from gptoss_workbench.experiments.watch import Cost, Watch, completeness, identity, resumed
from gptoss_workbench.hooks.capture import Capture
from gptoss_workbench.hooks.edits import Edit
from gptoss_workbench.hooks.prompts import Prompts
from gptoss_workbench.hooks.routing import route_around, silence_experts
from gptoss_workbench.hooks.selection import Indices, freeze, resolve
from gptoss_workbench.model.cache import KVCache
from gptoss_workbench.model.config import ModelConfig
from gptoss_workbench.model.model import Model, Prompt
from gptoss_workbench.model.provenance import with_method
from gptoss_workbench.model.run import Run

TOKENS_PER_BATCH = 4096  # bounds memory; larger batches were not faster on two cores
_EDITS = {"silence": silence_experts, "route_around": route_around}


@torch.no_grad()
def expert_importance(
    model: Model, prompts: Sequence[Prompt], metric: Metric | Literal["loss"],
    mode: Literal["silence", "route_around"] = "silence", *, completions: Sequence[str | Sequence[int]] | None = None,
    layers: Indices = None, experts: Indices = None, tokens: Indices = None, labels: Sequence[str] | None = None,
    resume: xr.Dataset | None = None, on_plan: Callable[[Cost], object] | None = None,
    on_progress: Callable[[int, int], object] | None = None, should_stop: Callable[[], bool] | None = None,
) -> xr.Dataset:
    """How much worse each prompt fares without each expert, beside how much it uses that expert.

    Args:
        prompts: several; each is tried without each expert that serves it.
        metric: read after the last token, higher being better, e.g. ``wb.logit_diff(" Paris", " Rome")``; or "loss",
            the mean surprisal of ``completions`` in nats a token.
        mode: "silence", the expert is chosen and counts nothing; "route_around", the next best steps in.
        completions: for "loss", what follows each prompt.
        layers, experts: which to try; None for all.
        tokens: where the expert is taken away, and where its use is counted, in prompt and completion; None for all.
        labels: a name for each prompt's kind, put beside ``prompt``, for ``.groupby("label").mean()``.
        resume: an earlier result of the same question, stopped or not: only what is NaN in it is computed.
        on_plan: told the ``Cost`` before anything runs: at most so much, since who serves is known only then.
        on_progress: called with (prompts and cases done, in all).
        should_stop: asked before each prompt and each batch; True ends early and leaves NaN where nothing was computed.

    Returns:
        Dataset over (layer, expert, prompt), float32: ``harm``, the fall of the metric or the rise of the loss, 0 where
        the expert serves none of the tokens (exactly, it need not be tried); ``use``, its mean share of the router's
        weight over the tokens. ``value`` (prompt): metric or loss with every expert. ``agreement`` (layer): Spearman's
        rank correlation of the two, each averaged over the prompts, NaN where one of them is constant or unknown.
        attrs: whether it is ``complete``, else what is ``missing``; the provenance.

    Raises:
        ExperimentError: an unknown mode, completions or labels that do not fit, or ``resume`` of another question.

    Ablation one at a time, as for heads in Michel et al. 2019 (arXiv 1905.10650).

    Pitfalls: experts that stand in for each other all look unimportant, and one that every token of a format needs
    looks important to every task: compare tasks, not only experts. Silencing leaves a hole that nothing prepared for;
    routing around measures what this expert has over the next best. Hit rates on circuits that are known, beside those
    of usage: docs/truth.md.
    """
    if mode not in _EDITS:
        raise ExperimentError("There is no such way to take an expert away.", expected=" or ".join(_EDITS),
                              got=repr(mode))
    rows, starts = _rows(model, prompts, metric, completions, labels)
    config = model.config
    wanted = resolve(freeze(layers), config.num_hidden_layers, "layer")
    who = resolve(freeze(experts), config.num_local_experts, "expert")
    name = metric if isinstance(metric, str) else metric.name
    question = identity(model, "expert importance", rows, starts, name, mode, wanted, who, freeze(tokens))
    harm = resumed(resume, question, (len(wanted), len(who), len(rows)), "harm")
    watch = Watch(on_plan, on_progress, should_stop)
    chosen = [_chosen(model, row, tokens) for row in rows]
    watch.plan(_cost(harm, rows, chosen, config))
    use, value = np.full_like(harm, np.nan), np.full(len(rows), np.nan, dtype=np.float32)
    bases, cases = [], []
    for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
        if watch.stopped():
            break
        run = model.run(row, capture="router")
        at = chosen[number]
        base = _Base(run, start, tuple(at))
        bases.append(base)
        value[number] = float(base.values(model, run.hidden[None, base.begin:], metric)[0])
        received = _received(run, at, config.num_local_experts)[np.ix_(wanted, who)]
        use[:, :, number] = received
        harm[:, :, number][received == 0] = 0
        cases += [(number, int(i), int(j)) for i, j in np.argwhere(received > 0)]
    # The batches are those of all cases, so that one that is left gives the bits that it would have given.
    left = [batch for batch in _batches(cases, rows) if any(np.isnan(harm[i, j, number]) for number, i, j in batch)]
    total = len(rows) + len(cases)
    done, current, prefix = total - sum(map(len, left)), -1, model.new_cache(1)
    whole = len(bases) == len(rows)
    if whole:
        watch.done(done, total)
    for batch in left if whole else ():
        if watch.stopped():
            break
        number = batch[0][0]
        base = bases[number]
        if number != current:
            current, prefix = number, base.prefix(model)
        edits: list[Edit] = [_EDITS[mode](layer=wanted[i], experts=who[j], tokens=base.places, prompt=row)
                             for row, (_, i, j) in enumerate(batch)]
        changed = base.values(model, base.changed(model, prefix, edits, len(batch)), metric).cpu().numpy()
        for (_, i, j), other in zip(batch, changed, strict=True):
            harm[i, j, number] = other - value[number] if metric == "loss" else value[number] - other
        done += len(batch)
        watch.done(done, total)
    dims = ("layer", "expert", "prompt")
    of_first = Run(model, rows[0], torch.empty(0), {}, range(len(rows[0]))).provenance
    record = with_method(of_first, "expert_importance", metric=name, mode=mode, prompts=rows,
                         completions_from=starts, tokens=repr(freeze(tokens)))
    return xr.Dataset(
        {"harm": (dims, harm), "use": (dims, use), "value": ("prompt", value), "agreement": ("layer", [
            _spearman(costs.mean(-1), used.mean(-1)) for costs, used in zip(harm, use, strict=True)])},
        coords={"layer": wanted, "band": ("layer", [config.bands[layer] for layer in wanted]), "expert": who,
                "prompt": range(len(rows)),
                **({} if labels is None else {"label": ("prompt", np.array(list(labels), dtype=object))})},
        attrs={"model": model.name, "metric": name, "mode": mode, "question": question,
               **completeness(int((~np.isnan(harm)).sum()), harm.size, "cases"), "provenance": record},
    )


def _rows(
    model: Model, prompts: Sequence[Prompt], metric: Metric | str, completions: Sequence[str | Sequence[int]] | None,
    labels: Sequence[str] | None,
) -> tuple[list[list[int]], list[int]]:
    """The ids to run, and where in them the completions begin."""
    rows = [model.encode(prompt) for prompt in prompts]
    starts = [len(row) for row in rows]
    loss = metric == "loss"
    if not rows or not (loss or isinstance(metric, Metric)) or loss != (completions is not None):
        raise ExperimentError("That can't be measured.", got=f"{len(rows)} prompts, metric={metric!r}"[:150],
                              expected='prompts and a metric, or prompts, "loss" and completions=')
    for what, given in (("completions", completions), ("labels", labels)):
        if given is not None and len(given) != len(rows):
            raise ExperimentError(f"{what}= needs one for each prompt.", expected=f"{len(rows)} {what}", got=len(given))
    if completions is not None:
        rows = [row + model.encode(after) for row, after in zip(rows, completions, strict=True)]
    return rows, starts


@dataclass(frozen=True)
class _Base:
    """A prompt as it is, which every case of it begins with.

    Attributes:
        start: where its completion begins, or its length.
        places: the positions where experts are taken away. Before the first of them nothing can change, so those tokens
            are read once.
    """

    run: Run
    start: int
    places: tuple[int, ...]

    @property
    def begin(self) -> int:
        return min(self.places)

    def prefix(self, model: Model) -> KVCache:
        """What was read before ``begin``."""
        cache = model.new_cache(1)
        if self.begin:
            self._read(model, cache, (), 1, slice(0, self.begin))
        return cache

    def changed(self, model: Model, prefix: KVCache, edits: Sequence[Edit], cases: int) -> Tensor:
        """Hidden states from ``begin`` on, (case, token, d_model), where row i has its edits alone."""
        cache = prefix.select(torch.zeros(cases, dtype=torch.int64, device=model.device))
        return self._read(model, cache, edits, cases, slice(self.begin, len(self.run)))

    def _read(self, model: Model, cache: KVCache, edits: Sequence[Edit], cases: int, part: slice) -> Tensor:
        taps = model.new_taps(Capture(), edits, [self.run.ids] * cases)
        ids, positions = model.pad_left([self.run.ids] * cases)
        hidden, _ = model.read(ids[:, part], positions[:, part], cache, taps, range(cases), last_only=False)
        taps.finish()
        return hidden

    def values(self, model: Model, hidden: Tensor, metric: Metric | str) -> Tensor:
        """The metric of hidden states from ``begin`` on, (case, token, d_model): (case,) float32."""
        if isinstance(metric, Metric):
            return metric.of(model, model.transformer.unembed(hidden[:, -1])).float()
        ids = torch.tensor(self.run.ids[self.start:], device=model.device)
        before = self.run.hidden[self.start - 1:self.begin]
        after = hidden[:, max(0, self.start - 1 - self.begin):-1]
        return torch.stack([-token_log_probs(model, torch.cat((before, states)), ids).mean() for states in after])


def _chosen(model: Model, row: list[int], tokens: Indices) -> list[int]:
    """The positions where experts are taken away."""
    prompt, selection = Prompts([row], lambda: model.vocabulary, open_ended=False), freeze(tokens)
    prompt.check(selection, [0])
    found = [*prompt.chosen(selection, 0)]
    if not found:
        raise SiteError("A prompt has none of the chosen tokens.", expected="one or more in each",
                        got=f"{tokens!r}: none in {model.decode(row)!r}"[:200])
    return found


def _cost(harm: np.ndarray, rows: list[list[int]], chosen: list[list[int]], config: ModelConfig) -> Cost:
    """Each prompt once, what stands before the first chosen token once more, and what is left without each expert."""
    passes, tokens = len(rows), sum(map(len, rows))
    fixed = True
    for number, (row, at) in enumerate(zip(rows, chosen, strict=True)):
        blank = np.isnan(harm[:, :, number])
        known = bool((~blank).any())  # then those who do not serve are known too
        most = blank.sum(1) if known else np.minimum(blank.sum(1), config.num_experts_per_tok * len(at))
        fixed &= known or (len(at) == 1 and harm.shape[1] == config.num_local_experts)
        cases, begin = int(most.sum()), min(at)
        passes += cases + (cases > 0 and begin > 0)
        tokens += cases * (len(row) - begin) + (cases > 0) * begin
    return Cost(passes, tokens, at_most=not fixed)


def _received(run: Run, at: list[int], experts: int) -> np.ndarray:
    """The mean router weight of each expert over some columns, (layer, expert) float32."""
    weights, chosen = (run.tensor(f"router.{what}")[:, at] for what in ("weights", "experts"))
    out: Tensor = torch.zeros(len(weights), len(at), experts, device=weights.device)
    return out.scatter_(-1, chosen, weights.float()).mean(1).cpu().numpy()


def _batches(todo: list[tuple[int, int, int]], rows: list[list[int]]) -> list[list[tuple[int, int, int]]]:
    """Cases of one prompt together, so that nothing is padded."""
    batches: list[list[tuple[int, int, int]]] = []
    for case in todo:
        full = batches and (len(batches[-1]) + 1) * len(rows[case[0]]) > TOKENS_PER_BATCH
        if not batches or full or batches[-1][0][0] != case[0]:
            batches.append([])
        batches[-1].append(case)
    return batches


def _spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation; equal values share the mean of their ranks."""
    ranks = [np.array([(values < one).sum() + ((values == one).sum() - 1) / 2 for one in values])
             for values in (first, second)]
    if not (np.isfinite(first).all() and ranks[0].std() > 0 and ranks[1].std() > 0):
        return float("nan")
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])
