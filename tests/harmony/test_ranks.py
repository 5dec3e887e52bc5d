"""The vocabulary's file forms, and the vocabulary of a checkpoint."""

from __future__ import annotations

import base64
import json
import subprocess
import sys

import pytest

from gptoss_workbench.errors import VocabularyError
from gptoss_workbench.harmony import cache, pack, ranks
from gptoss_workbench.harmony import vocabulary as module

# Byte-level BPE's alphabet: a byte that is a visible Latin-1 sign stays, the others go to U+0100 on.
HIDDEN = [byte for byte in range(256) if not (33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174)]
BYTE_LEVEL = {byte: chr(256 + place) for place, byte in enumerate(HIDDEN)}


@pytest.fixture(scope="module")
def vocab(packaged_ranks) -> dict[str, int]:
    return {token.decode("latin-1").translate(BYTE_LEVEL): rank for rank, token in enumerate(packaged_ranks)}


@pytest.fixture
def tokenizer(vocab, tmp_path):
    """Writes the tokenizer.json of a checkpoint and gives its path."""

    def write(changes: dict | None = None, text: str | None = None):
        path = tmp_path / "tokenizer.json"
        whole = {"version": "1.0", "model": {"type": "BPE", "vocab": vocab | (changes or {})}}
        path.write_text(json.dumps(whole) if text is None else text, encoding="utf-8")
        return path

    return write


def test_packed_and_back(packaged_ranks):
    assert len(packaged_ranks) == 199_998
    data = ranks.to_tiktoken(packaged_ranks)
    assert len(data) == 3_613_922
    assert data.splitlines()[12194] == base64.b64encode(b"Hi") + b" 12194"
    assert ranks.from_tiktoken(data) == packaged_ranks


def test_pack_command(packaged_ranks, tokenizer, tmp_path, capsys):
    source, out = tmp_path / cache.FILE, tmp_path / "packed"
    source.write_bytes(ranks.to_tiktoken(packaged_ranks))
    for made_from in (source, tokenizer()):
        out.unlink(missing_ok=True)
        assert pack.main([str(made_from), str(out)]) == 0
        assert ranks.unpack(out.read_bytes()) == packaged_ranks
        assert ranks.SHA256 in capsys.readouterr().out
        assert out.stat().st_size < 900_000


def test_pack_command_refuses_others(tokenizer, tmp_path, capsys):
    out = tmp_path / "packed"
    source = tmp_path / "other.tiktoken"
    for content in (b"IQ== 0\n", b"!!!! 0\n", b"   \n"):
        source.write_bytes(content)
        assert pack.main([str(source), str(out)]) == 1
        assert "expected" in capsys.readouterr().err
    assert pack.main([str(tmp_path / "nothing"), str(out)]) == 1
    assert pack.main([str(tokenizer(text="{}")), str(out)]) == 1
    assert not out.exists()


def test_pack_runs_as_a_module():
    got = subprocess.run(
        [sys.executable, "-m", "gptoss_workbench.harmony.pack", "--help"], capture_output=True, text=True,
        env={"PYTHONPATH": ":".join(filter(None, sys.path))}, check=False,
    )
    assert got.returncode == 0 and "tokenizer.json" in got.stdout


def test_a_checkpoints_tokenizer_is_used(tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_loaded", None)
    monkeypatch.setattr(module, "_checked", set())
    monkeypatch.setattr(module, "_packaged", lambda: pytest.fail("the packaged vocabulary was read"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(cache.VARIABLE, raising=False)
    path = tokenizer()
    found = module.load_vocabulary(path.parent)
    assert found.encode("Hi") == [12194]
    monkeypatch.setattr(ranks, "from_tokenizer_json", lambda path: pytest.fail("read twice"))
    assert module.load_vocabulary(str(path.parent)) is found


def test_a_folder_without_tokenizer(vocabulary, tmp_path):
    assert module.load_vocabulary(tmp_path) is vocabulary
    assert module.load_vocabulary(tmp_path / "nowhere") is vocabulary


def wrong_tokenizers(vocab):
    swapped = {"Hi": vocab["Ho"], "Ho": vocab["Hi"]}
    yield "swapped", {"changes": swapped}, "sha256"
    yield "short", {"text": json.dumps({"model": {"vocab": {"a": 0}}})}, "199997"
    yield "cut off", {"text": '{"model": {"vocab": {"a": 0, "b'}, "cannot be read"
    yield "git lfs", {"text": "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"}, "cannot be read"
    yield "other layout", {"text": json.dumps({"model": {"vocab": [["a", 0.0]]}})}, "cannot be read"
    yield "other alphabet", {"changes": {"▁Hi": 5}}, "cannot be read"
    yield "list", {"text": "[]"}, "cannot be read"


def test_wrong_tokenizers_are_refused(tokenizer, vocab, vocabulary):
    for name, arguments, part in wrong_tokenizers(vocab):
        path = tokenizer(**arguments)
        with pytest.raises(VocabularyError) as caught:
            module.load_vocabulary(path.parent)
        message = str(caught.value)
        assert part in message and str(path) in message and "hint" in message, (name, message)
        assert len(message.splitlines()) <= 6, name
