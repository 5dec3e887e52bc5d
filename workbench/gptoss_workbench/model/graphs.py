"""Decoding by a recording: the launches of one step are recorded once and played for every token.

On an NVIDIA GPU a recording is a CUDA graph, on a processor a list of compiled tasks
(``gptoss_kernels.cpu.recording``). Starting a few hundred kernels from Python takes about as long as the kernels
themselves; playing does not. A recording reads and writes buffers only, so all that changes from token to token is put
into buffers in front of it: the token, its position, its column in the cache, and what edits need (``hooks.steady``).
Captures lie in buffers when it ends. The numbers are those of the same kernels started one by one.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from gptoss_kernels.cpu.recording import Recording as TaskRecording
from gptoss_kernels.mxfp4 import Mxfp4Tensor
from gptoss_workbench.hooks.feeding import Feed
from gptoss_workbench.hooks.steady import Place, Plan, Steady
from gptoss_workbench.hooks.taps import Filed
from gptoss_workbench.model.cache import KVCache
from gptoss_workbench.model.static_cache import StaticCache, capacity_for
from gptoss_workbench.model.transformer import Transformer

if TYPE_CHECKING:
    from gptoss_workbench.model.model import Model

IDLE = 2
"""Sessions of a model that are kept for the next generation when nobody uses them."""
AHEAD = {"cuda": 1024, "cpu": 256}
"""Columns that a cache gets at most for tokens not generated yet; it is doubled when they are used up. Fewer where a
recording is soon made, and columns that are not filled cost time."""


class Recording(Protocol):
    """Made from a function without arguments, which it has run at least once; ``play`` does the same to the buffers."""

    def play(self) -> None: ...


class CudaRecording:
    """A CUDA graph. The first runs compile kernels and let libraries allocate, none of which may happen in a graph."""

    def __init__(self, body: Callable[[], None], device: torch.device) -> None:
        with torch.cuda.device(device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(2):
                    body()
            torch.cuda.current_stream().wait_stream(aside)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):  # other threads may go on
                body()

    def play(self) -> None:
        self._graph.replay()


RECORDERS: MutableMapping[str, Callable[[Callable[[], None], torch.device], Recording]] = {
    "cuda": CudaRecording, "cpu": TaskRecording,
}
"""By device type, how to record. Where there is none, decoding starts every kernel by itself."""


def why_not(model: Model, rows: int) -> str | None:
    """Why decoding so many prompts together can't be recorded, whatever is captured and edited; None when it can."""
    kernels = model.transformer.kernels
    if model.device.type not in RECORDERS:
        return f"nothing can be recorded on {model.device.type}"
    if not hasattr(kernels, "not_recorded"):
        return f"the {kernels.name} kernels read numbers back in the middle of a layer"
    reason = kernels.not_recorded(model.weights.embed.dtype, rows)
    if reason is not None:
        return reason
    for layer in model.weights.layers:
        if not (isinstance(layer.gate_up, Mxfp4Tensor) and isinstance(layer.down, Mxfp4Tensor)):
            return "the experts are not packed"
    return None


