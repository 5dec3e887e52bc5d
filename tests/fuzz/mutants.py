"""Ten thousand ways to damage a checkpoint, each a pure function of a seed and a number.

Two families. Damage to form (headers, indexes, lengths, files that are not theirs, constants of the published
models) must be noticed in any folder. Damage to content (a flipped bit of a weight, two tensors of one shape
exchanged, weights of another training run, constants of a model nobody published) leaves a sound checkpoint of
another model; only a digest can tell, so those mutants are made in a folder with a SHA256 manifest.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.bases import RECOGNISED, TINY
from tests.fuzz.edits import (
    another_value,
    edit_config,
    edit_header,
    edit_index,
    flip_bits,
    insert_or_delete,
    read_header,
    swap_entries,
    write_header,
)

CONFIG, INDEX, MANIFEST = "config.json", "model.safetensors.index.json", "SHA256"


@dataclass(frozen=True)
class Kind:
    """One sort of damage.

    Attributes:
        share: of a hundred mutants.
        bases: names of the good checkpoints it is done to.
        signed: whether the folder has a manifest of digests.
        do: damages a folder; gets a random generator, the folder, and the folder of all bases.
    """

    share: int
    bases: tuple[str, ...]
    signed: bool
    do: Callable[[random.Random, Path, Path], object]


def _weights(draw: random.Random, folder: Path) -> Path:
    return draw.choice(sorted(folder.glob("*.safetensors")))


def _any_file(draw: random.Random, folder: Path) -> Path:
    return draw.choice(sorted(path for path in folder.iterdir() if not path.is_symlink()))


def _header_length(path: Path) -> int:
    with path.open("rb") as file:
        return int.from_bytes(file.read(8), "little")


def flip_data(draw: random.Random, folder: Path, bases: Path) -> None:
    path = _weights(draw, folder)
    flip_bits(draw, path, 8 + _header_length(path))


def flip_header(draw: random.Random, folder: Path, bases: Path) -> None:
    path = _weights(draw, folder)
    flip_bits(draw, path, 0, 8 + _header_length(path))


def truncate(draw: random.Random, folder: Path, bases: Path) -> None:
    path = _any_file(draw, folder)
    size = path.stat().st_size
    few = min(size, draw.choice((8, 64, size)))
    os.truncate(path, size - draw.randint(1, few))


def insert(draw: random.Random, folder: Path, bases: Path) -> None:
    insert_or_delete(draw, draw.choice([*sorted(folder.glob("*.safetensors")), *folder.glob(INDEX)]))


def header_fields(draw: random.Random, folder: Path, bases: Path) -> None:
    edit_header(draw, _weights(draw, folder))


def tensors_exchanged(draw: random.Random, folder: Path, bases: Path) -> None:
    path = _weights(draw, folder)
    header, data = read_header(path)
    swap_entries(draw, header)
    write_header(path, header, data)


def index_fields(draw: random.Random, folder: Path, bases: Path) -> None:
    edit_index(draw, folder / INDEX)


def config_fields(draw: random.Random, folder: Path, bases: Path) -> None:
    path = folder / CONFIG
    generation = folder / "generation_config.json"
    if generation.exists() and draw.random() < 0.1:
        path = generation
    way = draw.random()
    if way < 0.6:
        edit_config(draw, path)
    elif way < 0.8:
        flip_bits(draw, path)
    elif way < 0.95:
        insert_or_delete(draw, path)
    else:
        path.write_text((bases / draw.choice(RECOGNISED) / CONFIG).read_text())


def config_number(draw: random.Random, folder: Path, bases: Path) -> None:
    """A number of a configuration that stays plausible: nothing but a digest can object."""
    path = folder / CONFIG
    data = json.loads(path.read_text())
    inner = data["rope_scaling"] if "rope_scaling" in data and draw.random() < 0.3 else data
    name = draw.choice([name for name, value in inner.items() if isinstance(value, int | float)])
    inner[name] = another_value(draw, inner[name])
    path.write_text(json.dumps(data))


_IMPOSTORS = (b"", b"\0" * 7, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"<!doctype html>",
              b"GGUF\3\0\0\0", b"PK\3\4", b"\x80\x04.", b"{}", b"[]", b"null", b"\2\0\0\0\0\0\0\0{}")


def file_swap(draw: random.Random, folder: Path, bases: Path) -> None:
    """Something else under the name of a file."""
    path = _any_file(draw, folder)
    others = sorted(other for other in folder.iterdir() if other != path)
    strangers = sorted((bases / draw.choice((*TINY, "embedded"))).iterdir())
    way = draw.randrange(10)
    if way == 0 and others:
        other = draw.choice(others)
        path.rename(folder / "between")
        other.rename(path)
        (folder / "between").rename(other)
    elif way == 1 and others:
        shutil.copy(draw.choice(others), path)
    elif way == 2:
        path.unlink()
    elif way == 3:
        path.unlink()
        shutil.copy(draw.choice(strangers), path)
    elif way == 4:
        shutil.copy(draw.choice(strangers), folder / f"more-{draw.randrange(9)}.safetensors")
    elif way == 5:
        path.unlink()
        draw.choice((os.mkfifo, Path.mkdir))(path)
    elif way == 6:
        path.unlink()
        path.symlink_to(draw.choice(("/dev/zero", "/dev/null", "/no/where", str(path), "/proc/self/mem", "/")))
    elif way == 7:
        path.rename(folder / draw.choice(("model.safetensors", INDEX, "model-00000-of-00004.safetensors", "x.bin")))
    elif way == 8:
        path.write_bytes(draw.randbytes(draw.choice((1, 8, 100, 5000))))
    else:
        path.write_bytes(draw.choice(_IMPOSTORS))


def weights_of_another(draw: random.Random, folder: Path, bases: Path) -> None:
    """A file of a model of the same sizes."""
    path = _weights(draw, folder)
    shutil.copy(bases / f"other-{folder.name}" / path.name, path)


def data_and_manifest(draw: random.Random, folder: Path, bases: Path) -> None:
    """Flipped data beside a manifest that is damaged as well."""
    flip_data(draw, folder, bases)
    path = folder / MANIFEST
    lines = path.read_text().splitlines(keepends=True)
    way = draw.randrange(4)
    if way == 0:
        flip_bits(draw, path)
    elif way == 1:
        os.truncate(path, draw.randrange(path.stat().st_size))
    elif way == 2:
        insert_or_delete(draw, path)
    else:
        weights = [line for line in lines if ".safetensors\n" in line]
        path.write_text("".join(line for line in lines if line != draw.choice(weights)))


SHARDED = ("hf-sharded",)
KINDS = {
    "bits of data": Kind(20, TINY, True, flip_data),
    "bits of a header": Kind(15, TINY, False, flip_header),
    "truncation": Kind(8, TINY, False, truncate),
    "insertion or deletion": Kind(7, TINY, False, insert),
    "header fields": Kind(15, TINY, False, header_fields),
    "tensors of one shape exchanged": Kind(3, TINY, True, tensors_exchanged),
    "index fields": Kind(8, SHARDED, False, index_fields),
    "configuration of published sizes": Kind(12, RECOGNISED, False, config_fields),
    "configuration of other sizes": Kind(3, TINY, True, config_number),
    "file swap": Kind(5, TINY, False, file_swap),
    "weights of another model": Kind(2, TINY, True, weights_of_another),
    "data and manifest": Kind(2, TINY, True, data_and_manifest),
}
_ORDER = [name for name, kind in KINDS.items() for _ in range(kind.share)]
assert len(_ORDER) == 100


@dataclass(frozen=True)
class Mutant:
    """One damaged checkpoint, fully told by seed and number."""

    seed: int
    number: int

    @property
    def kind(self) -> str:
        return _ORDER[(self.number * 37) % 100]  # neighbours differ, any hundred have every kind

    @property
    def base(self) -> str:
        return self._draw("base").choice(KINDS[self.kind].bases)

    def damage(self, folder: Path, bases: Path) -> None:
        """Damage a copy of the base, in a folder of its name."""
        KINDS[self.kind].do(self._draw("damage"), folder, bases)

    def _draw(self, what: str) -> random.Random:
        return random.Random(f"{self.seed}/{self.number}/{what}")
