"""Background reads: what is used next loads while what is used now computes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
        self.in_flight = 0
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pylomin-prefetch")

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
            room = loading.try_reserve(residency.pool, [loading.Piece(weight) for weight in missing])
            if room is None:
                return
            residency.load_started(missing, in_background=True)
            self.in_flight += 1
            self._submit(residency, missing, room)

    def _wanted(self, residency: Residency) -> dict[Key, list[Weight]]:
        wanted: dict[Key, list[Weight]] = {}
        for key in residency.trace.upcoming(LOOKAHEAD):
            weights = residency.weights_of(key)
            if sum(weight.nbytes for weight in weights) >= SMALL_GROUP_BYTES:
                wanted[key] = weights
                if len(wanted) == self.depth:
                    break
        return wanted

    def _submit(self, residency: Residency, weights: Sequence[Weight], room: loading.Room) -> None:
        abandon = partial(self._abandon, residency, weights)
        try:
            future = self._executor.submit(self._read, residency, weights, room)
        except RuntimeError:  # closed, or the interpreter is shutting down
            abandon()
            return
        future.add_done_callback(partial(_if_cancelled, abandon))

    def _read(self, residency: Residency, weights: Sequence[Weight], room: loading.Room) -> None:
        try:
            tensors = loading.load([loading.Piece(weight) for weight in weights], room)
        except BaseException as error:  # whatever a store raises: a forward may be waiting
            with residency.lock:
                self.in_flight -= 1
                for weight in weights:
                    weight.error = error.with_traceback(None)  # for the next use of it to raise
                residency.load_failed(weights)
            return
        with residency.lock:
            self.in_flight -= 1
            residency.load_finished(weights, tensors)

    def _abandon(self, residency: Residency, weights: Collection[Weight]) -> None:
        with residency.lock:
            self.in_flight -= 1
            residency.load_failed(weights)


def _if_cancelled(abandon: partial[None], future: Future[None]) -> None:
    if future.cancelled():
        abandon()
