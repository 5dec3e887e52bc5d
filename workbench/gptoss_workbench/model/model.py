"""The model as a person holds it: text in, runs and generations out."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gptoss_kernels import reference, select
from gptoss_workbench.errors import PromptError, WorkbenchError
from gptoss_workbench.harmony.conversation import render
from gptoss_workbench.harmony.vocabulary import Vocabulary, check_tokenizer, load_vocabulary
from gptoss_workbench.hooks import budget
from gptoss_workbench.hooks.budget import CapturePlan
from gptoss_workbench.hooks.capture import Capture, as_capture
from gptoss_workbench.hooks.edits import Edit, as_edits
from gptoss_workbench.hooks.prompts import Prompts
from gptoss_workbench.hooks.taps import Taps, group
from gptoss_workbench.model.cache import KVCache
from gptoss_workbench.model.checkpoint import Plan, read_checkpoint
from gptoss_workbench.model.config import ModelConfig
from gptoss_workbench.model.generation import Driver
from gptoss_workbench.model.hub import resolve
from gptoss_workbench.model.memory import Need, available, gigabytes
from gptoss_workbench.model.origin import Origin, origin_of
from gptoss_workbench.model.packed import pack
from gptoss_workbench.model.provenance import Provenance, Settings, record
from gptoss_workbench.model.run import Run, RunBatch, join_chunks
from gptoss_workbench.model.sampling import Sampling
from gptoss_workbench.model.transformer import Transformer
from gptoss_workbench.model.weights import Weights

if TYPE_CHECKING:
    pass

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LARGE = 1_000_000_000  # bytes
WORTH_CHECKING = 64 << 20
"""Bytes; a smaller capture is not held against the free memory, which takes time to find out."""
EMBEDDED = Path(__file__).parent.parent / "nano" / "assets"

Prompt = Any  # a string, token ids, or an openai_harmony Conversation


def load(
    name: str | Path | None = None, *, revision: str | None = None, dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu", kernels: str | None = None, allow_modified_config: bool = False,
    check_values: bool = True,
) -> Model:
    """Load a gpt-oss model; experts stay packed in MXFP4.

    Args:
        name: None for the embedded model, a folder, or a name on the Hugging Face Hub such as ``openai/gpt-oss-20b``.
        revision: branch, tag or commit on the Hub.
        dtype: ``"float32"`` or ``"bfloat16"``, of everything but the packed experts and the norms' scales. By default
            float32 for the embedded model, bfloat16 otherwise.
        device: where to compute.
        kernels: ``"reference"``, ``"cpu"`` or ``"triton"``: what computes. By default what the environment variable
            GPTOSS_KERNELS names, else for bfloat16 the fast ones of the device, else the reference. See ``wb.doctor``.
        allow_modified_config: accept constants (window, experts a token, rotary settings, ...) other than those of the
            published model with these sizes; no tensor can prove them.
        check_values: look through all scales and dense tensors for values out of range while they are read.

    Raises:
        ModelNotFound: no such folder or repository, or no network to reach it.
        CheckpointError: the checkpoint is incomplete, damaged, or of another architecture (``CorruptFile``,
            ``MissingShard``, ``ModifiedConfig`` name common cases), or does not fit here (``NotEnoughMemory``).
        VocabularyError: the folder's tokenizer.json is of another model.
        WorkbenchError: there is no such dtype, or there are no such kernels or they can't compute here.
    """
    embedded = name is None
    kind = _dtype(dtype if dtype is not None else ("float32" if embedded else "bfloat16"))
    chosen = _kernels(kernels, torch.device(device), kind)
    folder = EMBEDDED if embedded else resolve(name, revision)
    plans: list[Plan] = []

    def planned(plan: Plan, need: Need) -> None:
        plans.append(plan)
        check_tokenizer(folder, plan.config.vocab_size)
        _show_large(plan, need)

    config, weights = read_checkpoint(folder, kind, torch.device(device), allow_modified_config=allow_modified_config,
                                      check_values=check_values, on_plan=planned)
    return Model(config, weights, name="embedded nano model" if embedded else str(name), folder=folder,
                 kernels=chosen, origin=origin_of(plans[0], read=True))


def _show_large(plan: Plan, need: Need) -> None:
    """Say what is about to be loaded when it is large enough for somebody to wait."""
    if plan.nbytes > LARGE:
        print(f"{plan}; takes {need}, {gigabytes(available())} of memory free", flush=True)


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = dtype if isinstance(dtype, torch.dtype) else DTYPES.get(str(dtype))
    if found not in DTYPES.values():
        raise WorkbenchError("That dtype is not supported.", expected=" or ".join(DTYPES), got=repr(dtype))
    return found  # type: ignore[return-value]


def _kernels(name: str | None, device: torch.device, dtype: torch.dtype) -> ModuleType:
    try:
        return select.load(name, device, dtype)
    except select.KernelsUnavailable as error:
        raise WorkbenchError("These kernels can't compute here.", expected=error.expected,
                             got=f"{error.name!r}: {error.reason}",
                             hint="wb.doctor() lists what can and why.") from error


class Model:
    """A gpt-oss model. Runs leave nothing behind on it, so several threads may use it at once.

    Attributes:
        config: its shape.
        name: what it was loaded as.
        origin: the files it was read from; None when it was made of tensors.
        transformer: the forward pass.
    """

    def __init__(
        self, config: ModelConfig, weights: Weights, *, name: str = "model", folder: Path | None = None,
        kernels: ModuleType = reference, origin: Origin | None = None,
    ) -> None:
        self.config, self.name, self._folder, self.origin = config, name, folder, origin
        self.transformer = Transformer(config, weights, kernels)

    def __repr__(self) -> str:
        c = self.config
        return (f"<{self.name}: {c.num_hidden_layers} layers, {c.num_local_experts} experts "
                f"(top {c.num_experts_per_tok}), width {c.hidden_size}, {self.dtype} on {self.device}, "
                f"kernels: {self.transformer.kernels.name}>")

    @property
    def weights(self) -> Weights:
        return self.transformer.weights

    @property
    def dtype(self) -> str:
        return str(self.weights.embed.dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        return self.weights.embed.device

    @property
    def vocabulary(self) -> Vocabulary:
        return load_vocabulary(self._folder)

    @property
    def provenance(self) -> Provenance:
        """Which weights these are, and what computes with them; a run's or generation's says the rest."""
        return record(self, (), created=time.time())

    def pack(self) -> int:
        """Keep a copy of the attention's matrices and of the unembedding for decoding on a processor, packed without
        loss to 12 bits a value -> the bytes it takes (1.8 GB for gpt-oss-20b, made in seconds, gone with the model).

        Every product is one of the same numbers; a sum may differ in its last bit, because the few values that the
        packing has no room for are added last. The matrices themselves stay, and must not be written into.

        Raises:
            NotEnoughMemory: the copy does not fit.
            WorkbenchError: the model is not bfloat16, other kernels compute, or the processor lacks AVX2.
        """
        return pack(self)

    # text ---------------------------------------------------------------------------------------------------------

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt.

        Args:
            prompt: a string, read as a raw stream in which special tokens such as ``<|start|>`` count; ids (a list,
                tensor or array); or a Conversation, rendered so that the assistant speaks next.

        Raises:
            PromptError: it is empty, of another type, or has ids outside the vocabulary.
        """
        if isinstance(prompt, str):
            ids = self.vocabulary.encode(prompt)
        elif type(prompt).__name__ == "Conversation":
            ids = render(self.vocabulary, prompt)
        else:
            ids = _as_ids(prompt)
        if not ids:
            raise PromptError("The prompt is empty.", expected="at least one token", got=repr(prompt)[:80])
        outside = [id for id in ids if not 0 <= id < self.config.vocab_size]
        if outside:
            raise PromptError("The prompt has ids outside the vocabulary.",
                              expected=f"0 to {self.config.vocab_size - 1}", got=str(outside[:5]))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return self.vocabulary.decode(list(ids))

    def known(self, ids: Sequence[int]) -> list[bool]:
        """Whether each id has an embedding of its own. In a published model all have; the embedded one never saw most.

        Ids that were not in its training text share one row, so it can't tell them apart.
        """
        rows = self.weights.row_of_token
        if rows is None:
            return [True] * len(ids)
        alone = torch.bincount(rows)[rows[torch.tensor(list(ids), dtype=torch.int64, device=rows.device)]] == 1
        return alone.tolist()

    # running ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(
        self, prompt: Prompt | Sequence[Prompt], capture: Capture | str | Iterable[str] | None = None,
        edits: Sequence[Edit] | Edit = (), *, chunk: int | None = None,
    ) -> Any:
        """Read a prompt once, keep what was asked for, change what was asked for.

        Args:
            prompt: a string, ids, a Conversation, or a list of them (a batch, padded on the left).
            capture: site names or groups, or ``wb.capture(...)``.
            edits: applied in the given order.
            chunk: read at most this many tokens at a time, to bound memory; the result is the same.

        Returns:
            Run, or RunBatch for a list.

        Raises:
            PromptError, SiteError, EditError: what was asked for makes no sense here.
            CaptureTooLarge: what was asked for does not fit into memory; see ``plan``.
            EditNeverFired: an edit's place never came by.
        """
        prompts = _as_batch(prompt)
        rows = [self.encode(one) for one in ([prompt] if prompts is None else prompts)]
        edits = as_edits(edits)
        if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1):
            raise WorkbenchError("chunk= is the number of tokens to read at a time.", expected="1 or more, or None",
                                 got=repr(chunk))
        taps = self.new_taps(as_capture(capture), edits, rows)
        ids, positions = self.pad_left(rows)
        cache = self.new_cache(len(rows))
        chunks: list[tuple[Tensor, Tensor | None]] = []
        every = list(range(len(rows)))
        for start in range(0, ids.shape[1], chunk or ids.shape[1]):
            part = slice(start, start + (chunk or ids.shape[1]))
            chunks.append(self.read(ids[:, part], positions[:, part], cache, taps, every, last_only=False))
        taps.finish()
        filed = group(taps.take(), len(rows))
        runs = []
        for i, row in enumerate(rows):
            hidden = torch.cat([states[i] for states, _ in chunks])[-len(row):]
            seen = [logits[i] for _, logits in chunks if logits is not None]
            logits = torch.cat(seen)[-len(row):] if seen else None
            settings = Settings(row=i, rows=len(rows), chunk=chunk)
            runs.append(Run(self, row, hidden, join_chunks(filed[i], len(row)), taps.positions_of(i, len(row)), edits,
                            logits, settings, taps.layout(i)))
        return runs[0] if prompts is None else RunBatch(runs)

    def generate(
        self, prompt: Prompt | Sequence[Prompt], capture: Capture | str | Iterable[str] | None = None,
        edits: Sequence[Edit] | Edit = (), *, max_tokens: int = 256, temperature: float = 0.0, top_p: float = 1.0,
        top_k: int = 0, min_p: float = 0.0, seed: int | Sequence[int] | None = None,
        stop: Iterable[int | str] | None = None, graph: bool | None = None,
    ) -> Any:
        """Continue a prompt. Nothing is computed until the generation is iterated or asked for its tokens.

        Args:
            prompt, capture, edits: as for ``run``; edits act on generated tokens too.
            max_tokens: most tokens to generate.
            temperature, top_p, top_k, min_p: see ``Sampling``; temperature 0 takes the likeliest token.
            seed: of the sampling. Row i of a batch uses seed + i, or the i-th of a list of seeds.
            stop: ids or texts of single tokens that end it; by default harmony's ``<|return|>`` and ``<|call|>``,
                ``<|endoftext|>``, and what the checkpoint names.
            graph: decode by a recording, captures and edits inside it: a CUDA graph, or on a processor a list of
                compiled tasks (``model.graphs``). None for where that is possible, unless the environment variable
                GPTOSS_GRAPH is 0; ``Generation.decoding`` tells. True makes it an error where it is not, False never
                does.

        Returns:
            Generation, or a list of them for a list of prompts, decoded together.
        """
        prompts = _as_batch(prompt)
        rows = [self.encode(one) for one in ([prompt] if prompts is None else prompts)]
        if max_tokens < 1:
            raise WorkbenchError("max_tokens is out of range.", expected="1 or more", got=max_tokens)
        seeds = _seeds(seed, len(rows))
        how = Sampling(temperature, top_k, top_p, min_p)
        edits = as_edits(edits)
        driver = Driver(self, rows, as_capture(capture), edits, max_tokens, how, seeds, self._stop_ids(stop),
                        False if graph is None and os.environ.get("GPTOSS_GRAPH") == "0" else graph)
        return driver.generations[0] if prompts is None else driver.generations

    def _stop_ids(self, stop: Iterable[int | str] | None) -> frozenset[int]:
        if stop is None:
            named = [self.vocabulary.encode(text)[0] for text in ("<|return|>", "<|call|>", "<|endoftext|>")]
            return frozenset([*named, *self.config.eos_token_ids])
        ids = set()
        for item in [stop] if isinstance(stop, str | int) else stop:
            encoded = self.vocabulary.encode(item) if isinstance(item, str) else [item]
            if len(encoded) != 1:
                raise PromptError("A stop text must be one token.", expected="one token", got=f"{item!r} is {encoded}")
            ids.add(encoded[0])
        return frozenset(ids)

    # for the rooms above and for fast loops -----------------------------------------------------------------------

    def new_cache(self, batch: int) -> KVCache:
        return KVCache(self.config.num_hidden_layers, batch, self.device)

    def new_taps(
        self, capture: Capture, edits: Sequence[Edit], rows: Sequence[Sequence[int]], open_ended: bool = False,
        more: int = 0,
    ) -> Taps:
        """The tap of one run over rows of ids, after which ``more`` tokens may follow if it is ``open_ended``.

        Raises:
            SiteError, EditError: capture or edits name what does not exist.
            CaptureTooLarge: the capture does not fit into memory.
        """
        config = self.config
        prompts = Prompts(rows, lambda: self.vocabulary, open_ended)
        taps = Taps(config.num_hidden_layers, config.dimensions, config.sliding_window, capture, edits, prompts)
        if capture.names:
            planned = self._plan(capture, prompts, more)
            if planned.nbytes >= WORTH_CHECKING:
                budget.check(capture, replace(planned, free=available(self.device)))
        return taps

    def plan(
        self, prompt: Prompt | Sequence[Prompt], capture: Capture | str | Iterable[str], *, max_tokens: int = 0,
    ) -> CapturePlan:
        """What a capture of a prompt would take, without running anything. Print it, or read ``nbytes`` and ``fits``.

        Args:
            prompt, capture: as for ``run``.
            max_tokens: how many generated tokens come on top, for ``generate``.

        Raises:
            PromptError, SiteError: as ``run``.
        """
        prompts = _as_batch(prompt)
        rows = [self.encode(one) for one in ([prompt] if prompts is None else prompts)]
        made = self._plan(as_capture(capture), Prompts(rows, lambda: self.vocabulary, max_tokens > 0), max_tokens)
        return replace(made, free=available(self.device))

    def _plan(self, capture: Capture, prompts: Prompts, more: int) -> CapturePlan:
        config, size = self.config, self.weights.embed.element_size()
        return budget.plan(capture, prompts, config.num_hidden_layers, config.dimensions, size, more=more)

    def pad_left(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Rows of ids -> ids and positions, both (prompt, token) int64; padding has id 0 and a negative position."""
        longest = max(len(row) for row in rows)
        ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=self.device)
        starts = torch.tensor([longest - len(row) for row in rows], device=self.device)
        return ids, torch.arange(longest, device=self.device)[None] - starts[:, None]

    def read(
        self, ids: Tensor, positions: Tensor, cache: KVCache, taps: Taps, rows: Sequence[int],
        last_only: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Read one chunk of a batch -> hidden (prompt, token, d_model) and logits.

        Logits are (prompt, vocab) of the last column when ``last_only``; else (prompt, token, vocab) when a capture
        or an edit looks at them, and None when nobody does (a Run makes them when asked).
        """
        taps.begin(rows, positions, ids)
        hidden = self.transformer(ids, positions, cache, taps)
        if "logits" in taps:
            logits = taps("logits", None, self.transformer.unembed(hidden))
            return hidden, logits[:, -1] if last_only else logits
        return hidden, self.transformer.unembed(hidden[:, -1]) if last_only else None


def _as_ids(prompt: Any) -> list[int]:
    given = prompt.tolist() if isinstance(prompt, Tensor | np.ndarray) else prompt
    ids = list(given) if isinstance(given, Iterable) else None
    if ids is None or not all(isinstance(id, int | np.integer) and not isinstance(id, bool) for id in ids):
        raise PromptError("That is no prompt.", expected="a string, token ids, or a Conversation (wb.chat makes one)",
                          got=f"{type(prompt).__name__}: {prompt!r}"[:100])
    return [int(id) for id in ids]


def _as_batch(prompt: Any) -> list[Prompt] | None:
    """The prompts of a batch, or None when it is one prompt."""
    if isinstance(prompt, Tensor | np.ndarray) and prompt.ndim == 2:
        return list(prompt)
    if isinstance(prompt, list | tuple) and prompt and not isinstance(prompt[0], int | np.integer):
        return list(prompt)
    return None


def _seeds(seed: int | Sequence[int] | None, rows: int) -> list[int | None]:
    if seed is None:
        return [None] * rows
    if isinstance(seed, int):
        return [seed + i for i in range(rows)]
    if len(seed) != rows:
        raise WorkbenchError("A list of seeds needs one for each prompt.", expected=f"{rows} seeds", got=len(seed))
    return list(seed)
