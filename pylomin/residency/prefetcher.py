"""Background reads: what is used next loads while what is used now computes."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
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
    starts with the first read, and ends with :meth:`close`, with this object, and before the interpreter does.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth  # large groups to read ahead
        self._jobs: set[_Job] = set()  # submitted, and neither finished nor abandoned
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pylomin-prefetch")

    @property
    def in_flight(self) -> int:
        return len(self._jobs)

    def close(self) -> None:
        """Let the running read finish, abandon the others, end the thread. Not under the residency's lock."""
        self._executor.shutdown(wait=True, cancel_futures=True)

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
            room = loading.try_reserve(residency.pool, pieces)
            if room is None:
                return
            job = _Job(residency, missing, pieces, room)
            self._jobs.add(job)
            try:
                residency.load_started(missing, in_background=True)
                future = self._executor.submit(self._read, job)
                future.add_done_callback(partial(self._if_cancelled, job))
            except BaseException as error:
                self._abandon(job)
                if not isinstance(error, RuntimeError):  # closed, or the interpreter is shutting down
                    raise
                return

    def _wanted(self, residency: Residency) -> dict[Key, list[Weight]]:
        wanted: dict[Key, list[Weight]] = {}
        for key in residency.trace.upcoming(LOOKAHEAD):
            weights = residency.weights_of(key)
            if sum(weight.nbytes for weight in weights) >= SMALL_GROUP_BYTES:
                wanted[key] = weights
                if len(wanted) == self.depth:
                    break
        return wanted

    def _read(self, job: _Job) -> None:
        try:
            tensors = loading.load(job.pieces, job.room)
        except BaseException as error:  # whatever a store raises: a forward may be waiting
            with job.residency.lock:
                if job in self._jobs:
                    for weight in job.weights:
                        weight.error = error.with_traceback(None)  # for the next use of it to raise
                    self._abandon(job)
            return
        with job.residency.lock:
            if job in self._jobs:
                self._jobs.remove(job)
                job.residency.load_finished(job.weights, tensors)

    def _abandon(self, job: _Job) -> None:
        with job.residency.lock:
            self._jobs.discard(job)
            job.residency.load_failed(job.weights)

    def _if_cancelled(self, job: _Job, future: Future[None]) -> None:
        if future.cancelled():
            self._abandon(job)


@dataclass(eq=False, slots=True)
class _Job:
    """One background read."""

    residency: Residency
    weights: Sequence[Weight]
    pieces: Sequence[loading.Piece]
    room: loading.Room
