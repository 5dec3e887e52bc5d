"""Rows of activations to panels and back: the form in which ``tiles`` multiplies, tokens side by side.

torch would gather, widen, turn and copy one after the other, each time through memory: a fifth of reading a prompt.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gptoss_kernels.cpu.compiled.machine import address, take
from gptoss_kernels.cpu.compiled.tasks import FIELDS, at_number, function
from gptoss_kernels.cpu.compiled.tiles import TOKENS
from gptoss_kernels.cpu.compiled.values import carray, load, once, store


def panelled(_: int, keep: bool) -> Any:
    """Rows by their numbers, in panels of float32. See ``products.panels``."""
    @function(keep)
    def task(at):
        a = carray(at, (FIELDS,), np.int64)
        x, width, wide = a[2], a[5], a[6]
        counter = at_number(a)
        while True:
            panel = take(counter)
            if panel >= a[1]:
                return
            rows = carray(address(a[3] + panel * TOKENS * 8), (TOKENS,), np.int64)
            out = carray(address(a[4] + panel * TOKENS * width * 4), (width, TOKENS), np.float32)
            for token in range(TOKENS):
                start = rows[token] * width
                if start < 0:
                    for i in range(width):
                        out[i, token] = np.float32(0.0)
                else:
                    for i in range(width):
                        out[i, token] = load(wide, x, start + i)
    return task


def seated(_: int, keep: bool) -> Any:
    """Products in panels, plus the bias of the panel's matrix, back to the rows they belong to. See ``products.seat``.
    """
    @function(keep)
    def task(at):
        a = carray(at, (FIELDS,), np.int64)
        biases, out, height, wide, twice = a[5], a[6], a[7], a[8], a[9]
        counter = at_number(a)
        while True:
            panel = take(counter)
            if panel >= a[1]:
                return
            found = carray(address(a[2] + panel * height * TOKENS * 4), (height, TOKENS), np.float32)
            rows = carray(address(a[3] + panel * TOKENS * 8), (TOKENS,), np.int64)
            bias = carray(address(a[4]), (a[1],), np.int64)[panel] * height
            for token in range(TOKENS):
                start = rows[token] * height
                if start < 0:
                    continue
                for i in range(height):
                    product = once(wide, found[i, token]) if twice else found[i, token]
                    if biases != 0:
                        product += load(wide, biases, bias + i)
                    store(wide, out, start + i, product)
    return task
