"""Values as plain data that prints, compares and fits into JSON; what is large stands there by its sha256."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptoss_workbench.hooks.edits import Edit
from gptoss_workbench.hooks.serial import plain
from gptoss_workbench.hooks.values import Held, Source, dtype_name

_LONGEST = 64  # floats of a list that are written out


def describe(value: Any) -> Any:
    """Dictionaries with string keys, lists, strings, whole numbers, finite floats, True, False and None.

    Tensors and arrays become their shape, their dtype, and the sha256 of both and of the bytes; a function becomes its
    name and the sha256 of its source; an edit what was given, and for values from another run its prompt and edits.
    Floats that JSON lacks become text.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else repr(float(value))
    if isinstance(value, Tensor):
        return _held(Held(value))
    if isinstance(value, np.ndarray):
        return _held(Held(torch.from_numpy(np.ascontiguousarray(value))))
    if isinstance(value, Mapping):
        return {str(name): describe(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        many = len(value) > _LONGEST and all(isinstance(one, float) for one in value)
        return describe(np.array(value)) if many else [describe(one) for one in value]
    if isinstance(value, set | frozenset):
        return [describe(one) for one in sorted(value, key=repr)]
    if isinstance(value, Edit):
        return _edit(value)
    if callable(value):
        return _function(value)
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _held(held: Held) -> dict[str, Any]:
    return {"shape": list(held.tensor.shape), "dtype": dtype_name(held.tensor), "sha256": held.digest}


def _edit(edit: Edit) -> dict[str, Any]:
    said = plain(edit, _held, _function)
    for name, given in edit.args:
        if isinstance(given, Source):
            said["args"][name]["source"] |= {"ids": list(given.ids), "edits": describe(given.edits)}
    return said


def _function(function: Callable[..., Any]) -> dict[str, Any]:
    name = getattr(function, "__qualname__", type(function).__qualname__)
    try:
        source = hashlib.sha256(inspect.getsource(function).encode()).hexdigest()
    except (OSError, TypeError):  # typed at a prompt, built in, or an object that is callable
        source = None
    return {"name": f"{getattr(function, '__module__', '')}.{name}", "source": source}
