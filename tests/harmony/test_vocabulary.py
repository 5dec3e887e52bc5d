"""The vocabulary: the right one, from wherever it comes, with no network, and every id accounted for."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gptoss_workbench.errors import PromptError, VocabularyError
from gptoss_workbench.harmony import cache, ranks, tokens
from gptoss_workbench.harmony import vocabulary as module

SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"  # published with openai-harmony
SIZE = 201_088


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a new process of a user with an empty cache; gives the cache's file."""
    monkeypatch.setattr(module, "_loaded", None)
    monkeypatch.setattr(module, "_checked", set())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "cache"))
    monkeypatch.delenv(cache.VARIABLE, raising=False)
    return tmp_path / "cache" / "gptoss-workbench" / cache.FILE


def in_processes(code: str, count: int, folder: Path, **variables: str) -> list[str]:
    """Run code in several processes at once, with an empty cache and no way to the network."""
    environment = {key: value for key, value in os.environ.items() if key != cache.VARIABLE} | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "TIKTOKEN_RS_CACHE_DIR": str(folder),
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
        **variables,
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(count)
    ]
    outputs = []
    for process in started:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        outputs.append(out.strip())
    return outputs


def test_importing_is_light(tmp_path):
    code = (
        "import sys, gptoss_workbench.harmony as harmony\n"
        "harmony.parse([1, 2])\n"
        "print([name for name in ('torch', 'xarray', 'openai_harmony') if name in sys.modules])\n"
        "harmony.load_vocabulary(); harmony.chat('Hi')\n"
        "print('torch' in sys.modules)"
    )
    (out,) = in_processes(code, 1, tmp_path)
    assert out.split("\n") == ["[]", "False"]


