"""One answer of the model: started, followed token by token, stopped, kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gptoss_jupyter.reading import Banned, Prompt, ban, sites

if TYPE_CHECKING:
    from gptoss_workbench.model.generation import Generation
    from gptoss_workbench.model.model import Model
    from gptoss_workbench.model.run import Run

ENDINGS = {
    "stop_token": "finished", "max_tokens": "cut at the token limit", "stopped": "stopped by you",
    "interrupted": "stopped by an interrupt", "failed": "ended by an error",
}


@dataclass(frozen=True, eq=False)
class Answer:
    """What there is of an answer at one moment; never changed, only replaced.

    Attributes:
        prompt, banned: what it answers, and under which edits.
        prompt_ids: the ids of the prompt.
        tokens: the ids said so far.
        run: what the model has read so far (the last token is said but not yet read); None before the first.
        reason: why it ended; None while it is being written.
    """

    prompt: Prompt
    banned: Banned
    prompt_ids: tuple[int, ...]
    tokens: tuple[int, ...] = ()
    run: Run | None = None
    reason: str | None = None

    @property
    def running(self) -> bool:
        return self.reason is None

    def note(self) -> str:
        """How far it is, in a few words."""
        count = f"{len(self.tokens)} token{'' if len(self.tokens) == 1 else 's'}"
        return f"writing, {count}" if self.reason is None else f"{ENDINGS.get(self.reason, self.reason)}, {count}"


class Writer:
    """Drives one generation and tells of it now and then; ``stop`` may come from any thread at any time.

    Args:
        on_news: called from the writing thread with a new ``Answer``, at most every ``pace()`` seconds and at the end.
        pace: how long the listener needs for one piece of news, so that it is not told faster than it can show.

    Raises: what ``model.generate`` raises for a prompt that cannot be encoded; generation itself starts with ``write``.
    """

    def __init__(
        self, model: Model, prompt: Prompt, banned: Banned, quantity: str, max_tokens: int,
        on_news: Callable[[Answer], None], pace: Callable[[], float],
    ) -> None:
        ids = model.encode(prompt.conversation())
        self.generation: Generation = model.generate(
            ids, capture=list(sites(quantity)), edits=ban(banned), max_tokens=max_tokens)
        self.answer = Answer(prompt, banned, tuple(ids))
        self._on_news, self._pace = on_news, pace

    def stop(self) -> None:
        """End after the token in progress; what there is stays."""
        self.generation.stop()

    def write(self) -> None:
        """Generate to the end, in the calling thread."""
        told = 0.0
        tokens: list[int] = []
        reason = "failed"
        try:
            for step in self.generation:
                tokens.append(step.token)
                if time.monotonic() - told >= self._pace():
                    self._tell(replace(self.answer, tokens=tuple(tokens), run=self.generation.run()))
                    told = time.monotonic()
            reason = self.generation.reason or "stopped"
        finally:
            self._tell(replace(self.answer, tokens=tuple(tokens), run=None, reason=reason))

    def _tell(self, answer: Answer) -> None:
        self.answer = answer
        self._on_news(answer)
