"""Small damage to one file: bits, bytes, fields of a header, an index or a configuration."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from gptoss_workbench.model.headers import WIDTHS

_ODD: tuple[Any, ...] = (None, True, False, 0, -1, 1, 3, 0.5, 1e-5, 1e308, float("nan"), 2**31, 2**63, 10**30, "", "8",
                         [], {}, [1], "sliding_attention", "../x", "\0")


def flip_bits(draw: random.Random, path: Path, begin: int = 0, end: int | None = None) -> None:
    """Flip one to eight bits, all different, of the bytes [begin, end)."""
    raw = bytearray(path.read_bytes())
    bits = range(8 * begin, 8 * (len(raw) if end is None else end))
    for bit in draw.sample(bits, min(len(bits), draw.choice((1, 1, 1, 2, 8)))):
        raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


def insert_or_delete(draw: random.Random, path: Path) -> None:
    raw = path.read_bytes()
    at, count = draw.randrange(len(raw)), draw.choice((1, 1, 2, 8, 100))
    if draw.random() < 0.5:
        path.write_bytes(raw[:at] + raw[at + count:])
    else:
        new = draw.choice((draw.randbytes(count), bytes(count), b"0" * count, b" " * count, raw[at:at + count] or b"1"))
        path.write_bytes(raw[:at] + new + raw[at:])


def another_value(draw: random.Random, value: int | float) -> int | float:
    """Another number of the same type, not far away."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw.choice((value + 1, max(1, value - 1) if value != 1 else 2, value * 2))
    return draw.choice((value * 2, value / 2, value + 1))


# -- headers -------------------------------------------------------------------------------------------------


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:8 + length]), raw[8 + length:]


def write_header(path: Path, header: dict[str, Any] | bytes, data: bytes, length: int | None = None) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)


def swap_entries(draw: random.Random, header: dict[str, Any]) -> None:
    """Exchange two tensors of the same dtype and shape."""
    names = [name for name in header if name != "__metadata__"]
    draw.shuffle(names)
    form = {name: (header[name]["dtype"], tuple(header[name]["shape"])) for name in names}
    one, other = next((a, b) for a in names for b in names if a < b and form[a] == form[b])
    header[one], header[other] = header[other], header[one]


def edit_header(draw: random.Random, path: Path) -> None:
    header, data = read_header(path)
    names = [name for name in header if name != "__metadata__"]
    name, other = draw.sample(names, 2)
    entry = header[name]
    length = None
    way = draw.randrange(16)
    if way == 0:
        entry["dtype"] = draw.choice([dtype for dtype in (*WIDTHS, "BF17", "", None, 7) if dtype != entry["dtype"]])
    elif way == 1:
        _edit_shape(draw, entry["shape"])
    elif way == 2:
        _edit_offsets(draw, entry["data_offsets"])
    elif way == 3:
        entry[draw.choice(("dtype", "shape", "data_offsets"))] = draw.choice(_ODD)
    elif way == 4:
        del entry[draw.choice(("dtype", "shape", "data_offsets"))]
    elif way == 5:
        del header[name]
    elif way == 6:
        header[draw.choice((f"{name}x", name.replace("0", "9"), "", "a\0b", "x" * 5000, "<b>"))] = header.pop(name)
    elif way == 7:
        header[name] = draw.choice((header[other], *_ODD))
    elif way == 8:
        header["more"] = {"dtype": "BF16", "shape": draw.choice(([0], [1], [])), "data_offsets": draw.choice(
            ([0, 0], [0, 2], [len(data), len(data)], [len(data), len(data) + 2]))}
    elif way == 9:
        header["__metadata__"] = draw.choice(({}, {"format": 1}, [], "pt", None, {"a": None}, {"format": "tf"}))
    elif way == 10:
        length = max(0, len(json.dumps(header)) + draw.choice((-1, 1, 8, -8, 10**6, 2**40, 2**63)))
    elif way == 11:
        again = json.dumps({name: draw.choice((entry, header[other]))})
        return write_header(path, (json.dumps(header)[:-1] + ", " + again[1:]).encode(), data)
    elif way == 12:
        raw = json.dumps(header).encode()
        new = draw.choice((b" " + raw, raw + b"  ", raw + b"\0", b"\xef\xbb\xbf" + raw, raw + b"{}", raw[:-1],
                           raw.replace(b'"', b"'"), b"[" * 50_000, raw.decode().encode("utf-16")))
        return write_header(path, new, data)
    elif way == 13:
        moved = list(header.items())
        draw.shuffle(moved)
        header = dict(moved)
    elif way == 14:
        a, b = entry["shape"], header[other]["shape"]
        entry["shape"], header[other]["shape"] = b, a
    else:
        a, b = entry["data_offsets"], header[other]["data_offsets"]
        if a[1] - a[0] == b[1] - b[0]:  # the same bytes for both; to exchange them is another kind of damage
            entry["data_offsets"] = b
        else:
            entry["data_offsets"], header[other]["data_offsets"] = b, a
    write_header(path, header, data, length)