def test_lazy_names():
    import gptoss_workbench.harmony as harmony

    assert set(harmony.__all__) <= set(dir(harmony))
    assert all(getattr(harmony, name) is not None for name in harmony.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = harmony.nothing  # pyright: ignore[reportAttributeAccessIssue]


def test_every_id_has_its_bytes(vocabulary, packaged_ranks):
    """openai-harmony's bytes of each id against the packed file, which is read by other code."""
    found = [vocabulary.token_bytes(token) for token in range(SIZE)]
    assert found[: tokens.RANKS] == packaged_ranks
    names = [name.decode() for name in found[tokens.RANKS :]]
    assert names == [tokens.special_name(token) for token in range(tokens.RANKS, SIZE)]
    assert len(set(found)) == SIZE == len(vocabulary) == vocabulary.size
    assert vocabulary.special_ids == set(range(199_998, SIZE))


def test_named_tokens(vocabulary):
    names = {
        "<|startoftext|>": 199998, "<|endoftext|>": 199999, "<|return|>": 200002, "<|constrain|>": 200003,
        "<|channel|>": 200005, "<|start|>": 200006, "<|end|>": 200007, "<|message|>": 200008,
        "<|call|>": 200012,
    }
    assert {name: token for token, name in tokens.NAMES.items()} == names
    assert vocabulary.encode("".join(names)) == list(names.values())
    assert set(vocabulary.encoding.stop_tokens()) == tokens.STOPS
    assert vocabulary.encode("<|reserved_201087|>") == [201087]
    # openai-harmony has one special token too many: there is no row for it in any model
    assert vocabulary.encoding.encode("<|reserved_201088|>", allowed_special="all") == [SIZE]
    assert max(vocabulary.encode("<|reserved_201088|>")) < tokens.RANKS


def test_text_of_tokens(vocabulary):
    flag = vocabulary.encode("🇿🇼")
    assert "�" not in "".join(map(vocabulary.token_text, flag))
    assert vocabulary.decode(flag) == "🇿🇼"
    (half,) = (token for token in range(256) if vocabulary.token_bytes(token) == b"\xe2")
    assert vocabulary.token_text(half) == "\\xe2"
    assert vocabulary.decode([half]) == "�"
    assert [vocabulary.token_text(token) for token in vocabulary.encode("Hi there")] == ["Hi", " there"]


@pytest.mark.parametrize(
    "text", ["", " ", "a\r\n\tb", "ﷺ é 漢字 👩‍👩‍👧", "<|start|>user<|message|>Hi<|end|>", "<|no|>"]
)
def test_encode_then_decode(vocabulary, text):
    assert vocabulary.decode(vocabulary.encode(text)) == text


def test_odd_inputs(vocabulary):
    assert vocabulary.decode(np.array([12194])) == vocabulary.decode([12194]) == "Hi"
    assert vocabulary.decode(vocabulary.encode("a\ud800b")) == "a�b"
    assert vocabulary.decode([]) == ""
    for wrong in ([SIZE], [5, -1], [2**40]):
        with pytest.raises(PromptError, match="outside the vocabulary"):
            vocabulary.decode(wrong)
    for wrong in ("Hi", [1.5], [[1]], 3, None):
        with pytest.raises(PromptError, match="no token ids"):
            vocabulary.decode(wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(PromptError, match="Only text"):
        vocabulary.encode(b"Hi")  # pyright: ignore[reportArgumentType]
    with pytest.raises(PromptError, match="outside the vocabulary"):
        vocabulary.token_text(SIZE)


def test_written_once_and_the_variable_left_alone(fresh, monkeypatch):
    first = module.load_vocabulary()
    assert hashlib.sha256(fresh.read_bytes()).hexdigest() == SHA256 == ranks.SHA256
    assert list(fresh.parent.iterdir()) == [fresh]
    assert cache.VARIABLE not in os.environ
    written = fresh.stat().st_mtime_ns
    monkeypatch.setattr(module, "_loaded", None)
    assert module.load_vocabulary() is not first
    assert fresh.stat().st_mtime_ns == written
    assert module.load_vocabulary() is module.load_vocabulary()


def test_a_damaged_cache_is_mended(fresh):
    fresh.parent.mkdir(parents=True)
    fresh.write_bytes(b"IQ== 0\n")
    assert module.load_vocabulary().encode("Hi") == [12194]
    assert cache.sha256_of(fresh) == SHA256


def test_a_home_that_cannot_be_written(fresh, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    (tmp_path / "elsewhere").write_text("another file")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "elsewhere"))
    with pytest.raises(VocabularyError, match="cannot be written anywhere") as caught:
        module.load_vocabulary()
    assert len(str(caught.value).splitlines()) <= 6 and cache.VARIABLE in str(caught.value)
    (tmp_path / "elsewhere").unlink()
    (tmp_path / "elsewhere").mkdir()
    assert module.load_vocabulary().encode("Hi") == [12194]
    assert [path.name for path in (tmp_path / "elsewhere").rglob("*.tiktoken")] == [cache.FILE]


def test_many_processes_at_once_without_network(tmp_path):
    code = "from gptoss_workbench.harmony import load_vocabulary as l; print(l().encode('Hi'))"
    assert in_processes(code, 4, tmp_path) == ["[12194]"] * 4
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [cache.FILE]


def test_many_threads_at_once(fresh):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: module.load_vocabulary(), range(16)))
    assert len({id(one) for one in found}) == 1


def test_the_users_own_folder_is_respected(fresh, monkeypatch, tmp_path, packaged_ranks):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    (tmp_path / cache.FILE).write_bytes(ranks.to_tiktoken(packaged_ranks))
    assert module.load_vocabulary().encode("Hi") == [12194]
    assert not fresh.exists()
    assert os.environ[cache.VARIABLE] == str(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"IQ== 0\n"])
def test_the_users_own_folder_is_wrong(fresh, monkeypatch, tmp_path, content):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    if content is not None:
        (tmp_path / cache.FILE).write_bytes(content)
    with pytest.raises(VocabularyError) as caught:
        module.load_vocabulary()
    got = "no readable file" if content is None else hashlib.sha256(content).hexdigest()
    message = str(caught.value)
    assert all(part in message for part in (cache.VARIABLE, str(tmp_path / cache.FILE), SHA256, got, "unset"))
    assert len(message.splitlines()) <= 6
    assert os.environ[cache.VARIABLE] == str(tmp_path)


def test_an_empty_variable_counts_as_unset(fresh, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, "")
    assert module.load_vocabulary().encode("Hi") == [12194]
    assert os.environ[cache.VARIABLE] == ""


def test_a_lost_or_damaged_asset(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    with pytest.raises(VocabularyError, match="is missing"):
        module._packaged()
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "o200k.bin.xz").write_bytes(b"no xz")
    with pytest.raises(VocabularyError, match="is damaged"):
        module._packaged()
