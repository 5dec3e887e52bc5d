"""Names to folders, with the network taken away, a hub that does not answer, and a cache made by hand."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import gptoss_workbench.model.hub as hub
from gptoss_workbench.errors import ModelNotFound, WorkbenchError
from gptoss_workbench.model.checkpoint import read_checkpoint
from gptoss_workbench.model.hub import resolve
from tests.factories import tiny_model, write_hf

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PATIENT = 30.0  # seconds that only a hang would take; the promise is 3


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, an endpoint where nobody listens, no proxy, and offline mode off."""
    from huggingface_hub import constants

    for name in ("http_proxy", "https_proxy", "all_proxy", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused_port()}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def unused_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def refusal(name: str | Path, **options: Any) -> ModelNotFound:
    with pytest.raises(ModelNotFound) as caught:
        resolve(name, **options)
    assert len(str(caught.value).splitlines()) <= 6
    return caught.value


def cached(cache: Path, name: str = "someone/tiny", revision: str = "main") -> Path:
    """A snapshot as the Hub's client leaves it: links into blobs, and the commit of the branch."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(write_hf(cache.parent / "made", tiny_model(), shards=2).iterdir())):
        file.rename(repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    (repository / "refs").mkdir()
    (repository / "refs" / revision).write_text(COMMIT)
    return snapshot


# -- folders -------------------------------------------------------------------------------------------------


def test_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(tmp_path) == resolve(str(tmp_path)) == tmp_path
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == Path("org/name")  # a folder that is there wins over the Hub
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/org") == tmp_path / "org"
    with pytest.raises(WorkbenchError, match="no revisions"):
        resolve(tmp_path, revision="main")


@pytest.mark.parametrize("name", ["nowhere", "./org/name", "../x", "/no/such/folder", "a/b/c", "~/nowhere",
                                  "org/", Path("org/name"), "a\\b"])
def test_path_that_is_not_there(name: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    error = refusal(name)
    assert error.problem == "there is no such folder"
    assert error.where is not None and Path(error.where).is_absolute()
    assert error.where.endswith(Path(name).name)


def test_file_and_nothing(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    assert str(tmp_path) in str(refusal(tmp_path / "model.safetensors").hint)
    assert "empty" in refusal("").problem
    assert "empty" in refusal("  ").problem


@pytest.mark.parametrize("name", ["a--b/c", "org/name.git", "org/na me", "org/<script>", "org/x\0y",
                                  "-org/name", "org/" + "x" * 5000, "https://huggingface.co/openai/gpt-oss-20b"])
def test_bad_repository_name(name: str) -> None:
    error = refusal(name)
    assert "not the name of a repository" in error.problem and "org/name" in str(error.expected)


# -- no network ----------------------------------------------------------------------------------------------


def test_nobody_answers(cache: Path) -> None:
    start = time.monotonic()
    error = refusal("openai/gpt-oss-20b")
    assert time.monotonic() - start < PATIENT
    assert error.problem == "the Hub cannot be reached"
    assert "openai/gpt-oss-20b" in str(error.where) and str(cache) in str(error.got)
    for way_out in ("folder", "HF_HUB_OFFLINE", "wb.load()"):
        assert way_out in str(error.hint)


@pytest.fixture
def silent_endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A listener whose queue is full, so that connecting to it waits."""
    from huggingface_hub import constants

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        waiting = []
        for _ in range(4):
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(address)
            waiting.append(client)
        url = f"http://127.0.0.1:{address[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        yield url
        for client in waiting:
            client.close()


def test_endpoint_that_keeps_silent(silent_endpoint: str) -> None:
    start = time.monotonic()
    assert refusal("openai/gpt-oss-20b").problem == "the Hub cannot be reached"
    assert time.monotonic() - start < PATIENT


def test_name_lookup_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Event()

    def wait(*args: object, **options: object) -> None:
        done.wait(60)
        raise OSError("no such host")

    monkeypatch.setattr(socket, "create_connection", wait)
    start = time.monotonic()
    assert refusal("openai/gpt-oss-20b").problem == "the Hub cannot be reached"
    assert time.monotonic() - start < PATIENT
    done.set()


def test_a_proxy_is_asked_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as proxy:
        proxy.bind(("127.0.0.1", 0))
        proxy.listen(1)
        monkeypatch.setenv("https_proxy", f"127.0.0.1:{proxy.getsockname()[1]}")
        assert hub._answers("https://hub.invalid")
    assert not hub._answers("https://hub.invalid")
    assert not hub._answers("nonsense")


def test_cached_copy_without_a_network(cache: Path) -> None:
    snapshot = cached(cache)
    for revision in (None, "main", COMMIT):
        folder = resolve("someone/tiny", revision=revision)
        assert folder.resolve() == snapshot.resolve()
    config, _ = read_checkpoint(folder)
    assert config.hidden_size == 64
    assert "revision other" in str(refusal("someone/tiny", revision="other").where)


def test_cached_copy_without_a_tokenizer_counts_as_complete(cache: Path) -> None:
    """The client's list of the repository's files names more than we need."""
    snapshot = cached(cache)
    trees = pytest.importorskip("huggingface_hub._tree_cache")
    names = [path.name for path in snapshot.iterdir()] + ["tokenizer.json", "original/model.safetensors"]
    listing = {name: trees.TreeCacheEntry(size=1, blob_id="0" * 40) for name in names}
    trees.write_tree_cache(str(snapshot.parents[1]), COMMIT, listing)
    assert resolve("someone/tiny").resolve() == snapshot.resolve()
    (snapshot / "config.json").unlink()
    assert "only a part of it" in str(refusal("someone/tiny").got)


