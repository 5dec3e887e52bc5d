"""Choosing the path when the first product is asked for: the best that the processor can run and that passes a test.

A path whose products are not those of the reference, or that does not compile, is given up with a warning, and the next
one is tried. What was decided and why is in ``describe``.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gptoss_kernels.cpu import codecache, paths, team
from gptoss_kernels.cpu.engine import Engine
from gptoss_kernels.cpu.selftest import flaw

_lock = threading.RLock()
_chosen: dict[torch.dtype, Engine | None] = {}
_given_up: dict[str, str] = {}
_forced: str | None = None


def chosen(dtype: torch.dtype) -> Engine | None:
    """The engine for activations of a dtype; None where torch computes alone."""
    if dtype not in _chosen:
        with _lock:
            if dtype not in _chosen:
                _chosen[dtype] = _choose(dtype)
    return _chosen[dtype]


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Inside, every product takes this path, tested before.

    Raises:
        RuntimeError: the processor can't take it, or its products are wrong.
    """
    global _forced
    if name != "torch" and name not in paths.PATHS:
        raise RuntimeError(f"there is no path {name!r}: expected one of {', '.join((*paths.PATHS, 'torch'))}")
    reason = paths.why_not(name)
    if reason is not None:
        raise RuntimeError(f"the path {name!r} can't be taken: {reason}")
    with _lock:
        before, kept = _forced, dict(_chosen)
        _forced = name
        _chosen.clear()
    try:
        yield
    finally:
        with _lock:
            _forced = before
            _chosen.clear()
            _chosen.update(kept)


def describe() -> str:
    """What computes here and why, some lines of text. Compiles nothing that was not needed before."""
    lines = [f"processor: {paths.processor()}"]
    for name in (*paths.PATHS, "torch"):
        reason = _given_up.get(name) or paths.why_not(name)
        used = [str(dtype).removeprefix("torch.") for dtype, one in _chosen.items()
                if (one.path.name if one else "torch") == name]
        lines.append(f"{name}: {reason or 'can be used'}{', in use for ' + ' and '.join(used) if used else ''}")
    lines.append(f"threads: {torch.get_num_threads()}, {team.describe()}")
    lines.append(f"compiled code: {codecache.folder() or 'not kept, no folder can be written'}")
    return "\n".join(lines)


def outlook() -> str:
    """One line: the path that this processor suggests, and what keeps it from better ones. Compiles and tests nothing.
    """
    reasons = {name: _given_up.get(name) or paths.why_not(name) for name in (*paths.PATHS, "torch")}
    best = next(name for name, reason in reasons.items() if reason is None)
    better = list(reasons)[: list(reasons).index(best)]
    lacking = [f"no {name}: {reasons[name]}" for name in better[:1]]
    return "; ".join([f"path {best} on {paths.processor()}", *lacking])


def _choose(dtype: torch.dtype) -> Engine | None:
    name = _forced or paths.asked()
    for path in paths.PATHS.values() if name is None else [paths.PATHS[name]] if name != "torch" else []:
        if paths.why_not(path.name) is not None or (path.name in _given_up and name is None):
            continue
        found = Engine(path)
        wrong = flaw(found, dtype)
        if wrong is None:
            return found
        if name is not None:
            raise RuntimeError(f"the path {path.name!r} fails its test: {wrong}")
        _given_up[path.name] = f"given up: {wrong}"
        warnings.warn(f"CPU kernels, path {path.name}: {wrong}; trying the next path", RuntimeWarning, stacklevel=4)
    return None
