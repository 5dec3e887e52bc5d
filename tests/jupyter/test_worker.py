"""The latest-wins worker: starts at once, never queues, always runs the last, leaves no thread behind."""

from __future__ import annotations

import threading
import time
from itertools import pairwise

import pytest

from gptoss_jupyter.worker import LatestWins


def fail(error: BaseException) -> None:
    pytest.fail(f"unexpected {error!r}")


def test_only_the_newest_waits():
    ran: list[int] = []
    gate, begun = threading.Event(), threading.Event()

    def work(item: int) -> None:
        begun.set()
        gate.wait(10)
        ran.append(item)

    worker = LatestWins(work, fail, interval=0.0)
    worker.submit(0)
    assert begun.wait(10)
    for item in range(1, 50):
        worker.submit(item)
    assert worker.busy and not worker.flush(0.01)
    gate.set()
    assert worker.flush(10) and ran == [0, 49]
    assert worker.close()


def test_it_starts_at_once_and_then_keeps_its_pace():
    times: list[float] = []
    worker = LatestWins(lambda _: times.append(time.monotonic()), fail, interval=0.1)
    begun = time.monotonic()
    while time.monotonic() - begun < 0.55:  # somebody who types without pause sees something move
        worker.submit()
        time.sleep(0.01)
    typed = time.monotonic()
    assert worker.flush(10)
    assert times[0] < typed and len(times) <= 1 + (times[-1] - times[0]) / 0.1 + 1
    assert min(b - a for a, b in pairwise(times)) > 0.09
    worker.close()


def test_an_error_goes_to_its_callback_and_work_goes_on(capsys):
    seen: list[BaseException] = []
    done: list[int] = []

    def work(item: int) -> None:
        if item < 0:
            raise ValueError(item)
        done.append(item)

    worker = LatestWins(work, seen.append, interval=0.0)
    for item in (-1, 2):
        worker.submit(item)
        assert worker.flush(10)
    assert [str(error) for error in seen] == ["-1"] and done == [2] and worker.runs == 2
    assert capsys.readouterr() == ("", "")
    worker.close()


def test_idle_threads_end_by_themselves_and_come_back():
    worker = LatestWins(lambda _: None, fail, linger=0.05, name="gptoss-test-idle")

    def alive() -> bool:
        return any(thread.name == "gptoss-test-idle" for thread in threading.enumerate())

    for _ in range(2):
        worker.submit()
        assert worker.flush(10) and alive()
        end = time.monotonic() + 10
        while alive() and time.monotonic() < end:
            time.sleep(0.02)
        assert not alive()
    worker.close()


def test_closed_means_closed():
    ran: list[int] = []
    worker = LatestWins(ran.append, fail, name="gptoss-test-closed")
    worker.submit(1)
    assert worker.flush(10) and worker.close()
    worker.submit(2)
    assert worker.flush(0.1) and ran == [1]
    assert not any(thread.name == "gptoss-test-closed" for thread in threading.enumerate())


def test_flush_from_inside_does_not_wait_for_itself():
    answers: list[bool] = []
    worker = LatestWins(lambda _: answers.append(worker.flush(5)), fail)
    worker.submit()
    assert worker.flush(10) and answers == [False]
    worker.close()
