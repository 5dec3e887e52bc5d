"""Generation: a run that goes on, token by token, and can be stopped at any of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import xarray as xr
from torch import Tensor

from gptoss_workbench.errors import WorkbenchError
from gptoss_workbench.harmony.spans import Span, parse
from gptoss_workbench.hooks.capture import Capture, Layout
from gptoss_workbench.hooks.edits import Edit
from gptoss_workbench.hooks.taps import Filed, group
from gptoss_workbench.model import graphs
from gptoss_workbench.model.cache import KVCache
from gptoss_workbench.model.graphs import Decoder
from gptoss_workbench.model.provenance import Provenance, Settings, record
from gptoss_workbench.model.run import Place, Run, join_chunks
from gptoss_workbench.model.sampling import Sampling, sample

if TYPE_CHECKING:
    from gptoss_workbench.model.model import Model


Taken = tuple[dict[int, Tensor], Filed]
"""Hidden states (token, d_model) by prompt, and captures, of one step."""


@dataclass(frozen=True, eq=False)
class Step:
    """One generated token.

    Attributes:
        index: 0 for the first generated token.
        token, text: its id and text.
        logprob: its log-probability (nats) under the model, before temperature and cuts.
        position: its place in prompt + generation.
    """

    index: int
    token: int
    text: str
    logprob: float
    position: int
    _generation: Generation
    _captured: tuple[int, int]

    @property
    def data(self) -> xr.Dataset:
        """What was captured in the pass that chose this token: the prompt's tokens first, then one token a step."""
        first, stop = self._captured
        data = self._generation.data
        return data.sel({dim: slice(first, stop - 1) for dim in ("token", "query") if dim in data.dims})


class Generation:
    """A prompt's continuation. Iterate for steps, or ask for what was said and it runs to its end.

    ``stop()`` may be called from any thread: the step in progress ends, what there is stays. A KeyboardInterrupt in
    the loop is such a stop too.

    Attributes:
        prompt: ids of the prompt.
        reason: why it ended: "stop_token", "max_tokens", "stopped", "interrupted"; None before that.
    """

    def __init__(self, model: Model, prompt: Sequence[int], driver: Driver, row: int) -> None:
        self._model, self._driver, self._row = model, driver, row
        self.prompt = list(prompt)
        self._created = time.time()
        self.reason: str | None = None
        self.steps: list[Step] = []
        self._begun = False  # whether somebody iterates this one; in a batch the rows advance together all the same
        self._data: tuple[int, xr.Dataset] | None = None

    def __repr__(self) -> str:
        state = self.reason or ("running" if self._begun else "not started")
        return f"<Generation of {len(self.steps)} tokens after {len(self.prompt)}, {state}>"

    def __iter__(self) -> Iterator[Step]:
        """Steps from the first on; waits for the model only where a step does not exist yet."""
        index, self._begun = 0, True
        while True:
            while index < len(self.steps):
                yield self.steps[index]
                index += 1
            if self.reason is not None or not self._driver.advance(self):
                yield from self.steps[index:]
                return

    def finish(self) -> Generation:
        """Let it run to its end, and give it back."""
        for _ in self:
            pass
        return self

    @property
    def decoding(self) -> str:
        """How tokens after the first are made: "recorded" (see ``model.graphs``), or "step by step" and why."""
        return self._driver.decoding

    def stop(self) -> None:
        """End after the token in progress. Safe from any thread; a generation that has ended stays as it is."""
        self._driver.stop(self)

    def change(self, edits: Sequence[Edit] | Edit) -> None:
        """From the next token on, let these edits act on this generation instead of those so far; safe in any thread.

        Other values in the same places (a vector, a scale, which experts) cost a recorded generation no new recording.
        The run's edits are afterwards those before, up to this token, and these from it on, so that they can be
        applied to the whole text again.

        Raises:
            EditError: an edit by labels, or one that takes values from this very pass.
        """
        self._driver.change(self, (edits,) if isinstance(edits, Edit) else tuple(edits))

    @property
    def tokens(self) -> list[int]:
        """Generated ids: run to its end if nobody iterates this generation yet, else those there are so far."""
        if not self._begun:
            self.finish()
        return [step.token for step in list(self.steps)]

    @property
    def ids(self) -> list[int]:
        """Prompt and generated ids."""
        return self.prompt + self.tokens

    @property
    def provenance(self) -> Provenance:
        """Where it comes from: weights, versions, prompt ids, sampling, edits; and the ids generated so far."""
        return record(self._model, self.prompt, generated=[step.token for step in list(self.steps)],
                      edits=self._driver.edits, settings=self._driver.settings[self._row], created=self._created)

    @property
    def spans(self) -> list[Span]:
        """Spans of the generated part; their positions count from its first token."""
        tokens = self.tokens
        return parse(tokens, self._model.vocabulary, after=self.prompt, finished=self.reason is not None)

    def text(self, channel: str | None = None) -> str:
        """What was said: the content of one channel, or of all messages, or plain text where there are none."""
        content = [span for span in self.spans
                   if span.field == "content" and (channel is None or span.channel == channel)]
        return "\n".join(self._model.decode(span.ids) for span in content)

    @property
    def data(self) -> xr.Dataset:
        """Everything captured so far, prompt included. The last token was chosen but not read, so it has no entry."""
        count = len(self.steps)
        if self._data is None or self._data[0] != count:
            self._data = (count, self.run().data)
        return self._data[1]

    def run(self) -> Run:
        """What was read so far as a Run: captures, and hidden states of prompt and generation."""
        ids = self.ids
        hidden, kept, positions, layout = self._driver.so_far(self._row)
        generated = max(0, len(hidden) - len(self.prompt))
        settings = self._driver.settings[self._row]._replace(generated=generated)
        return Run(self._model, ids[: len(hidden)], hidden, kept, positions, self._driver.edits, settings=settings,
                   layout=layout)


