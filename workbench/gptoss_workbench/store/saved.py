"""Captured data in a zarr store, and back again, labels and provenance included."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import xarray as xr

from gptoss_workbench.errors import WorkbenchError

_NONE = "(none)"
"""Stands for a label that a token lacks: None is no string, and xarray reads an empty one as NaN."""

_MIXED = ("key", "key_span", "query_span")
"""Labels that are numbers, but for the sink."""


def save(data: xr.Dataset, path: str | Path) -> None:
    """Write ``run.data`` or any result to a new zarr store (format 2, which every reader knows).

    Labels become strings there: the keys of an attention map "0", "1", ..., "sink"; "(none)" where a token lacks one.
    ``wb.open_data`` undoes that.

    Args:
        path: a folder that does not exist yet.

    Raises:
        WorkbenchError: there is something at ``path``, it can't be written to, or zarr is not installed.
    """
    _need_zarr()
    if Path(path).exists():
        raise WorkbenchError("there is something at this path already", expected="a new folder", got=str(path),
                             hint="choose another name, or delete it first")
    plain = data.assign_coords({name: (coord.dims, _as_text(coord.values)) for name, coord in data.coords.items()
                                if coord.dtype.kind == "O"})
    try:
        plain.to_zarr(path, zarr_format=2, consolidated=True)
    except OSError as error:
        raise WorkbenchError("the data could not be written", expected="a place to write to", got=str(path),
                             hint=str(error)[:200]) from error


def open_data(path: str | Path) -> xr.Dataset:
    """What ``to_zarr`` wrote, equal to what was saved. Values are read from the disk when they are used.

    Raises:
        WorkbenchError: there is no such store, or zarr is not installed.
    """
    _need_zarr()
    try:
        data = xr.open_zarr(path)
    except (OSError, ValueError, KeyError) as error:
        raise WorkbenchError("this is no saved data", expected="a folder that to_zarr wrote", got=str(path),
                             hint=str(error).partition("\n")[0][:200]) from error
    coords = {}
    for name, coord in data.coords.items():
        if coord.dtype.kind not in "OUT":
            continue
        restored = np.empty(coord.size, dtype=object)
        restored[:] = [_from_text(value, str(name)) for value in coord.values.ravel()]
        coords[name] = (coord.dims, restored.reshape(coord.shape), coord.attrs)
    return data.assign_coords(coords)


def _as_text(values: np.ndarray) -> np.ndarray:
    text = np.empty(values.size, dtype=object)  # of any length; a fixed one would lose a NUL at the end
    text[:] = [str(value) if value == value and value is not None else _NONE for value in values.ravel()]
    return text.reshape(values.shape)


def _from_text(value: object, name: str) -> object:
    if name in _MIXED:
        return int(text) if (text := str(value)).isdecimal() else text
    return None if value == _NONE else str(value)


def _need_zarr() -> None:
    if importlib.util.find_spec("zarr") is None:
        raise WorkbenchError("zarr is not installed", expected="the package zarr", got="none",
                             hint="pip install 'gptoss-workbench[zarr]'")