def _edit_shape(draw: random.Random, shape: list[Any]) -> None:
    at = draw.randrange(len(shape))
    way = draw.randrange(6)
    if way == 0:
        shape[at] += draw.choice((-1, 1, 32, -shape[at]))
    elif way == 1:
        shape[at] = draw.choice((-shape[at], float(shape[at]), str(shape[at]), 2**62, None, [shape[at]]))
    elif way == 2:
        shape.append(1)
    elif way == 3:
        shape.pop(at)
    elif way == 4:
        shape.reverse()
    else:
        shape[at] *= 2
        shape.append(0.5)


def _edit_offsets(draw: random.Random, offsets: list[Any]) -> None:
    at, by = draw.randrange(2), draw.choice((-2, 2, 1, -1, 64, -64, 10**6, 2**62))
    way = draw.randrange(5)
    if way == 0:
        offsets[at] += by
    elif way == 1:
        offsets[:] = [offsets[0] + by, offsets[1] + by]
    elif way == 2:
        offsets.reverse()
    elif way == 3:
        offsets[at] = draw.choice((float(offsets[at]), str(offsets[at]), None, -1))
    else:
        offsets.append(offsets[at])


# -- indexes and configurations ------------------------------------------------------------------------------


def edit_index(draw: random.Random, path: Path) -> None:
    index = json.loads(path.read_text())
    names = index["weight_map"]
    name, other = draw.sample(sorted(names), 2)
    way = draw.randrange(10)
    if way == 0:
        names[name] = draw.choice([shard for shard in sorted(set(names.values())) if shard != names[name]])
    elif way == 1:
        names[name] = draw.choice((*_ODD, "/etc/passwd", "../x.safetensors", "a/b.safetensors", "C:\\x.safetensors",
                                   "model-00009-of-00002.safetensors", "x" * 300 + ".safetensors", "con.safetensors"))
    elif way == 2:
        del names[name]
    elif way == 3:
        names[draw.choice((f"{name}x", "", "more", "a\0b"))] = names[other]
    elif way == 4:
        names[name], names[other] = names[other], names[name]
    elif way == 5:
        index["weight_map"] = draw.choice((*_ODD, list(names), list(names.items()), {}, {name: names[name]}))
    elif way == 6:
        index["metadata"] = draw.choice((*_ODD, {"total_size": -1}))
    elif way == 7:
        old = draw.choice(sorted(set(names.values())))
        index["weight_map"] = {key: "other.safetensors" if shard == old else shard for key, shard in names.items()}
    elif way == 8:
        return flip_bits(draw, path)
    else:
        again = f'"{name}": "{names[draw.choice((name, other))]}", '
        path.write_text(json.dumps(index).replace('"weight_map": {', '"weight_map": {' + again))
        return None
    path.write_text(json.dumps(index))
    return None


def edit_config(draw: random.Random, path: Path) -> None:
    """Change, take out, add or rename one key, the rotary settings' own keys included."""
    data = json.loads(path.read_text())
    inner = data
    if isinstance(data.get("rope_scaling"), dict) and draw.random() < 0.35:
        inner = data["rope_scaling"]
    name = draw.choice(sorted(inner))
    value = inner[name]
    way = draw.randrange(6)
    if way == 0:
        del inner[name]
    elif way == 1:
        inner[name] = draw.choice(_ODD)
    elif way == 2:
        inner[draw.choice((f"{name}_", name.upper(), "rope_parameters", "more"))] = inner.pop(name)
    elif isinstance(value, list):
        at = draw.randrange(len(value))
        value[at] = draw.choice([item for item in (*value, "full_attention", 7, None) if item != value[at]])
    elif isinstance(value, int | float):
        inner[name] = another_value(draw, value)
    else:
        inner[name] = draw.choice(_ODD)
    path.write_text(json.dumps(data))
