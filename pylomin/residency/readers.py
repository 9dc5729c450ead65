"""Several threads that read one weight, or several, at the same time."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from queue import SimpleQueue

Step = Callable[[], None]


class Readers:
    """Threads that help whoever reads. They start when they are first needed, and end with this object.

    One who reads does so itself, and never waits for help to begin: in a forked child, or where all helpers are busy,
    it does everything alone.

    Args:
        count: threads that read at one time, with the one that waits for it.
    """

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self._queue: SimpleQueue[_Reading | None] = SimpleQueue()
        self._is_started = False

    def run(self, steps: Iterator[Step], most: int, inside: Callable[[], AbstractContextManager[object]]) -> None:
        """Run all steps; each begins after the one before was taken from ``steps``.

        Args:
            steps: taken one at a time. To take one may mean to wait; a step itself waits for no other.
            most: how many there are.
            inside: what a helping thread does its steps in.

        Raises:
            What a step raised first. No step is under way afterwards, nor begins.
        """
        helpers = min(self.count, most) - 1
        if helpers <= 0:
            for step in steps:
                step()
            return
        reading = _Reading(steps, inside)
        self._start()
        for _ in range(helpers):
            self._queue.put(reading)
        try:
            reading.work()
        finally:
            reading.end()
        if reading.error is not None:
            raise reading.error

    def _start(self) -> None:
        if self._is_started:
            return
        self._is_started = True
        threads = [
            threading.Thread(target=_serve, args=(self._queue,), name="pylomin-reader", daemon=True)
            for _ in range(self.count - 1)
        ]
        weakref.finalize(self, _end, self._queue, threads, os.getpid())
        with contextlib.suppress(RuntimeError):  # the system has no more threads: fewer help
            for thread in threads:
                thread.start()


class _Reading:
    """What is read together."""

    def __init__(self, steps: Iterator[Step], inside: Callable[[], AbstractContextManager[object]]) -> None:
        self._steps = steps
        self._inside = inside
        self._order = threading.Lock()
        self._is_over = False
        self._helpers = 0  # that have begun
        self._done: SimpleQueue[None] = SimpleQueue()  # one for each helper that has finished
        self.error: BaseException | None = None

    def _next(self) -> Step | None:
        with self._order:
            step = None if self._is_over else next(self._steps, None)
            self._is_over = step is None
            return step

    def work(self) -> None:
        """Take steps while there are any."""
        try:
            while (step := self._next()) is not None:
                step()
                del step  # it has a slot
        except BaseException as error:
            with self._order:
                self._is_over = True
                self.error = self.error or error.with_traceback(None)

    def help(self) -> None:
        """In a thread of its own; without effect when all steps are taken."""
        with self._order:
            if self._is_over:
                return
            self._helpers += 1
        try:
            with self._inside():
                self.work()
        finally:
            self._done.put(None)

    def end(self) -> None:
        """Nobody begins a step any more; wait for those that were begun."""
        with self._order:
            self._is_over = True
        for _ in range(self._helpers):
            self._done.get()


def _serve(queue: SimpleQueue[_Reading | None]) -> None:
    while (reading := queue.get()) is not None:
        reading.help()
        del reading  # or this thread would keep what was read into


def _end(queue: SimpleQueue[_Reading | None], threads: list[threading.Thread], owner_pid: int) -> None:
    """Runs also in finalizers: in one of the threads, and in forked children."""
    if os.getpid() != owner_pid:
        return
    for _ in threads:
        queue.put(None)
    for thread in threads:
        if thread.is_alive() and thread is not threading.current_thread():
            thread.join()