class Driver:
    """Decodes a batch of prompts together. Prompts that have ended leave the batch.

    Not part of the public API; ``Model.generate`` makes it. One lock makes ``advance`` safe from several threads.
    """

    def __init__(
        self, model: Model, prompts: Sequence[Sequence[int]], capture: Capture, edits: Sequence[Edit],
        max_tokens: int, how: Sampling, seeds: Sequence[int | None], stop_ids: frozenset[int],
        graph: bool | None = None,
    ) -> None:
        self._model, self.edits, self._max, self._how = model, tuple(edits), max_tokens, how
        self._stop_ids, self._prompts = stop_ids, [list(prompt) for prompt in prompts]
        self._taps = model.new_taps(capture, edits, prompts, open_ended=True, more=max_tokens)
        self._capture = capture
        self.settings = [Settings(row, len(prompts), None, 0, how, seed, max_tokens, stop_ids)
                         for row, seed in enumerate(seeds)]
        self._rngs = [None if seed is None else torch.Generator().manual_seed(seed) for seed in seeds]
        self.generations = [Generation(model, prompt, self, row) for row, prompt in enumerate(self._prompts)]
        self._read: list[Taken | Callable[[], Taken]] = []  # of each step; recorded ones are taken apart when asked
        self._stopped = threading.Event()
        self._stop_rows: set[int] = set()
        self._lock = threading.RLock()
        self._active = list(range(len(self._prompts)))
        self._cache: KVCache | None = None
        self._decoder: Decoder | None = None  # where the tokens after the first come from a recording
        self._graph = graph
        self.decoding = "step by step: as asked" if graph is False else "not begun"

    def stop(self, generation: Generation) -> None:
        self._stop_rows.add(generation._row)

    def advance(self, generation: Generation) -> bool:
        """Make the next token of every active prompt. False when the given generation has ended."""
        with self._lock:
            try:
                self._end_stopped()
                if generation.reason is None:
                    self._step()
                    self._end_stopped()
            except KeyboardInterrupt:
                self._taps.take()  # of the step that did not end
                for row in self._active:
                    self.generations[row].reason = "interrupted"
                self._active = []
            except BaseException:
                self._taps.take()
                for row in self._active:
                    self.generations[row].reason = "stopped"
                self._active = []
                raise
            return generation.reason is None

    def change(self, generation: Generation, edits: Sequence[Edit]) -> None:
        """See ``Generation.change``. The newest token was chosen, not read: it is the first that the edits see."""
        with self._lock:
            row, chosen = generation._row, len(generation.steps)
            first = len(self._prompts[row]) + chosen - 1 if chosen else 0
            taps = self._taps.changed(row, first, edits)
            if self._decoder is not None:
                ends = {one: len(self._prompts[one]) + len(self.generations[one].steps) - 1
                        for one in self._decoder.rows}
                feed = taps.feed(list(ends), list(ends.values()))
                if isinstance(feed, str):
                    raise WorkbenchError("A recorded generation can't go on with these edits.", got=feed,
                                         expected="edits that do the same for every token",
                                         hint="Generate with graph=False.")
                self._decoder.change(feed)
            self._taps, self.edits = taps, taps.edits

    def so_far(self, row: int) -> tuple[Tensor, dict[Place, Tensor], list[int], Layout]:
        """Hidden states, captures, captured positions and labels of one prompt."""
        with self._lock:
            read = self._taken()
            parts = [hidden[row] for hidden, _ in read if row in hidden]
            hidden = torch.cat(parts) if parts else torch.empty(0, self._model.config.hidden_size)
            own = [part for _, filed in read for part in filed if part[0] == row]
            kept = join_chunks(group(own, len(self._prompts))[row], len(hidden))
            return hidden, kept, self._taps.positions_of(row, len(hidden)), self._taps.layout(row)

    def _taken(self) -> list[Taken]:
        found = [one() if callable(one) else one for one in self._read]
        self._read = [*found]
        return found

    def _end_stopped(self) -> None:
        for row in [row for row in self._active if row in self._stop_rows]:
            self._leave(row, "stopped")

    def _leave(self, row: int, reason: str) -> None:
        keep = [i for i, other in enumerate(self._active) if other != row]
        self.generations[row].reason = reason  # first: an interrupt must not leave a row that is neither
        self._active = [self._active[i] for i in keep]
        if self._decoder is not None:
            if not self._active:
                self._decoder.end()
        elif self._cache is not None:
            self._cache = self._cache.select(torch.tensor(keep, dtype=torch.int64, device=self._model.device))

    @torch.no_grad()
    def _step(self) -> None:
        rows = list(self._active)
        read, choose = self._read_on(rows)
        self._read.append(read)  # one step at once, so that an interrupt leaves all of it or nothing
        ended: list[tuple[int, str]] = []
        for i, row in enumerate(rows):
            generation = self.generations[row]
            token, logprob = choose(i)
            index = len(generation.steps)
            position = len(self._prompts[row]) + index
            captured = (0, position) if index == 0 else (position - 1, position)
            text = self._model.vocabulary.token_text(token)
            generation.steps.append(Step(index, token, text, logprob, position, generation, captured))
            if token in self._stop_ids:
                ended.append((row, "stop_token"))
            elif index + 1 >= self._max:
                ended.append((row, "max_tokens"))
        for row, reason in ended:
            self._leave(row, reason)
        if ended and not self._active and not self._stop_rows:
            if self._capture.tokens is not None:
                self._taken()  # whether they came by shows when they are filed
            self._taps.finish()

    def _read_on(self, rows: list[int]) -> tuple[Taken | Callable[[], Taken], Callable[[int], tuple[int, float]]]:
        """Read the prompts, or the newest token of each row.

        Returns:
            Hidden states by prompt and captures, or what gives them; and what chooses the next token of the i-th row.
        """
        device = self._model.device
        last = {row: self.generations[row].steps[-1] for row in rows if self._cache is not None}
        if last and self._decoder is None and self._graph is not False:
            self._decoder = self._recorded(rows, last)
        if self._decoder is not None:
            return self._play(self._decoder, rows, last)
        if self._cache is None:
            self._cache = self._model.new_cache(len(rows))
            ids, positions = self._model.pad_left(self._prompts)
        else:
            ids = torch.tensor([[last[row].token] for row in rows], device=device)
            positions = torch.tensor([[last[row].position] for row in rows], device=device)
        hidden, logits = self._model.read(ids, positions, self._cache, self._taps, rows)
        assert logits is not None  # of the last column
        states = {row: hidden[i][positions[i] >= 0] for i, row in enumerate(rows)}
        return (states, self._taps.take()), lambda i: sample(logits[i], self._how, self._rngs[rows[i]])

    def _recorded(self, rows: list[int], last: Mapping[int, Step]) -> Decoder | None:
        """The decoder for the tokens after the first, if there is anything to gain and nothing in the way."""
        assert self._cache is not None
        reason = graphs.why_not(self._model, len(rows))
        feed = self._taps.feed(rows, [last[row].position for row in rows]) if reason is None else reason
        if isinstance(feed, str):
            self.decoding = f"step by step: {feed}"
            if self._graph:
                raise WorkbenchError("This generation can't be decoded by a recording.", got=feed,
                                     expected="captures and edits that do the same for every token",
                                     hint="Leave out graph=True: it then decodes step by step.")
            self._graph = False
            return None
        self.decoding = "recorded"
        decoder = Decoder(self._model, feed, self._cache, self._max)
        self._cache = KVCache(0, 0)  # its tensors are in the decoder's buffers now
        return decoder

    def _play(self, decoder: Decoder, rows: list[int], last: Mapping[int, Step]
              ) -> tuple[Callable[[], Taken], Callable[[int], tuple[int, float]]]:
        for row in rows:
            self._taps.note([row], [last[row].position], torch.tensor([[last[row].token]]))
        decoder.step({row: last[row].token for row in rows}, {row: last[row].position for row in rows})
        if self._how.temperature == 0:
            return decoder.take(), lambda i: decoder.likeliest(rows[i])
        return decoder.take(), lambda i: sample(decoder.logits(rows[i]), self._how, self._rngs[rows[i]])
