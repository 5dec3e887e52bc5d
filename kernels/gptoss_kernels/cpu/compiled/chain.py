"""Many tasks one after the other in one call: the threads meet between two of them without going back to Python."""

from __future__ import annotations

from typing import Any

import numpy as np

from gptoss_kernels.cpu.compiled.machine import address, call, raised, seen_now
from gptoss_kernels.cpu.compiled.tasks import FIELDS, at_number, function
from gptoss_kernels.cpu.compiled.values import carray

PATIENCE = 64
"""Looks at what the others do before a waiting thread offers its core to somebody else."""


def chained(_: int, keep: bool) -> Any:
    """A list of tasks with their fields. See ``recording.Chain``.

    A task is done when every thread that went in has come out: whoever comes out has found no item left. So it does not
    matter how many threads there are, nor when each comes.
    """
    @function(keep)
    def task(at):
        a = carray(at, (FIELDS,), np.int64)
        count, fields, inside, give_way, counter = a[2], a[4], a[5], a[6], at_number(a)
        tasks = carray(address(a[3]), (count,), np.int64)
        number = seen_now(counter)  # a thread that comes late leaves out what is done
        while number < count:
            here = inside + 8 * number
            raised(here, 1)
            call(tasks[number], fields + number * FIELDS * 8)
            raised(here, -1)
            looks = 0
            while seen_now(here) > 0:
                looks += 1
                if looks % PATIENCE == 0 and give_way != 0:
                    call(give_way, 0)
            number += 1
            a[0] = number
    return task
