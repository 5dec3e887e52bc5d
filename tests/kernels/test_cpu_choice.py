"""Which path is taken and why, what happens when one fails, and where compiled code is kept."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gptoss_kernels import cpu, reference
from gptoss_kernels.cpu import choice, paths, products
from tests.kernels.cpu_cases import check_experts, drawn, packed, some

pytest.importorskip("numba")


@pytest.fixture
def undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has computed nothing yet."""
    monkeypatch.setattr(choice, "_given_up", {})
    monkeypatch.setattr(choice, "_chosen", {})
    monkeypatch.setattr(choice, "_forced", None)
    monkeypatch.delenv(paths.ENVIRONMENT, raising=False)


def test_every_function_of_the_reference_with_its_signature() -> None:
    for name, function in inspect.getmembers(reference, inspect.isfunction):
        if function.__module__ == reference.__name__ and not name.startswith("_"):
            ours = inspect.signature(getattr(cpu, name))
            theirs = inspect.signature(function)
            assert [(p.name, p.default) for p in ours.parameters.values()] == \
                [(p.name, p.default) for p in theirs.parameters.values()], name
    assert cpu.name == "cpu"
    assert cpu.missing(torch.device("cpu"), torch.bfloat16) is None
    assert "float64" in str(cpu.missing(torch.device("cpu"), torch.float64))
    assert "cuda" in str(cpu.missing(torch.device("cuda"), torch.bfloat16))


def test_importing_brings_no_compiler() -> None:
    program = "import sys, gptoss_kernels.cpu as cpu; cpu.describe(); print('numba' in sys.modules)"
    assert _run(program).split()[-1] == "False"


def test_what_describe_says() -> None:
    with choice.forced("portable"):
        cpu.expert_linear(drawn(1, 32), torch.zeros(1, 1, dtype=torch.int64), packed(1, 2, 32), drawn(1, 2))
        lines = dict(line.split(": ", 1) for line in cpu.describe().splitlines())
    assert lines["portable"].endswith("in use for float32")
    assert lines["threads"].startswith(str(torch.get_num_threads()))
    assert set(lines) == {"processor", *paths.PATHS, "torch", "threads", "compiled code"}


