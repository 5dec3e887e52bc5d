"""The GPU script, as far as it can run without one: every line but those that only a GPU executes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def run(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-m", "tests.gpu.run", *arguments], cwd=repository, env=environment,
                          capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(repository: Path, tmp_path: Path) -> None:
    done = run(repository, "--results", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0 and "no NVIDIA GPU" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_dry_run_goes_through(repository: Path, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = run(repository, "--dry", "--models", "20b", "--results", str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "gpu_dry_run.json").read_text())
    assert found["dry"] is True and "passed" in found["specification"]
    one = found["models"]["20b"]
    assert {"expert_mixture", "attention", "project_qkv", "add_norm"} <= set(one["kernels_relative_l2"])
    assert {"hooks off", "steered", "residuals and router logits captured"} <= set(one["decode"])
    assert all("3 of 3 tokens" in text for text in one["recordings"].values())
    assert one["transformers"]["decode_tokens_per_s"] > 0
