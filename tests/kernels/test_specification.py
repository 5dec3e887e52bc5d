"""Every implementation of the kernels against ``reference``: the files of ``specification``, run once for each.

Triton's kernels run in its interpreter here, which has to be chosen before triton is imported: so in a process of
their own. On a machine with a GPU ``make gpu`` runs the same files on it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = [str(Path(__file__).parent / "specification" / f"{name}.py") for name in ("rows", "experts", "attention")]
NEEDS = {"triton": "triton", "cpu": "torch"}


def run(kernels: str, markers: str, repository: Path) -> None:
    pytest.importorskip(NEEDS[kernels])
    environment = {**os.environ, "GPTOSS_TEST_KERNELS": kernels}
    if kernels == "triton":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", markers, *FILES]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("kernels", NEEDS)
def test_specification(kernels: str, repository: Path) -> None:
    run(kernels, "not slow", repository)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", NEEDS)
def test_specification_at_every_edge(kernels: str, repository: Path) -> None:
    run(kernels, "slow", repository)
