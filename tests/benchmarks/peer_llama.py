"""One measurement of llama.cpp through its Python package, in a process of its own; prints JSON.

``python peer_llama.py FILE.gguf {decode|prefill} THREADS TOKENS``, with an interpreter that has ``llama_cpp``.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp  # type: ignore[import-not-found]  # where its benchmark runs

PROMPT = 8


def main(file: str, what: str, threads: int, tokens: int) -> dict[str, Any]:
    begun = time.perf_counter()
    model = llama_cpp.Llama(file, n_ctx=1024, n_batch=512, n_ubatch=512, n_threads=threads, n_threads_batch=threads,
                            verbose=False)
    loaded = time.perf_counter() - begun
    draw = random.Random(0)
    times = []

    def read(ids: list[int]) -> float:
        begun = time.perf_counter()
        model.eval(ids)
        return time.perf_counter() - begun

    if what == "decode":
        read([draw.randrange(199_000) for _ in range(PROMPT)])
        times = [read([draw.randrange(199_000)]) for _ in range(tokens)]
    else:
        for _ in range(2):
            model.reset()
            times.append(read([draw.randrange(199_000) for _ in range(tokens)]))
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]
    return {"version": llama_cpp.__version__, "times": {what: times}, "median": {what: statistics.median(times)},
            "loaded": loaded, "tokens": tokens, "threads": threads, "peak": peak}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
