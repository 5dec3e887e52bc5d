"""Cases put together into waves that fit into memory, and run one wave after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gptoss_workbench.experiments.sweeps.base import Base, base_bytes, read_base
from gptoss_workbench.experiments.sweeps.cones import Cones, cones, touches
from gptoss_workbench.experiments.sweeps.wave import Wave
from gptoss_workbench.experiments.watch import MEMORY, Cost
from gptoss_workbench.hooks.capture import Capture
from gptoss_workbench.hooks.edits import Edit
from gptoss_workbench.hooks.prompts import Prompts
from gptoss_workbench.model.memory import available, gigabytes
from gptoss_workbench.model.model import Model

ROWS_TOGETHER = 8192
"""Most columns of one wave. More were not faster: each expert has its hundreds of rows, which is what counts."""


@dataclass(frozen=True)
class Case:
    """One prompt, by number, and the edits made on it."""

    prompt: int
    edits: tuple[Edit, ...]


@dataclass(frozen=True, kw_only=True)
class SweepPlan(Cost):
    """What a sweep will cost, known before it starts.

    Attributes:
        passes, tokens, generated, nbytes, at_most: see ``Cost``; a case whose edits change no bit ends early.
        cases: runs that are asked for.
        prompts: runs without a case's edits, which the others start from.
        waves: how many times weights are gone through, apart from those.
        token_layers: tokens times layers that are computed, the prompts' own included.
        naive: the same for a loop of one run after the other.
        free: memory that is free now.
    """

    cases: int
    prompts: int
    waves: int
    token_layers: int
    naive: int
    free: int

    def beside(self, lengths: Sequence[int]) -> SweepPlan:
        """With whole runs of so many tokens on top, which the experiment makes itself."""
        return replace(self, passes=self.passes + len(lengths), tokens=self.tokens + sum(lengths))

    def __str__(self) -> str:
        part, prompts = self.token_layers / max(1, self.naive), f"{self.prompts} prompt{'s' * (self.prompts != 1)}"
        return (f"{'at most ' * self.at_most}{self.passes:,} passes, as much as {self.tokens:,} tokens; of them "
                f"{self.cases:,} edited runs from {prompts} in {self.waves} waves: {self.token_layers:,} token-layers, "
                f"{part:.0%} of the {self.naive:,} of a loop; about {gigabytes(self.nbytes)} of memory, "
                f"{gigabytes(self.free)} free")


@dataclass(frozen=True)
class _Group:
    """Prompts whose own runs are in memory together, and the waves of their cases."""

    prompts: list[int]
    cases: list[int]
    cones: Cones
    waves: list[list[int]]  # numbers into ``cases``

    def of(self, wanted: np.ndarray | None) -> _Group:
        """With those waves alone that hold a wanted case."""
        if wanted is None:
            return self
        return replace(self, waves=[wave for wave in self.waves if any(wanted[self.cases[case]] for case in wave)])


class Engine:
    """The cases of a sweep, planned; ``stream`` runs them.

    Args:
        prompts: ids.
        cases: see ``Case``; their order is free, results come by number.
        always: edits that each prompt's own run has too, by prompt; those of a case act after them at the same place.
        memory: bytes that may be taken beside the weights.
        wanted: which cases are still to be measured; None for all. Cases go together as they would if all were wanted,
            so that what is left of a stopped sweep gives the bits that it would have given.

    Raises:
        SiteError, EditError: an edit names what does not exist.
    """

    def __init__(
        self, model: Model, prompts: Sequence[Sequence[int]], cases: Sequence[Case],
        always: Sequence[Sequence[Edit]] | None = None, memory: int = MEMORY, wanted: np.ndarray | None = None,
    ) -> None:
        self._model, self._prompts, self._memory, self.cases = model, prompts, memory, cases
        self._always = [()] * len(prompts) if always is None else always
        of = [Prompts([ids], lambda: model.vocabulary, False) for ids in prompts]
        for case in cases:  # whatever is wrong is said before anything runs
            model.new_taps(Capture(), case.edits, [prompts[case.prompt]])
        self._theirs = [touches(edits, own, model.config) for edits, own in zip(self._always, of, strict=True)]
        self._mine = [touches(case.edits, of[case.prompt], model.config) for case in cases]
        self._groups = [left for group in self._grouped() if (left := group.of(wanted)).waves]
        self.plan = self._plan()

    # planning -------------------------------------------------------------------------------------------------------

    def _grouped(self) -> Iterator[_Group]:
        """Prompts of like lengths together, as many as fit into a third of the memory."""
        wanted = sorted({case.prompt for case in self.cases}, key=lambda prompt: len(self._prompts[prompt]))
        some: list[int] = []
        for prompt in wanted:
            columns = (len(some) + 1) * len(self._prompts[prompt])
            if some and base_bytes(self._model, columns) > self._memory // 3:
                yield self._group(some)
                some = []
            some.append(prompt)
        if some:
            yield self._group(some)

    def _group(self, prompts: list[int]) -> _Group:
        width = max(len(self._prompts[prompt]) for prompt in prompts)
        inside = {*prompts}
        cases = [number for number, case in enumerate(self.cases) if case.prompt in inside]
        of = [self.cases[number].prompt for number in cases]
        found = cones([self._mine[number] for number in cases], [self._theirs[prompt] for prompt in of],
                      [width - len(self._prompts[prompt]) for prompt in of], width, self._model.config)
        return _Group(prompts, cases, found, self._waves(found, width))

    def _waves(self, found: Cones, width: int) -> list[list[int]]:
        """Those that begin in the same layers together, so that what comes before is left out."""
        rows = found.rows.max(0)
        room = min(ROWS_TOGETHER, self._memory // 2 // self._row_bytes)
        begin_columns = found.start[np.minimum(found.begins, len(found.start) - 1), np.arange(len(rows))]
        waves: list[list[int]] = []
        filled = 0
        for case in np.lexsort((begin_columns, found.begins)).tolist():
            taken = int(rows[case]) + self._case_bytes(width) // self._row_bytes
            if not waves or filled + taken > room:
                waves.append([])
                filled = 0
            waves[-1].append(case)
            filled += taken
        return waves

    @property
    def _row_bytes(self) -> int:
        """What one column takes on its way through the experts, where it takes most."""
        c = self._model.config
        values = c.num_experts_per_tok * (6 * c.intermediate_size + 3 * c.hidden_size) + 6 * c.hidden_size
        return values * self._model.weights.embed.element_size()

    def _case_bytes(self, width: int) -> int:
        """What a case takes whatever its columns are: its logits, masks and positions."""
        return self._model.config.vocab_size * 8 + width * 16

    def _plan(self) -> SweepPlan:
        layers, lengths = self._model.config.num_hidden_layers, [len(ids) for ids in self._prompts]
        most = halves = naive = 0
        for group in self._groups:
            width = max(lengths[prompt] for prompt in group.prompts)
            left = [case for wave in group.waves for case in wave]
            halves += int(group.cones.rows[:-1, left].sum())
            naive += layers * sum(lengths[self.cases[group.cases[case]].prompt] for case in left)
            held = base_bytes(self._model, len(group.prompts) * width)
            own = len(group.prompts) * width * self._row_bytes
            waves = [int(group.cones.rows[:, wave].sum(1).max()) * self._row_bytes + len(wave) * self._case_bytes(width)
                     for wave in group.waves]
            most = max(most, held + max([own, *waves]))
        mine = [prompt for group in self._groups for prompt in group.prompts]
        cases = sum(len(wave) for group in self._groups for wave in group.waves)
        halves += 2 * layers * sum(lengths[prompt] for prompt in mine)
        return SweepPlan(
            passes=cases + len(mine), tokens=-(-halves // (2 * layers)), nbytes=most, cases=cases, prompts=len(mine),
            waves=sum(len(group.waves) for group in self._groups), token_layers=-(-halves // 2), naive=naive,
            free=available(self._model.device), at_most=True)

    # running --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def stream(self, should_stop: Callable[[], bool] | None = None) -> Iterator[tuple[list[int], Tensor]]:
        """Run wave after wave: the numbers of the cases of each, and their logits after the last token (case, vocab).

        Args:
            should_stop: asked before each half of a layer; True ends early, and the wave in progress is lost.

        Raises:
            EditNeverFired: an edit's place never came by.
        """
        stop = should_stop or (lambda: False)
        for group in self._groups:
            if stop():
                return
            base = read_base(self._model, [self._prompts[prompt] for prompt in group.prompts],
                             [self._always[prompt] for prompt in group.prompts])
            always = {touch.half for prompt in group.prompts for touch in self._theirs[prompt]}
            for wave in group.waves:
                numbers = [group.cases[case] for case in wave]
                logits = self._wave(group, base, wave, always, stop).logits()
                if logits is None:
                    return
                yield numbers, logits

    def _wave(self, group: _Group, base: Base, wave: list[int], always: set[int], stop: Callable[[], bool]) -> Wave:
        cases = [self.cases[group.cases[case]] for case in wave]
        taps = [self._model.new_taps(Capture(), (*self._always[case.prompt], *case.edits), [self._prompts[case.prompt]])
                for case in cases]
        rows = [group.prompts.index(case.prompt) for case in cases]
        inherited = [len(self._always[case.prompt]) for case in cases]
        return Wave(self._model, base, rows, taps, inherited, group.cones.of(wave), always, stop)
