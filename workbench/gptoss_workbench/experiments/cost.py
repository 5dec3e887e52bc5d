"""What an experiment is going to run, told before it does."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Forward passes that are still to be made, and the tokens in them."""

    passes: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.passes:,} passes over {self.tokens:,} tokens"