def test_a_path_that_computes_wrongly_is_given_up_loudly(undecided: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = products.expert_rows

    def wrong(x: Tensor, *args: object) -> None:
        right(x * 1.01, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(products, "expert_rows", wrong)
    with pytest.warns(RuntimeWarning, match="times what is allowed"):
        assert choice.chosen(torch.float32) is None  # no kernel is right, so torch computes
    assert "given up" in cpu.describe()
    weight, bias, x = packed(2, 8, 64), drawn(2, 8), drawn(3, 64)
    check_experts(x, some(3, 2, 2), weight, bias)
    with pytest.raises(RuntimeError, match="fails its test"), choice.forced("portable"):
        choice.chosen(torch.float32)


def test_a_path_that_does_not_compile_is_given_up_loudly(undecided: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(kind: str, way: int) -> int:
        raise OSError("no compiler")

    monkeypatch.setattr(products, "task", broken)
    with pytest.warns(RuntimeWarning, match="OSError: no compiler"):
        assert choice.chosen(torch.bfloat16) is None


def test_naming_a_path(undecided: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(paths.ENVIRONMENT, "portable")
    assert choice.chosen(torch.float32).path.name == "portable"
    monkeypatch.setattr(choice, "_chosen", {})
    monkeypatch.setenv(paths.ENVIRONMENT, "sse")
    with pytest.raises(RuntimeError, match="expected one of avx512_bf16, avx2, portable, torch"):
        choice.chosen(torch.float32)
    with pytest.raises(RuntimeError, match="no path"), choice.forced("sse"):
        pass
    monkeypatch.setattr(paths, "features", frozenset)
    with pytest.raises(RuntimeError, match="the processor lacks avx2"), choice.forced("avx2"):
        pass


def test_without_numba(undecided: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found missing, not tried: no warning, and the same results from torch."""
    monkeypatch.setattr(paths, "_numba", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.float32, torch.bfloat16):
            assert choice.chosen(dtype) is None
            check_experts(drawn(20, 64, dtype=dtype), some(20, 2, 4), packed(4, 30, 64), drawn(4, 30, dtype=dtype))
    assert "numba is not installed" in cpu.describe()


# in processes of their own ---------------------------------------------------------------------------------------


def _run(program: str, **environment: str) -> str:
    root = Path(__file__).parents[2]
    kernels = os.pathsep.join((str(root / "kernels"), str(root)))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": kernels, **environment})
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"
    return done.stdout


EDGE = """
import ctypes, mmap, torch
from gptoss_kernels import cpu
from gptoss_kernels.cpu import choice, paths
from gptoss_kernels.mxfp4 import Mxfp4Tensor

def at_the_edge(tensor):
    '''A copy whose last byte is the last before a page that must not be read.'''
    pages = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(base + pages), mmap.PAGESIZE, 0) == 0
    kept.append(memory)
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages - tensor.nbytes)
    return flat.copy_(tensor.flatten()).view(tensor.shape)

kept = []
for name in (*paths.PATHS, "torch"):
    if paths.why_not(name):
        continue
    with choice.forced(name):
        for rows, length in ((1, 32), (3, 64), (5, 96), (2, 160)):
            weight = Mxfp4Tensor(at_the_edge(torch.randint(0, 256, (2, rows, length // 32, 16), dtype=torch.uint8)),
                                 at_the_edge(torch.randint(120, 125, (2, rows, length // 32), dtype=torch.uint8)))
            for dtype in (torch.float32, torch.bfloat16):
                bias = at_the_edge(torch.randn(2, rows).to(dtype))
                for tokens in (1, 9):
                    x = at_the_edge(torch.randn(tokens, length).to(dtype))
                    chosen = at_the_edge(torch.ones(tokens, 1, dtype=torch.int64))
                    cpu.expert_linear(x, chosen, weight, bias)
                    cpu.linear(x, at_the_edge(torch.randn(rows, length).to(dtype)), bias[0])
    print(name, "read nothing outside")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="protects a page with Linux's mprotect")
def test_nothing_is_read_outside() -> None:
    """Every input ends where a page begins that kills the process when it is read."""
    assert "torch read nothing outside" in _run(EDGE)


KEEP = """
import os, torch
from gptoss_kernels.cpu import codecache, products
x = torch.arange(64.0).view(1, 64)
print(products.prepare(x, products.FLOATS).view(torch.float32)[0, :2].tolist())
folder = codecache.folder()
files = sorted((file.name, file.stat().st_mtime_ns) for file in folder.rglob("*.nb*")) if folder else []
print(folder, files)
"""


def test_compiled_code_is_kept_for_the_next_process(tmp_path: Path) -> None:
    first, second = (_run(KEEP, XDG_CACHE_HOME=str(tmp_path), LOCALAPPDATA=str(tmp_path), NUMBA_CACHE_DIR="")
                     for _ in range(2))
    assert first == second and "[0.0, 2.0]" in first
    assert str(tmp_path / "gptoss-workbench" / "kernels-") in first and ".nbc" in first


def test_an_installation_and_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    """A file where a folder should be can't be written by anybody, root included."""
    nowhere = tmp_path / "file"
    nowhere.write_text("")
    lost = {"XDG_CACHE_HOME": str(nowhere), "LOCALAPPDATA": str(nowhere), "NUMBA_CACHE_DIR": str(nowhere)}
    spare = tmp_path / "spare"
    spare.mkdir()
    assert str(spare) in _run(KEEP, TMPDIR=str(spare), TEMP=str(spare), **lost)
    program = f"import tempfile; tempfile.gettempdir = lambda: {str(nowhere)!r}\n" + KEEP
    assert "None []" in _run(program, **lost)
