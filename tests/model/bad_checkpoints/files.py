"""Inputs 1 to 31: files that are no safetensors files, headers that lie, and things that are no files."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import torch

from tests.model.bad_checkpoints.case import (
    CONFIG,
    FIRST,
    INDEX,
    KEY_BIAS,
    QUERY,
    SINGLE,
    SINKS,
    VALUE_BIAS,
    Case,
    broken,
    content,
    entry,
    headed,
    replaced,
    tensors,
    with_length,
)

_DEEP = b'{"a":' * 100_000


def _cut(by: int):
    return lambda folder: os.truncate(folder / SINGLE, (folder / SINGLE).stat().st_size - by)


def _append(folder: Path) -> None:
    with (folder / SINGLE).open("ab") as file:
        file.write(b"more!")


def _claim_the_same(header: dict[str, Any]) -> None:
    header[VALUE_BIAS]["data_offsets"] = header[KEY_BIAS]["data_offsets"]


def _leave_a_hole(header: dict[str, Any]) -> None:
    del header[SINKS]  # 8 heads of 2 bytes


def _twice(header: dict[str, Any]) -> bytes:
    same = json.dumps({SINKS: header[SINKS]}).encode()
    return json.dumps(header).encode()[:-1] + b", " + same[1:]


def _twice_inside(header: dict[str, Any]) -> bytes:
    return json.dumps(header).encode().replace(b'"dtype"', b'"dtype": "U8", "dtype"', 1)


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket may have about 100 characters
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def _unexpected(name: str, shown: str) -> Case:
    add = tensors(lambda found: found.update({name: torch.zeros(2)}))
    return Case(27, f"tensor named {shown[:20]}", add, "no gpt-oss model has", tensor=shown, got="1 more",
                expected="tensors (Hugging Face names")


CASES = [
    broken(1, "0-byte shard", content(b"", FIRST), "empty file (0 bytes)", base="hf-sharded", file=FIRST),
    broken(2, "7-byte shard", content(b"\x08\0\0\0\0\0\0", FIRST), "(7 bytes)", base="hf-sharded", file=FIRST,
           got="7 bytes"),
    broken(3, "header longer than the file", content(with_length(255)),
           "truncated: the header says 255 bytes, the file has 10", expected="263", got="10 bytes"),
    *(broken(4, f"header length {length}", content(with_length(length)), "not a safetensors file", got="begins b'",
             expected="100000000") for length in (100_000_001, 2**62, 2**64 - 1)),
    broken(5, "Git LFS pointer", content("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"),
           "not a safetensors file", got="Git LFS pointer", hint="git lfs pull"),
    *(broken(6, f"HTML page {text[:9]}", content(text + "x" * 99), "not a safetensors file", got="HTML")
      for text in ("<!doctype html>", "<html><body>401", "<HTML>")),
    *(broken(7, f"{name} magic", content(magic + b"\0" * 30), "not a safetensors file", got=name, hint="safetensors")
      for name, magic in (("gzip", b"\x1f\x8b\x08"), ("zip", b"PK\x03\x04"), ("pickle", b"\x80\x04\x95"),
                          ("GGUF", b"GGUF\x03"))),
    broken(8, "header not JSON", headed(lambda header: b'{"a": {x'), "the header is not JSON at byte 7",
           got="Expecting"),
    broken(8, "header cut off", headed(lambda header: json.dumps(header).encode()[:-9]), "is not JSON at byte"),
    broken(9, "header not UTF-8", headed(lambda header: b'{"\xff\xfe": 1}'), "the header is not UTF-8 at byte 2"),
    broken(10, "header is a list", headed(lambda header: b"[]"), "must begin with '{'", got="b'[]'"),
    broken(11, "space before the header", headed(lambda header: b" " + json.dumps(header).encode()),
           "must begin with '{'", got="b' {"),
    broken(12, "100,000 levels deep", headed(lambda header: _DEEP), "the header is nested too deep"),
    *(broken(13, f"{by} bytes cut off", _cut(by), f"truncated: {by} bytes are missing", expected="632064 bytes",
             got=f"{632064 - by} bytes") for by in (1, 100, 10_000)),
    broken(14, "bytes at the end", _append, "5 unexpected bytes after the last tensor", expected="632064 bytes"),
    broken(15, "two tensors on the same bytes", headed(_claim_the_same), "two tensors claim the same bytes",
           tensor=f"{KEY_BIAS} and {VALUE_BIAS}", expected="to begin at byte"),
    broken(16, "hole between tensors", headed(_leave_a_hole), "a gap of 16 bytes before a tensor",
           tensor="model.layers.1.self_attn.v_proj.bias", expected="begin at byte", got="begin at byte"),
    broken(17, "offsets reversed", entry(SINKS, data_offsets=[8, 0]), "run backwards", tensor=SINKS, got="[8, 0]"),
    broken(18, "negative offset", entry(SINKS, data_offsets=[-16, 0]), "data_offsets must be whole numbers",
           tensor=SINKS, got="data_offsets [-16, 0]"),
    broken(18, "negative dimension", entry(SINKS, shape=[-8]), "shape must be whole numbers", tensor=SINKS,
           got="shape [-8]"),
    broken(18, "fractional dimension", entry(SINKS, shape=[8.0]), "shape must be whole numbers", tensor=SINKS,
           got="shape [8.0]"),
    broken(18, "true as a dimension", entry(SINKS, shape=[True]), "shape must be whole numbers", tensor=SINKS,
           got="shape [True]"),
    broken(18, "one offset", entry(SINKS, data_offsets=[8]), "must be two numbers", tensor=SINKS, got="[8]"),
    broken(19, "shape and bytes differ", entry(SINKS, shape=[4]), "bytes do not fit its shape", tensor=SINKS,
           expected="8 bytes for BF16 [4]", got="16 bytes"),
    broken(20, "shape that overflows", entry(SINKS, shape=[2**62, 2**62]), "larger than any file", tensor=SINKS,
           got="BF16 [4611686018427387904, 4611686018427387904]"),
    broken(20, "shape of a hundred dimensions", entry(SINKS, shape=[1] * 100), "larger than any file", tensor=SINKS,
           expected="8 dimensions"),
    broken(21, "unknown dtype", entry(SINKS, dtype="BF17"), "unknown dtype", tensor=SINKS, got="'BF17'",
           expected="U8, I8"),
    broken(21, "dtype that is no text", entry(SINKS, dtype=[]), "unknown dtype", tensor=SINKS, got="[]"),
    *(broken(22, f"no {field}", entry(SINKS, **{field: ...}), f"gives a tensor no {field}", tensor=SINKS,
             expected="dtype, shape, data_offsets") for field in ("data_offsets", "shape", "dtype")),
    broken(22, "tensor that is a list", headed(lambda header: header.update({SINKS: []})), "not described",
           tensor=SINKS, got="[]"),
    broken(23, "tensor twice in the header", headed(_twice), f"defines '{SINKS}' twice", expected="once"),
    broken(23, "field twice in the header", headed(_twice_inside), "defines 'dtype' twice", got="under 'lm_head"),
    broken(24, "zero-size tensor on a shared offset",
           headed(lambda header: header.update(x={"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]})),
           "an empty tensor", tensor="x", got="shape [0]"),
    broken(24, "tensor emptied", tensors(lambda found: found.update({QUERY: torch.zeros(0, 64).bfloat16()})),
           "an empty tensor", tensor=QUERY, got="[0, 64]"),
    *(broken(25, f"metadata {value!r}", headed(lambda header, value=value: header.update(__metadata__=value)),
             "__metadata__ must be strings", got=repr(value)) for value in ({"format": 1}, [], None, {"a": {}})),
    _unexpected("../../etc/passwd", "../../etc/passwd"),
    _unexpected("a\nb\0c", "a\\nb\\x00c"),
    _unexpected("<script>alert(1)</script>", "<script>alert(1)</script>"),
    _unexpected("x" * 1_000_000, "x" * 77 + "..."),
    *(Case(28, f"{file} is a named pipe", replaced(os.mkfifo, file), "not a regular file", file=file, base=base,
           got="a named pipe", expected="a plain file")
      for file, base in ((SINGLE, "hf"), (CONFIG, "hf"), (FIRST, "hf-sharded"), (INDEX, "hf-sharded"))),
    Case(29, "/dev/zero", replaced(lambda path: path.symlink_to("/dev/zero")), "not a regular file",
         got="a character device"),
    Case(29, "folder", replaced(Path.mkdir), "not a regular file", got="a folder"),
    Case(29, "socket", replaced(_socket), "not a regular file", got="a socket"),
    Case(30, "dangling link", replaced(lambda path: path.symlink_to("../../blobs/gone")), "a broken link",
         got="link to ../../blobs/gone", hint="download"),
    Case(30, "link to itself", replaced(lambda path: path.symlink_to(path)), "a broken link", got="link to"),
    Case(30, "dangling link to config.json", replaced(lambda path: path.symlink_to("/no/where"), CONFIG),
         "a broken link", file=CONFIG, got="link to /no/where"),
]

LOADS = [
    (26, "empty metadata", headed(lambda header: header.update(__metadata__={}))),
    (26, "no metadata", headed(lambda header: header.pop("__metadata__") and None)),
    (13, "file in full", lambda folder: None),
]
"""What looks odd and is sound: number, what, make."""
