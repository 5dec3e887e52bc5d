"""A recording on the processor with the habits of a CUDA graph.

What happens between tensors is noted, and played again on the same memory; no line of Python runs a second time. So a
number that a step reads on the host stays what it was while recording, and shows as a wrong result. What a GPU refuses
while it records is refused here too: reading a value back, and tensors made of values of the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

_WAITING = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::lift_fresh", "aten::lift_fresh_copy",
            "aten::masked_select", "aten::bincount", "aten::is_nonzero"}
_EMPTY = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}


class RefusedWhileRecording(RuntimeError):
    """What a GPU would have to wait for."""


class OpRecording:
    """The operations of one call of a function, to be played again."""

    def __init__(self, body: Callable[[], None], device: torch.device) -> None:
        body()  # as on a GPU, where the first run compiles
        self.calls: list[Callable[[], None]] = []
        with _Notes(self.calls), _launches(self.calls):
            body()

    @torch.no_grad()
    def play(self) -> None:
        for call in self.calls:
            call()


class _Notes(TorchDispatchMode):
    def __init__(self, calls: list[Callable[[], None]]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        if name in _WAITING:
            raise RefusedWhileRecording(name)
        out = func(*args, **kwargs)
        given = [one.alias_info for one in func._schema.returns]
        if name in _EMPTY or (given and all(one is not None and not one.is_write for one in given)):
            return out  # memory alone, or another view of it
        writes = any(one.alias_info is not None and one.alias_info.is_write for one in func._schema.arguments)
        results = [] if writes else [x for x in tree_leaves(out) if isinstance(x, Tensor)]

        def call() -> None:
            again = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
            for old, new in zip(results, again):
                old.copy_(new)

        self._calls.append(call)
        return out


class _launches:
    """Notes the launches of Triton's interpreter too, where it runs."""

    def __init__(self, calls: list[Callable[[], None]]) -> None:
        self._calls, self._executor = calls, None

    def __enter__(self) -> None:
        try:
            from triton.runtime.interpreter import GridExecutor
        except ImportError:
            return
        self._executor, self._original = GridExecutor, GridExecutor.__call__
        calls, original = self._calls, GridExecutor.__call__

        def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
            def call() -> None:
                with _disable_current_modes():
                    original(executor, *args, **kwargs)

            call()
            calls.append(call)

        GridExecutor.__call__ = launch

    def __exit__(self, *what: object) -> None:
        if self._executor is not None:
            self._executor.__call__ = self._original
