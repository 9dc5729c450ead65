"""Background reads: what is used next loads while what is used now computes."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING

from pylomin.residency import loading
from pylomin.residency.trace import Key
from pylomin.residency.weight import State, Weight

if TYPE_CHECKING:
    from pylomin.residency.residency import Residency

SMALL_GROUP_BYTES = 256 << 10  # 256 KiB; reading so little inline is quicker than waking a thread for it
LOOKAHEAD = 8  # groups, small ones included, among which the ones to prefetch are looked for


class Prefetcher:
    """One reader thread, and what it is given to read.

    It does not know the residency it works for, but while a read is under way; so it keeps no model alive. The thread
    starts with the first read, and ends with :meth:`close`, with this object, and before the interpreter does. It is
    our own and fed by a SimpleQueue because those of concurrent.futures can be left locked by a KeyboardInterrupt.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth  # large groups to read ahead
        self._jobs: set[_Job] = set()  # given to the thread, and neither finished nor abandoned
        self._queue: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def in_flight(self) -> int:
        return len(self._jobs)

    def close(self) -> None:
        """Let the reads that were begun finish, end the thread. Not under the residency's lock."""
        if self._thread is not None:
            _end(self._queue, self._thread, os.getpid())

    def schedule(self, residency: Residency) -> None:
        """Start reading what the trace says comes next. Under the residency's lock.

        Never takes memory from what is needed now: what finds no room is read when it is used.
        """
        wanted = self._wanted(residency)
        residency.drop_unused(wanted)
        for weights in wanted.values():
            missing = [w for w in weights if w.state is State.OFFLOADED and w.error is None]
            if not missing:
                continue
            pieces = [loading.Piece.of(weight) for weight in missing]
            try:
                room = loading.try_reserve(residency.pool, pieces)
            except (MemoryError, OSError):  # the system has none left; what runs now must not fail for that
                return
            if room is None:
                return
            job = _Job(self._jobs, residency, missing, pieces, room)
            try:
                self._jobs.add(job)
                residency.load_started(missing, in_background=True)
                self._start_thread()
                self._queue.put(job)
            except BaseException:
                job.abandon()
                raise

    def _start_thread(self) -> None:
        if self._thread is None:
            thread = threading.Thread(target=_serve, args=(self._queue,), name="pylomin-prefetch", daemon=True)
            weakref.finalize(self, _end, self._queue, thread, os.getpid())
            thread.start()
            self._thread = thread

    def _wanted(self, residency: Residency) -> dict[Key, list[Weight]]:
        wanted: dict[Key, list[Weight]] = {}
        for key in residency.trace.upcoming(LOOKAHEAD):
            weights = residency.weights_of(key)
            if sum(weight.nbytes for weight in weights) >= SMALL_GROUP_BYTES:
                wanted[key] = weights
                if len(wanted) == self.depth:
                    break
        return wanted


@dataclass(eq=False, slots=True)
class _Job:
    """One background read."""

    under_way: set[_Job]  # of its prefetcher; this is in it until it has finished or was abandoned
    residency: Residency
    weights: Sequence[Weight]
    pieces: Sequence[loading.Piece]
    room: loading.Room

    def run(self) -> None:
        try:
            tensors = loading.load(self.pieces, self.room)
        except BaseException as error:  # whatever a store raises: a forward may be waiting
            with self.residency.lock:
                if self in self.under_way:
                    for weight in self.weights:
                        weight.error = error.with_traceback(None)  # for the next use of it to raise
                    self.abandon()
            return
        with self.residency.lock:
            if self in self.under_way:
                self.under_way.remove(self)
                self.residency.load_finished(self.weights, tensors)

    def abandon(self) -> None:
        with self.residency.lock:
            self.under_way.discard(self)
            self.residency.load_failed(self.weights)


def _serve(queue: SimpleQueue[_Job | None]) -> None:
    while (job := queue.get()) is not None:
        job.run()
        del job  # or this thread would keep the model alive while it waits
    queue.put(None)  # for another thread: an interrupt may have come while the first was started


def _end(queue: SimpleQueue[_Job | None], thread: threading.Thread, owner_pid: int) -> None:
    """Runs also in finalizers: in the thread itself, where the last reference was its own, and in forked children."""
    if os.getpid() == owner_pid:
        queue.put(None)
        if thread.is_alive() and thread is not threading.current_thread():
            thread.join()
