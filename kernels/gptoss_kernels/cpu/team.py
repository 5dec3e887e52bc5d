"""Running a task on as many threads as torch uses, on torch's own threads where they can be had.

A second pool of threads would fight with torch's for the cores: OpenMP threads spin for a while after their work. So
the task is handed to the OpenMP library that torch has loaded. Where it has none, Python's threads do; a task runs
without the interpreter's lock.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

NAMES = ("libgomp", "libomp", "libiomp5")


def run(task: int, fields: int, items: int) -> None:
    """Call the function at address ``task`` with ``fields`` from every thread, and wait.

    Args:
        task: a function that takes items until none is left, so calling it more often does no harm.
        fields: the address it is called with.
        items: there is no use for more threads than this.
    """
    threads = min(torch.get_num_threads(), items)
    if threads <= 1:
        _function(task)(fields)
        return
    openmp = parallel()
    if openmp is not None:
        openmp(task, fields, threads, 0)
    else:
        pool = _pool(threads)
        for future in [pool.submit(_function(task), fields) for _ in range(threads)]:
            future.result()


def describe() -> str:
    """Whose threads these are."""
    return "torch's OpenMP threads" if parallel() is not None else "threads of Python"


@cache
def parallel() -> Callable[[int, int, int, int], None] | None:
    """``GOMP_parallel(function, argument, threads, flags)`` of torch's OpenMP library: GNU's, LLVM's or Intel's."""
    for path in _loaded():
        try:
            function = ctypes.CDLL(path).GOMP_parallel
        except (OSError, AttributeError):
            continue
        function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        function.restype = None
        return function
    return None


def _loaded() -> list[str]:
    """OpenMP libraries of this process, torch's first. Opening one that is loaded gives that one."""
    beside = sorted(Path(torch.__file__).parent.glob("lib/*omp*")) + \
        sorted(Path(torch.__file__).parent.parent.glob("torch.libs/*omp*"))
    found = [str(path) for path in beside if path.name.startswith(NAMES)]
    maps = Path("/proc/self/maps")
    if maps.exists():
        mapped = {line.split(maxsplit=5)[5].strip() for line in maps.read_text().splitlines() if line.count("/")}
        names = sorted(path for path in mapped if Path(path).name.startswith(NAMES))
        return [path for path in names if path in found] + [path for path in names if path not in found]
    return found


@cache
def _function(task: int) -> Callable[[int], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(task)


_lock = threading.Lock()
_pools: dict[int, ThreadPoolExecutor] = {}


def _pool(threads: int) -> ThreadPoolExecutor:
    with _lock:
        return _pools.setdefault(threads, ThreadPoolExecutor(threads, thread_name_prefix="gptoss-kernels"))