class Session:
    """A batch that decodes by one recording: its buffers, its cache, its tap.

    Attributes:
        key: what a generation must have in common with it to use it: plan, batch, columns.
        cache, tap: of the recorded step.
        logits: (batch, vocab) of the newest token.
        outcome: float64 (2, batch): the likeliest token of each row and its log-probability in nats.
    """

    def __init__(self, model: Model, plan: Plan, batch: int, capacity: int) -> None:
        weights, config = model.weights, model.config
        self.key, self._batch = (plan, batch, capacity), batch
        self._transformer = weakref.ref(model.transformer)  # a session that waits must not keep a model alive
        dtype, device = weights.embed.dtype, model.device
        self._inputs = torch.zeros(2 * batch + 1, dtype=torch.int64, device=device)
        self._ids, self._positions = self._inputs[: 2 * batch].view(2, batch, 1).unbind()
        self.cache = StaticCache(config, batch, capacity, self._inputs[-1:], model.transformer.kernels, dtype)
        self.tap = Steady(plan, batch, config.dimensions, dtype, device)
        self._recording: Recording | None = None
        self._shapes: list[tuple[Place, torch.dtype, torch.Size]] | None = None

    @torch.no_grad()
    def step(self, ids: Sequence[int], positions: Sequence[int], column: int) -> None:
        """Read one token of each row; its keys and values go to ``column``."""
        self._inputs.copy_(torch.tensor([*ids, *positions, column]))
        if self._recording is None:
            device = self._inputs.device
            self._recording = RECORDERS[device.type](self._body, device)
        self._recording.play()

    def _body(self) -> None:
        self.tap.begin()
        transformer = self._transformer()
        assert transformer is not None  # whoever decodes holds the model
        hidden = transformer(self._ids, self._positions, self.cache, self.tap)  # type: ignore[arg-type]
        if self.tap.watches(None, "logits"):
            self.logits = self.tap("logits", None, transformer.unembed(hidden))[:, -1]
        else:
            self.logits = transformer.unembed(hidden[:, -1])
        self.outcome = torch.stack([_likeliest(row) for row in self.logits], dim=1)
        trouble = self.tap.trouble
        if trouble is not None:
            self.outcome = torch.cat((self.outcome, trouble.double().expand(1, self._batch)))
        self._held = [(("hidden", None), hidden), *self.tap.held]
        self._flat = _joined([x for _, x in self._held])

    def taken(self) -> Callable[[], list[tuple[Place, Tensor]]]:
        """Put aside the hidden states and captures of the newest step, in a launch for each dtype.

        Returns:
            A function that takes them apart, which costs more time than the copy: for when somebody asks.
        """
        flats = {dtype: (flat.clone(), sizes) for dtype, (flat, sizes) in self._flat.items()}
        held = [(place, x.dtype, x.shape) for place, x in self._held] if self._shapes is None else self._shapes
        self._shapes = held

        def apart() -> list[tuple[Place, Tensor]]:
            parts = {dtype: iter(flat.split(sizes, dim=1)) for dtype, (flat, sizes) in flats.items()}
            return [(place, next(parts[dtype]).view(shape)) for place, dtype, shape in held]

        return apart


def _likeliest(logits: Tensor) -> Tensor:
    """logits (vocab,) -> float64 (2,), as ``sampling.sample`` at temperature 0."""
    logits = logits.float()
    token = logits.argmax(keepdim=True)
    logprob = logits.gather(0, token) - torch.logsumexp(logits, dim=-1)
    return torch.cat((token.double(), logprob.double()))


def _joined(tensors: Sequence[Tensor]) -> dict[torch.dtype, tuple[Tensor, list[int]]]:
    """By dtype: all in one tensor (prompt, values), and how many values each has; one launch instead of many."""
    found: dict[torch.dtype, list[Tensor]] = {}
    for x in tensors:
        found.setdefault(x.dtype, []).append(x.flatten(1))
    return {dtype: (torch.cat(flat, dim=1), [x.shape[1] for x in flat]) for dtype, flat in found.items()}


class Pool:
    """Sessions of one model. Each serves one generation at a time; a few wait for the next with the same key."""

    def __init__(self) -> None:
        self._idle: list[Session] = []
        self._lock = threading.Lock()
        self.made = 0  #: how many sessions, hence recordings, there have been

    def get(self, model: Model, plan: Plan, batch: int, capacity: int) -> Session:
        """One that waits, or a new one. Those that wait for something else make room."""
        with self._lock:
            for number, session in enumerate(self._idle):
                if session.key == (plan, batch, capacity):
                    return self._idle.pop(number)
            self._idle = self._idle[-(IDLE - 1):]
            self.made += 1
        return Session(model, plan, batch, capacity)

    def give_back(self, session: Session) -> None:
        with self._lock:
            self._idle = [*self._idle, session][-IDLE:]

    def clear(self) -> None:
        """Free the sessions that wait."""
        with self._lock:
            self._idle = []


