"""From a folder to the headers of all its tensors: which files count, and whether they are all there."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

from gptoss_workbench.errors import CheckpointError, MissingShard, ModelNotFound
from gptoss_workbench.model.files import bare_name, download_command, read_json, shorten
from gptoss_workbench.model.headers import TensorHeader, read_header

INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
SAME_PLACE = "take config.json and all safetensors files from the same place"
_NUMBERED = re.compile(r"(.*-)(\d{5})-of-(\d{5})\.safetensors")
_MOST_NAMED = 20  # files in one message


def checkpoint_folder(folder: Path) -> Path:
    """The folder itself, or its ``original`` subfolder when only that has weights.

    Raises:
        ModelNotFound: neither has any.
    """
    if not folder.is_dir():
        raise ModelNotFound("there is no such folder", where=str(folder.absolute()),
                            hint="give the folder that holds config.json and *.safetensors")
    for candidate in (folder, folder / "original"):
        if os.path.lexists(candidate / INDEX) or safetensors_files(candidate):
            return candidate
    others = sorted(path.name for path in folder.iterdir())
    listed = ", ".join(others[:6]) + (", ..." if len(others) > 6 else "")
    command = download_command(folder / CONFIG)
    raise ModelNotFound(
        "the folder holds no checkpoint", where=str(folder.absolute()),
        expected=f"{CONFIG} with {SINGLE}, {INDEX}, or *.safetensors; or the same under original/",
        got=listed or "an empty folder",
        hint=f"run: {command}" if command else "only safetensors files are read, never pickles or GGUF",
    )


def safetensors_files(folder: Path) -> list[Path]:
    """The weights files of a folder, without the hidden ones that some systems put beside them."""
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("."))


def gather_headers(folder: Path) -> dict[str, TensorHeader]:
    """Every tensor of the folder, from the index if there is one.

    Raises:
        CheckpointError: a file is damaged, missing, or not what the index says.
    """
    if os.path.lexists(folder / INDEX):
        return _indexed_headers(folder)
    single = folder / SINGLE
    files = safetensors_files(folder)
    if os.path.lexists(single):
        _warn_of([file.name for file in files if file != single], folder, SINGLE)
        files = [single]
    _check_numbers(folder, files)
    tensors: dict[str, TensorHeader] = {}
    for file in files:
        for name, header in read_header(file).items():
            if name in tensors:
                raise CheckpointError("two files hold the same tensor", file=str(file), tensor=shorten(name),
                                      expected="each tensor in one file", got=f"also in {tensors[name].file.name}",
                                      hint=SAME_PLACE)
            tensors[name] = header
    return tensors


def _check_numbers(folder: Path, files: list[Path]) -> None:
    """Files numbered ``-00001-of-00002`` tell without an index which are not there. Some count from 0, some from 1."""
    found = [match for file in files if (match := _NUMBERED.fullmatch(file.name))]
    for stem, last in {(match[1], match[3]) for match in found}:
        numbers = {int(match[2]) for match in found if (match[1], match[3]) == (stem, last)}
        wanted = range(min(min(numbers), 1), min(int(last), 10_000) + 1)
        missing = [f"{stem}{number:05d}-of-{last}.safetensors" for number in wanted if number not in numbers]
        if missing:
            raise _missing(folder, folder, missing, len(wanted))


def _missing(folder: Path, file: Path, missing: list[str], count: int) -> MissingShard:
    names = ", ".join(shorten(name) for name in missing[:_MOST_NAMED])
    unfinished = len([*folder.glob(".cache/huggingface/download/*.incomplete")])
    if download_command(file) is not None:  # a snapshot in the cache, whose files lie in the repository's blobs
        unfinished += len([*folder.parents[1].glob("blobs/*.incomplete")])
    command = download_command(file)
    return MissingShard(
        f"{len(missing)} of {count} weights files are missing", file=str(file),
        expected=names + (", ..." if len(missing) > _MOST_NAMED else ""),
        got=f"{count - len(missing)} of {count}" + (f", and {unfinished} unfinished download(s)" if unfinished else ""),
        hint=f"run: {command}" if command else "download the rest into the same folder",
    )


def _indexed_headers(folder: Path) -> dict[str, TensorHeader]:
    index = folder / INDEX
    weight_map = _weight_map(index)
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not os.path.lexists(folder / shard)]
    if missing:
        raise _missing(folder, index, missing, len(shards))
    others = [path.name for path in safetensors_files(folder) if path.name not in shards]
    if SINGLE in others:
        raise CheckpointError("two checkpoints lie in one folder", file=str(folder / SINGLE),
                              expected=f"{SINGLE}, or an index that names it",
                              got=f"{INDEX} names other files", hint="move one of them away")
    _warn_of(others, folder, INDEX)
    tensors: dict[str, TensorHeader] = {}
    for shard in shards:
        for name, header in read_header(folder / shard).items():
            if weight_map.get(name) != shard:
                entry = weight_map.get(name)
                says = f"the index says {entry}" if entry else "the index has no entry"
                raise CheckpointError("the index does not describe this file", file=str(folder / shard),
                                      tensor=shorten(name), expected=f"{INDEX} to name {shard}", got=says,
                                      hint=SAME_PLACE)
            tensors[name] = header
    absent = next((name for name in weight_map if name not in tensors), None)
    if absent is not None:
        raise CheckpointError("a tensor is not in the file that the index names",
                              file=str(folder / weight_map[absent]), tensor=shorten(absent),
                              expected="to be there", got="no such tensor", hint=SAME_PLACE)
    return tensors


def _warn_of(others: list[str], folder: Path, used: str) -> None:
    if others:
        names = ", ".join(map(shorten, others[:_MOST_NAMED]))
        warnings.warn(f"{folder}: {used} does not name these files, so they are not read: {names}", stacklevel=5)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("the index has no weight_map", file=str(index),
                              expected='"weight_map": {tensor name: file name, ...}',
                              got=repr(weight_map)[:80])
    for name, shard in weight_map.items():
        if not bare_name(shard) or not shard.endswith(".safetensors"):
            raise CheckpointError("the index points outside the checkpoint folder", file=str(index),
                                  tensor=shorten(name), expected="the bare name of a safetensors file",
                                  got=repr(shard)[:80])
    return weight_map
