"""Edits as JSON and back. Tensors stand there whole, as base64 of their bytes in row-major order.

A sparse autoencoder is too large for that: it stands there by the folder it was read from, and the sha256 of all that
it holds, to which whatever is read again is held.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gptoss_workbench.errors import EditError, WorkbenchError
from gptoss_workbench.hooks.changes import KINDS
from gptoss_workbench.hooks.edits import Edit, Place, place_of
from gptoss_workbench.hooks.sae import SAE, steer_features
from gptoss_workbench.hooks.selection import Slice, Where, where
from gptoss_workbench.hooks.values import Held, Source, dtype_name, raw_bytes

VERSION = 1
DTYPES = {name: getattr(torch, name) for name in
          ("float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8")}
_NUMBERS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def to_json(edit: Edit) -> str:
    """An edit as one line of JSON.

    Raises:
        EditError: it holds a function.
    """
    return json.dumps({"version": VERSION, **plain(edit, _base64, _refuse)}, allow_nan=False)


def plain(edit: Edit, tensor: Callable[[Held], Any], function: Callable[[Any], Any]) -> dict[str, Any]:
    """An edit as dictionaries, lists, strings and numbers.

    Args:
        tensor, function: what stands for a tensor and for a function.
    """
    def encode(value: Any) -> Any:
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"float": repr(value)}
        if isinstance(value, Slice):
            return {"slice": [value.start, value.stop, value.step]}
        if isinstance(value, Where):
            said = {"labels": {name: encode(allowed) for name, allowed in value.labels}, "matching": value.matching}
            return {"where": said if value.test is None else {**said, "test": function(value.test)}}
        if isinstance(value, Held):
            return {"tensor": tensor(value)}
        if isinstance(value, Source):
            return {"source": {
                "site": value.site, "positions": encode(value.positions),
                "values": [[layer, tensor(held)] for layer, held in value.values],
                "parts": {dim: list(part) for dim, part in value.parts},
                "experts": [[layer, tensor(held)] for layer, held in value.experts],
            }}
        if isinstance(value, SAE):
            return {"sae": {"name": value.name, "source": value.source, "sha256": value.digest}}
        if isinstance(value, range):
            return {"range": [value.start, value.stop, value.step]}
        if isinstance(value, tuple):
            return [encode(item) for item in value]
        return {"function": function(value)}

    place = {name: encode(selection) for name, selection in edit.place.selections().items()}
    return {"edit": edit.name, "site": edit.place.site, "place": place,
            "args": {name: encode(value) for name, value in edit.args}}


def _base64(held: Held) -> dict[str, Any]:
    return {"dtype": dtype_name(held.tensor), "shape": list(held.tensor.shape),
            "base64": base64.b64encode(raw_bytes(held.tensor)).decode()}


def _refuse(function: Any) -> Any:
    name = getattr(function, "__name__", type(function).__name__)
    raise EditError("A function can't be written to JSON.", expected="an edit made of values",
                    got=f"the function {name}", hint="For tokens, wb.where(matching=...) takes a regular expression.")


def edit_from_json(text: str | bytes, sae: SAE | None = None) -> Edit:
    """The edit that ``to_json`` wrote; equal to the one it came from.

    Args:
        sae: for an edit of features, the sparse autoencoder it was made with. Without it the folder that the edit names
            is read again, on the CPU; nothing is fetched from the Hub.

    Raises:
        EditError: it is no such JSON, or the sparse autoencoder is not there or not the same.
        SiteError: it names a site or a dimension that does not exist.
    """
    try:
        said = json.loads(text)
        if said.get("version") != VERSION:
            raise _broken(f"version {VERSION}", f"version {said.get('version')!r}")
        name, site = said["edit"], said["site"]
        if name not in KINDS:
            raise _broken(f"one of {', '.join(KINDS)}", repr(name))
        kind = KINDS[name]
        args = tuple((key, _decode(value)) for key, value in said["args"].items())
        place = {key: _decode(value) for key, value in said["place"].items()}
    except WorkbenchError:
        raise
    except Exception as error:  # whatever a broken text leads to
        raise _broken("what edit.to_json() wrote", f"{type(error).__name__}: {error}"[:120]) from error
    if kind.site not in (None, site) or not {key for key, _ in args} <= {*kind.args}:
        raise _broken(f"site {kind.site or 'any'} and arguments {list(kind.args)}",
                      f"{site}, {[key for key, _ in args]}")
    missing = {*kind.required} - {key for key, _ in args}
    if missing:
        raise _broken(f"the arguments of wb.{name}", f"an edit that misses {', '.join(sorted(missing))}")
    if kind.own_place:
        return _of_features(dict(args), site, place, sae)
    checked: Place = place_of(site, place.pop("layer", None), place.pop("tokens", None), place.pop("prompt", None),
                              **place)
    return Edit(name, checked, args)


def _of_features(args: dict[str, Any], site: str, place: dict[str, Any], sae: SAE | None) -> Edit:
    """An edit of features, made anew by its public function, which checks what it is given."""
    named = args.pop("sae")
    if not isinstance(named, _Named) or not {*place} <= {"layer", "tokens", "prompt"}:
        raise _broken("an SAE and its place", f"{named!r:.60} at {', '.join(place)}")
    found = named.find(site, place.get("layer")) if sae is None else sae
    if found.digest != named.sha256:
        raise EditError("That is not the SAE that the edit was made with.", got=f"{found.name}, {found.digest[:16]}",
                        expected=f"{named.name}, sha256 {named.sha256[:16]}", hint="Pass sae= with the right one.")
    if (found.site, found.layer) != (site, place.pop("layer", None)):
        raise _broken(f"{found.site} of layer {found.layer}, which the SAE reads", site)
    return steer_features(found, args.pop("features"), **args, **place)


@dataclass(frozen=True)
class _Named:
    """A sparse autoencoder as JSON has it."""

    name: str
    source: str | None
    sha256: str

    def find(self, site: str, layer: Any) -> SAE:
        from gptoss_workbench.hooks.sae_files import load_sae

        if not isinstance(self.source, str) or not Path(self.source).is_dir():
            raise EditError("The SAE of this edit is not there.", expected=self.name,
                            got=f"no folder {self.source}" if self.source else "one that was read from no folder",
                            hint="Load it, and pass it: wb.edit_from_json(text, sae=wb.load_sae(...)).")
        return load_sae(self.source, site=site, layer=layer)


def _broken(expected: str, got: str) -> EditError:
    return EditError("That JSON is no edit.", expected=expected, got=got)


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decode(item) for item in value)
    if not isinstance(value, dict):
        return value
    ((tag, inner),) = value.items()
    if tag == "float":
        return _NUMBERS[inner]
    if tag == "slice":
        return Slice(*inner)
    if tag == "range":
        return range(*inner)
    if tag == "where":
        labels: Any = {name: list(_decode(allowed)) for name, allowed in inner["labels"].items()}
        return where(matching=inner["matching"], **labels)
    if tag == "tensor":
        return _tensor(inner)
    if tag == "sae":
        return _Named(str(inner["name"]), inner["source"], str(inner["sha256"]))
    if tag == "source":
        return Source(
            inner["site"], tuple((layer, _tensor(held)) for layer, held in inner["values"]),
            _decode(inner["positions"]),
            tuple((dim, tuple(part)) for dim, part in inner["parts"].items()),
            tuple((layer, _tensor(held)) for layer, held in inner["experts"]),
        )
    raise ValueError(f"unknown tag {tag!r}")


def _tensor(said: dict[str, Any]) -> Held:
    dtype, shape = DTYPES[said["dtype"]], said["shape"]
    raw = bytearray(base64.b64decode(said["base64"], validate=True))
    if not all(isinstance(size, int) and size >= 0 for size in shape) or len(raw) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{len(raw)} bytes for {said['dtype']} {shape}")
    flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    return Held(flat.reshape(shape))