_pools: weakref.WeakKeyDictionary[Transformer, Pool] = weakref.WeakKeyDictionary()


def pool(model: Model) -> Pool:
    """The sessions of a model; they go with its transformer."""
    return _pools.setdefault(model.transformer, Pool())


class Decoder:
    """The tokens of one generation after the first, by recordings.

    Args:
        feed: edits and captures.
        cache: what was read so far, by as many prompts as the feed has rows.
        more: how many tokens may follow.
    """

    def __init__(self, model: Model, feed: Feed, cache: KVCache, more: int) -> None:
        self._model, self._feed, self._column, self._end = model, feed, len(cache), len(cache) + more
        self._alive: list[bool] | None = None  # as the session's buffer has it
        self._session = self._started(cache)

    @property
    def rows(self) -> list[int]:
        """The prompts, in the order of the batch."""
        return self._feed.rows

    def _started(self, cache: KVCache | StaticCache) -> Session:
        """A session with room, which goes on from a cache."""
        capacity = capacity_for(min(self._end, self._column + AHEAD[self._model.device.type]))
        session = pool(self._model).get(self._model, self._feed.plan, len(self._feed.rows), capacity)
        session.cache.load(cache, self._column)
        self._feed.attach(session.tap)
        self._alive = None
        return session

    def step(self, ids: Mapping[int, int], positions: Mapping[int, int]) -> None:
        """Read the newest token of each row that goes on.

        Args:
            ids, positions: by prompt. The others have ended; what is computed for them counts for nothing.

        Raises:
            EditError: the edits left a router without a choice.
        """
        rows = self._feed.rows
        alive = [row in ids for row in rows]
        if self._column == self._session.cache.capacity:
            self._feed.settle()
            self._session = self._started(self._session.cache)
        at = [positions.get(row, 0) for row in rows]
        self._feed.load(at, alive)
        if alive != self._alive:
            self._session.tap.alive.copy_(torch.tensor(alive))
        self._alive, self._at = alive, at
        self._session.step([ids.get(row, 0) for row in rows], at, self._column)
        self._outcome = self._session.outcome.tolist()  # waits for the GPU
        if len(self._outcome) > 2 and self._outcome[2][0]:
            raise self._feed.refusal()
        self._column += 1

    def change(self, feed: Feed) -> None:
        """Go on with other edits. Where they do the same with other values, so does the recording."""
        self._feed.settle()
        self._feed, before = feed, self._session
        if feed.plan == before.tap.plan:
            feed.attach(before.tap)
        else:
            self._session = self._started(before.cache)
            pool(self._model).give_back(before)

    def likeliest(self, row: int) -> tuple[int, float]:
        """The likeliest next token of a prompt and its log-probability in nats."""
        number = self._feed.rows.index(row)
        return int(self._outcome[0][number]), self._outcome[1][number]

    def logits(self, row: int) -> Tensor:
        """(vocab,), until the next step."""
        return self._session.logits[self._feed.rows.index(row)]

    def take(self) -> Callable[[], tuple[dict[int, Tensor], Filed]]:
        """Put the newest step aside.

        Returns:
            A function that gives its hidden states (1, d_model) by prompt, and its captures.
        """
        apart, feed, at, alive, column = self._session.taken(), self._feed, self._at, self._alive or [], self._column

        def read() -> tuple[dict[int, Tensor], Filed]:
            (_, hidden), *held = apart()
            states = {row: hidden[i] for i, row in enumerate(feed.rows) if alive[i]}
            return states, feed.file(held, at, alive, column)

        return read

    def end(self) -> None:
        """Let the session serve somebody else."""
        self._feed.settle()
        pool(self._model).give_back(self._session)
