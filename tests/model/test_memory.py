"""What loading takes, against what is allocated then; and what is free, against made-up systems."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptoss_workbench.model import memory
from gptoss_workbench.model.checkpoint import plan_checkpoint, read_weights
from gptoss_workbench.model.memory import Need, memory_need
from tests.factories import LAYOUTS, tiny_model


@pytest.mark.parametrize("layout", ["hf", "hf-bf16", "original-sharded", "compact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_need_is_what_the_weights_hold(layout: str, dtype: torch.dtype, tmp_path: Path) -> None:
    plan = plan_checkpoint(LAYOUTS[layout](tmp_path, tiny_model(seed=3)))
    weights = read_weights(plan, dtype)
    for mapped in (True, False):
        need = memory_need(plan, dtype, "cpu", mapped)
        layer = sum(plan.tensors[slot.name].nbytes for slot in plan.layout.layer(0, plan.sizes))
        assert need.allocated + need.mapped == weights.nbytes + (0 if mapped else layer)
        assert need.device == 0 and (need.mapped > 0) == mapped * (layout != "hf-bf16" or dtype == torch.bfloat16)
    there = memory_need(plan, dtype, "cuda", True)
    assert (there.device, there.mapped) == (weights.nbytes, 0)


def test_what_is_mapped_is_what_lies_in_the_file(tmp_path: Path) -> None:
    """The plan's number of mapped bytes, against the addresses of the tensors."""
    plan = plan_checkpoint(LAYOUTS["hf"](tmp_path, tiny_model(seed=3)))
    weights = read_weights(plan, torch.bfloat16)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs Linux")
    lines = [line for line in maps.read_text().splitlines() if line.endswith(str(plan.files[0]))]
    ranges = [tuple(int(edge, 16) for edge in line.split()[0].split("-")) for line in lines]
    parts = [part for _, tensor in weights.tensors()
             for part in ((tensor,) if isinstance(tensor, torch.Tensor) else (tensor.blocks, tensor.scales))]
    lying = sum(part.nbytes for part in parts if any(low <= part.data_ptr() < high for low, high in ranges))
    assert lying == memory_need(plan, torch.bfloat16).mapped


def test_numbers_for_a_person() -> None:
    assert str(Need(0, 13_761_264_768)) == "13.8 GB mapped from the files"
    assert str(Need(2_000_000, 0, 5 * 10**9)) == "5.0 GB on the device and 2.0 MB of memory"
    assert str(Need(0, 0)) == "nothing"


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_control_groups_version_2(tmp_path: Path) -> None:
    """A limit of any group above counts; what was cached and is idle counts as free."""
    top = "sys/fs/cgroup/"
    system(tmp_path, {
        "proc/self/cgroup": "0::/slice/job\n",
        f"{top}slice/job/memory.max": "max\n", f"{top}slice/job/memory.current": "5\n",
        f"{top}slice/memory.max": "1000\n", f"{top}slice/memory.current": "900\n",
        f"{top}slice/memory.stat": "anon 600\ninactive_file 250\nactive_file 50\n",
        f"{top}memory.current": "7\n",
    })
    assert list(memory._group_rooms(tmp_path)) == [350]


def test_control_groups_version_1(tmp_path: Path) -> None:
    top = "sys/fs/cgroup/memory/"
    system(tmp_path, {
        "proc/self/cgroup": "9:name=systemd:/\n4:memory:/job\n3:cpu,cpuacct:/job\n",
        f"{top}job/memory.limit_in_bytes": "4000\n", f"{top}job/memory.usage_in_bytes": "4500\n",
        f"{top}memory.limit_in_bytes": "9223372036854771712\n", f"{top}memory.usage_in_bytes": "1\n",
    })
    assert list(memory._group_rooms(tmp_path)) == [0]


def test_no_control_groups(tmp_path: Path) -> None:
    assert list(memory._group_rooms(tmp_path)) == []


def test_free_memory_against_psutil() -> None:
    psutil = pytest.importorskip("psutil")
    free = memory.available()
    assert 0 < free <= psutil.virtual_memory().total
    assert abs(memory._system_memory() - psutil.virtual_memory().available) < psutil.virtual_memory().total / 4


def test_address_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    plan = plan_checkpoint(LAYOUTS["hf"](tmp_path, tiny_model(seed=3)))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1000, 1000))
    with pytest.raises(memory.NotEnoughMemory, match="address space") as caught:
        memory.check_memory(plan, torch.bfloat16)
    assert "ulimit -v" in str(caught.value.hint)
