"""Which experts serve a token, with what weight, and which rows go to which expert: nothing is read back by Python."""

from __future__ import annotations

from typing import Any

import numpy as np

from gptoss_kernels.cpu.compiled.machine import address, take
from gptoss_kernels.cpu.compiled.tasks import FIELDS, at_number, function
from gptoss_kernels.cpu.compiled.values import WIDE, carray, exponential, load, store


def routed(way: int, keep: bool) -> Any:
    """The experts with the largest logits, or those given, and their weights. See ``routing.route``."""
    wide = way == WIDE

    @function(keep)
    def task(at):
        a = carray(at, (FIELDS,), np.int64)
        count, slots, choose = a[5], a[6], a[7]
        size = 4 if wide else 2
        order, share = np.empty(count, np.float32), np.empty(slots, np.float32)
        counter = at_number(a)
        while True:
            token = take(counter)
            if token >= a[1]:
                return
            logits = a[2] + token * count * size
            chosen = carray(address(a[3] + token * slots * 8), (slots,), np.int64)
            if choose:
                for i in range(count):
                    logit = load(wide, logits, i)
                    order[i] = np.float32(np.inf) if logit != logit else logit  # as torch ranks them
                for slot in range(slots):
                    best = -1
                    for i in range(count):
                        taken = False
                        for before in range(slot):
                            taken |= chosen[before] == i
                        if not taken and (best < 0 or order[i] > order[best]):
                            best = i
                    chosen[slot] = best
            highest = np.float32(-np.inf)
            for slot in range(slots):
                there = 0 <= chosen[slot] < count
                share[slot] = load(wide, logits, chosen[slot]) if there else np.float32(np.nan)
                highest = max(highest, share[slot])
            total = np.float32(0.0)
            for slot in range(slots):
                share[slot] = exponential(share[slot] - highest)
                total += share[slot]
            for slot in range(slots):
                store(wide, a[4] + token * slots * size, slot, share[slot] / total)
    return task


def grouped(_: int, keep: bool) -> Any:
    """Rows put together by the expert that they go to. See ``products.grouped``."""
    @function(keep)
    def task(at):
        a = carray(at, (FIELDS,), np.int64)
        places, count, per_row = a[5], a[6], a[7]
        if take(at_number(a)) > 0:
            return
        experts = carray(address(a[2]), (places,), np.int64)
        head = carray(address(a[3]), (2 + 3 * places,), np.int64)
        jobs = carray(address(a[4]), (places, 2), np.int64)
        head[0], head[1], done = 0, 0, 0
        for place in range(places):
            head[1] += experts[place] < 0 or experts[place] >= count
        last = -1
        while done < places - head[1]:
            expert = count
            for place in range(places):
                if last < experts[place] < expert:
                    expert = experts[place]
            group = 2 + 3 * head[0]
            head[group], head[group + 1] = expert, done
            for place in range(places):
                if experts[place] == expert:
                    jobs[done, 0], jobs[done, 1] = place // per_row, place
                    done += 1
            head[group + 2] = done
            head[0] += 1
            last = expert
    return task
