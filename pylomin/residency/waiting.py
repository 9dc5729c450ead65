"""Waiting for what other threads do, so that an interrupt leaves nothing locked."""

from __future__ import annotations

import threading
import time

RECHECK_S = 0.05  # views die without telling anyone, so who waits looks again


class Waiter:
    """One thread that waits for a change. Not a Condition, whose wait an interrupt can leave without its lock."""

    __slots__ = ("_lock", "hopeless", "started")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.hopeless = 0  # times it was found that nobody could free the memory it waits for
        self.started = time.perf_counter()

    def enlist(self, waiters: list[Waiter]) -> None:
        """Under the residency's lock: be woken by the next change."""
        self._lock.acquire(blocking=False)
        waiters.append(self)

    def wait(self) -> None:
        """Outside of the residency's lock."""
        self._lock.acquire(timeout=RECHECK_S)

    def wake(self) -> None:
        if self._lock.locked():
            self._lock.release()
