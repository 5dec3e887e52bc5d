"""Who served whom, of one run or many: every routed token, one under the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gptoss_workbench.errors import ExperimentError
from gptoss_workbench.experiments.parts import captured, columns
from gptoss_workbench.hooks.selection import Indices
from gptoss_workbench.model.run import Run, to_numpy


@dataclass(frozen=True)
class Routes:
    """The routes of some tokens of some runs.

    Attributes:
        runs: those they are of.
        layers: the layers that were captured.
        experts: (layer, token, slot) int64.
        weights: (layer, token, slot) float32.
        prompt, position: (token,) int64: the number of a token's run, and its place there.
        labels: coordinates of the tokens by name (``text``, ``id``, ``channel``, ...), each (token,).
    """

    runs: list[Run]
    layers: list[int]
    experts: np.ndarray
    weights: np.ndarray
    prompt: np.ndarray
    position: np.ndarray
    labels: dict[str, np.ndarray]

    def served(self, experts: int) -> np.ndarray:
        """(layer, token, expert) bool: whether an expert served a token."""
        return (self.experts[..., None] == np.arange(experts)).any(-2)

    def received(self, experts: int) -> np.ndarray:
        """(layer, token, expert) float32: the weight an expert had at a token, 0 where it did not serve."""
        out = np.zeros((*self.experts.shape[:2], experts), dtype=np.float32)
        np.put_along_axis(out, self.experts, self.weights, -1)
        return out


def as_runs(runs: Run | Sequence[Run]) -> list[Run]:
    """One run, a batch, or any collection of runs, as a list.

    Raises:
        ExperimentError: it holds something else, or nothing.
    """
    found: list[Run] = list(runs) if isinstance(runs, Sequence) else [runs]
    if not found or not all(isinstance(run, Run) for run in found):
        got = type(found[0]).__name__ if found else "nothing"
        raise ExperimentError("That is no run.", expected="a Run, or several", got=got)
    return found


def routes_of(runs: Run | Sequence[Run], tokens: Indices = None) -> Routes:
    """The routes of the chosen tokens of every run.

    Raises:
        SiteError: a run holds no ``router.experts`` and ``router.weights``, or selects no token.
        ExperimentError: the runs captured different layers.
    """
    every = as_runs(runs)
    model = every[0].model
    layers = every[0].layers("router.experts")
    experts, weights, prompt, position, labels = [], [], [], [], []
    for number, run in enumerate(every):
        at = columns(run, tokens)
        own = run.layers("router.experts")
        if own != layers:
            raise ExperimentError("The runs captured the router of different layers.", expected=str(layers),
                                  got=str(own))
        pairs = [[to_numpy(captured(model, run, f"router.{what}", layer)[at]) for layer in layers or [0]]
                 for what in ("experts", "weights")]
        experts.append(np.stack(pairs[0]))
        weights.append(np.stack(pairs[1]))
        prompt += [number] * len(at)
        position += [run.positions[column] for column in at]
        coords = run.token_coords("token")
        labels.append({name: values[1][at] for name, values in coords.items() if name != "token"})  # type: ignore[index]
    joined = {name: np.concatenate([part[name] for part in labels]) for name in labels[0]}
    return Routes(every, layers, np.concatenate(experts, 1), np.concatenate(weights, 1).astype(np.float32),
                  np.array(prompt), np.array(position), joined)
