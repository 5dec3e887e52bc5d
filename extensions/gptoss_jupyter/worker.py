"""One thread that always does the newest piece of work, and none when there is nothing to do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any


class LatestWins:
    """Runs ``work(item)`` for the newest submitted item; items that were overtaken are never run.

    It starts at once when idle, then at most every ``interval`` seconds, and always runs the last item:
    somebody who types without pause still sees something move. The thread is started when needed and ends
    after ``linger`` seconds without work, so an object that is simply forgotten leaves no thread behind.

    Args:
        work: called in the thread with one item, one call at a time.
        on_error: called in the thread with what ``work`` raised.
        interval: least time between two starts, seconds.
        linger: how long an idle thread waits for more, seconds.
        name: the thread's name.
    """

    def __init__(
        self, work: Callable[[Any], None], on_error: Callable[[BaseException], None], *,
        interval: float = 0.05, linger: float = 1.0, name: str = "gptoss-worker",
    ) -> None:
        self._work, self._on_error = work, on_error
        self._interval, self._linger, self._name = interval, linger, name
        self._changed = threading.Condition()
        self._slot: list[Any] = []
        self._thread: threading.Thread | None = None
        self._busy = self._closed = False
        self._started_at = -1e9
        self.runs = 0

    def __repr__(self) -> str:
        return f"LatestWins({self._name!r})"

    @property
    def busy(self) -> bool:
        """Whether something runs or waits to be run."""
        with self._changed:
            return self._busy or bool(self._slot)

    def submit(self, item: Any = None) -> None:
        """Put the item in the slot, over whatever waited there. Returns at once; does nothing once closed."""
        with self._changed:
            if self._closed:
                return
            self._slot = [item]
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self, timeout: float | None = 30.0) -> bool:
        """Wait until nothing runs and nothing waits. False when that took longer than ``timeout`` seconds."""
        if threading.current_thread() is self._thread:
            return False  # asked from inside its own work: it will never be idle
        with self._changed:
            return self._changed.wait_for(lambda: not self._busy and not self._slot, timeout)

    def close(self, timeout: float = 10.0) -> bool:
        """Drop what waits, let what runs finish, end the thread. False if that took longer than ``timeout``."""
        with self._changed:
            self._closed, self._slot, thread = True, [], self._thread
            self._changed.notify_all()
        if thread is None or thread is threading.current_thread():
            return True
        thread.join(timeout)
        return not thread.is_alive()

    def _take(self) -> list[Any]:
        """Wait for an item until it is due; empty when the thread should end."""
        with self._changed:
            while True:
                if not self._changed.wait_for(lambda: self._slot or self._closed, self._linger) or self._closed:
                    self._thread = None
                    return []
                wait = self._started_at + self._interval - time.monotonic()
                if wait <= 0:
                    item, self._slot, self._busy = self._slot, [], True
                    self._started_at = time.monotonic()
                    return item
                self._changed.wait(wait)

    def _loop(self) -> None:
        while item := self._take():
            try:
                self._work(item[0])
            except BaseException as error:  # a thread must not die of its work, nor print about it
                self._on_error(error)
            finally:
                item.clear()
                with self._changed:
                    self._busy = False
                    self.runs += 1
                    self._changed.notify_all()