def test_refs_missing(cache: Path) -> None:
    """The files are there, but nothing says which commit the branch is: say which there are."""
    snapshot = cached(cache)
    (snapshot.parents[1] / "refs" / "main").unlink()
    error = refusal("someone/tiny")
    assert "which commit main is" in error.problem and "someone/tiny" in str(error.where)
    assert "refs/main" in str(error.expected) and COMMIT in str(error.got)
    assert "hf download someone/tiny" in str(error.hint)
    assert resolve("someone/tiny", revision=COMMIT).resolve() == snapshot.resolve()


def test_branch_that_moved(cache: Path) -> None:
    """Each load has the folder of its own commit; the earlier one stays in reach."""
    first = cached(cache)
    later = first.with_name("f" * 40)
    shutil.copytree(first, later, symlinks=True)
    assert resolve("someone/tiny").resolve() == first.resolve()
    (first.parents[1] / "refs" / "main").write_text(later.name)
    assert resolve("someone/tiny").resolve() == later.resolve()
    assert resolve("someone/tiny", revision=COMMIT).resolve() == first.resolve()


def test_offline_mode_asks_nobody(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub, "_answers", lambda endpoint: pytest.fail("the endpoint was asked"))
    error = refusal("someone/tiny")
    assert "HF_HUB_OFFLINE is set" in error.problem and "unset" in str(error.hint)
    snapshot = cached(cache)
    assert resolve("someone/tiny").resolve() == snapshot.resolve()


# -- a hub that answers --------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """Let the endpoint answer, and note what the client is asked for."""
    import huggingface_hub

    calls: list[dict[str, Any]] = []

    def snapshot(name: str, **options: Any) -> str:
        calls.append({"name": name, **options})
        return str(tmp_path)

    monkeypatch.setattr(hub, "_answers", lambda endpoint: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return calls


def test_only_what_is_needed_is_downloaded(asked: list[dict[str, Any]], tmp_path: Path) -> None:
    from huggingface_hub.utils import filter_repo_objects

    assert resolve("openai/gpt-oss-20b", revision="main") == tmp_path
    (call,) = asked
    assert (call["name"], call["revision"], call["local_files_only"]) == ("openai/gpt-oss-20b", "main", False)
    wanted = ["config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
              "model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors"]
    others = ["original/model.safetensors", "original/config.json", "metal/model.bin", "pytorch_model.bin",
              "README.md", "modeling.py", "original/model.safetensors.index.json"]
    kept = filter_repo_objects(wanted + others, allow_patterns=call["allow_patterns"],
                               ignore_patterns=call["ignore_patterns"])
    assert list(kept) == wanted


def http_error(kind: str, status: int) -> Exception:
    from huggingface_hub import errors

    httpx = pytest.importorskip("httpx")
    response = httpx.Response(status, request=httpx.Request("GET", "https://hub.invalid"))
    return getattr(errors, kind)("told by hf_abcdefghijklmnop\nmore", response=response)


@pytest.mark.parametrize(("kind", "status", "problem", "hint"), [
    ("GatedRepoError", 403, "must be asked for", "hf auth login"),
    ("RepositoryNotFoundError", 401, "no such repository", "check the spelling"),
    ("RevisionNotFoundError", 404, "no such revision", "branch, a tag"),
    ("HfHubHTTPError", 503, "download failed", "try again"),
])
def test_answers_other_than_files(kind: str, status: int, problem: str, hint: str,
                                  monkeypatch: pytest.MonkeyPatch, asked: list[dict[str, Any]]) -> None:
    import huggingface_hub

    def fail(name: str, **options: Any) -> str:
        raise http_error(kind, status)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    error = refusal("someone/tiny", revision="v1")
    assert problem in error.problem and hint in str(error.hint)
    assert "someone/tiny" in str(error.where)
    assert "hf_abcdefgh" not in str(error)


def test_full_disk(cache: Path, monkeypatch: pytest.MonkeyPatch, asked: list[dict[str, Any]]) -> None:
    import huggingface_hub

    def fail(name: str, **options: Any) -> str:
        raise OSError(28, "No space left on device")

    def information(api: Any, name: str, **options: Any) -> Any:
        files = {"config.json": 2000, "model-00000-of-00001.safetensors": 13_800_000_000, "README.md": 10**10,
                 "original/model.safetensors": 13_700_000_000}
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, size=files[name]) for name in files])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", information)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2_500_000_000))
    error = refusal("someone/tiny")
    assert error.problem == "the disk is full" and str(cache) in str(error.where)
    assert error.expected == "13.8 GB for it" and error.got == "2.5 GB free" and "HF_HOME" in str(error.hint)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    assert refusal("someone/tiny").expected == "more for it"


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_read_only_cache(code: int, cache: Path, monkeypatch: pytest.MonkeyPatch, asked: list[dict[str, Any]]) -> None:
    import huggingface_hub

    def fail(name: str, **options: Any) -> str:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    error = refusal("someone/tiny")
    assert error.problem == "the cache of the Hub cannot be written" and error.where == str(cache)
    assert os.strerror(code) in str(error.got) and "someone/tiny" in str(error.got) and "HF_HOME" in str(error.hint)


def test_the_client_is_imported_only_when_asked(tmp_path: Path) -> None:
    code = ("import sys; from gptoss_workbench.model.hub import resolve; resolve(sys.argv[1]); "
            "assert 'huggingface_hub' not in sys.modules and 'torch' not in sys.modules")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
