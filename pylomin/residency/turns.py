"""Workers that run one at a time, and hand over where one needs weights that are not in memory.

So weights are loaded once for all who need them. Of the workers, those run first that can use what is in memory; only
when nobody can, the group is loaded that most wait for. Whoever waits for a group keeps it from leaving, by the hold
that he waits in. While workers use one group, the next is read, if there is room: not one that is predicted, but the
one that the first of them has come to. Until nobody can go on without it, it counts as not there; else who comes to it
would run ahead of the others, and they could not compute while the one after it is read.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from pylomin.residency import loading
from pylomin.residency.places import Places
from pylomin.residency.prefetcher import FORK_CHECK_S, SMALL_GROUP_BYTES, Prefetcher
from pylomin.residency.weight import State, Weight

if TYPE_CHECKING:
    from pylomin.residency.run_reads import RunReads

Runs = tuple[tuple[int, int], ...]
Key = tuple[Any, ...]


class Ended(BaseException):
    """Raised in a worker that is to end where it waits. No Exception: what workers run may handle those."""


class Worker:
    """One thread that runs when it is told to.

    Args:
        work: all that it has to do; what it returns or raises is nobody's business here.
        switched_in, switched_out: called in its thread after and before others run.
    """

    def __init__(
        self,
        work: Callable[[], None],
        *,
        switched_in: Callable[[], None] = lambda: None,
        switched_out: Callable[[], None] = lambda: None,
    ) -> None:
        self.work, self.switched_in, self.switched_out = work, switched_in, switched_out
        self._turn = threading.Lock()
        self._turn.acquire()

    def wait(self) -> None:
        self._turn.acquire()

    def wake(self) -> None:
        self._turn.release()


class Group:
    """Weights that a hold needs together."""

    def __init__(self, residency: RunReads, weights: Sequence[Weight]) -> None:
        self.residency = residency
        self.weights = [weight for weight in weights if weight.state is not State.RESIDENT]
        self.key: Key = tuple([weight.index for weight in self.weights])

    def is_there(self) -> bool:
        return all(weight.state is State.RESIDENT for weight in self.weights)

    def places(self) -> Places | None:
        """Of what has to be read; None where nothing can be begun now."""
        if any(weight.state is not State.OFFLOADED or weight.error is not None for weight in self.weights):
            return None
        return self.residency.places_of(self.weights)

    def started(self) -> None:
        self.residency.load_started(self.weights, in_background=True)

    def finished(self, room: loading.Room, tensors: Sequence[torch.Tensor], read_s: float) -> None:
        self.residency.load_finished(self.weights, room, tensors, read_s)

    def failed(self, error: BaseException | None) -> None:
        for weight in self.weights:
            weight.error = error
        self.residency.load_failed(self.weights)


class Run:
    """A run of elements of one weight, which several workers use as it is."""

    def __init__(self, residency: RunReads, weight: Weight, runs: Runs) -> None:
        self.residency, self.weights, self.runs = residency, [weight], runs
        self.key: Key = (weight.index, weight.writes, runs)
        self.values: torch.Tensor | None = None  # in the one that others share
        self.error: BaseException | None = None

    @staticmethod
    def is_worth_sharing(weight: Weight, runs: Sequence[tuple[int, int]]) -> bool:
        """Not some rows of a lookup, which are others for each input."""
        return sum([last - first for first, last in runs]) * weight.element_bytes >= SMALL_GROUP_BYTES

    def is_there(self) -> bool:
        return self.values is not None or self.error is not None

    def places(self) -> Places | None:
        return self.residency.places_of_runs(self.weights[0], self.runs)

    def started(self) -> None:
        """Nothing to mark: nobody else can come for it."""

    def finished(self, room: loading.Room, tensors: Sequence[torch.Tensor], read_s: float) -> None:
        self.residency.run_was_read(room.places, read_s)
        self.values = tensors[0]

    def failed(self, error: BaseException | None) -> None:
        self.error = error


Need = Group | Run


class Turns:
    """Whose turn it is. One for each call of ``lockstep``; everything is done by the worker whose turn it is.

    Args:
        most: workers that have begun and not finished, at one time.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._new: deque[Worker] = deque()
        self._begun: dict[int, Worker] = {}  # by thread
        self._paused: dict[Worker, Need] = {}  # longest first
        self._ahead: ReadAhead | None = None
        self._threads: list[threading.Thread] = []
        self._all_done = threading.Event()
        self._is_ending = False

    # -- from outside -----------------------------------------------------------------------------------------------

    def run(self, workers: Iterable[Worker]) -> None:
        """Run all, and wait for them. Whatever is raised here meanwhile ends them first."""
        self._new.extend(workers)
        if not self._new:
            return
        try:
            self._begin(self._new.popleft())
            while not self._all_done.wait(FORK_CHECK_S):
                pass
        finally:
            self.end()
            while alive := [thread for thread in self._threads if thread.is_alive()]:
                alive[0].join()

    def end(self) -> None:
        """No worker begins any more, and those that have begun end where they wait next. Does not wait for them."""
        self._is_ending = True

    # -- in the worker whose turn it is ------------------------------------------------------------------------------

    def here(self) -> Worker | None:
        """The worker that runs in this thread."""
        return self._begun.get(threading.get_ident())

    def pause(self, worker: Worker, need: Need) -> None:
        """Let others run; returns when ``need`` is there, or is to be loaded by this worker.

        Raises:
            Ended: all are to end.
        """
        self._check_ending()
        self._paused[worker] = need
        try:
            self._read_ahead(need)
            following = self._next()
            if following is not worker:
                worker.switched_out()
                self._hand_to(following)
                worker.wait()
                worker.switched_in()
        finally:
            self._paused.pop(worker, None)
        self._check_ending()

    def share(self, run: Run) -> torch.Tensor | None:
        """The values of a run that somebody has read, for a worker that has paused for it; None if it has to read."""
        others = [need for need in self._paused.values() if need.key == run.key and isinstance(need, Run)]
        values, error = run.values, run.error
        if values is not None or error is not None:
            for other in others[:1]:  # it goes from one to the next, and nobody keeps it
                other.values, other.error = values, None
        run.values = None
        if error is not None:
            raise error
        return values

    def give(self, run: Run, values: torch.Tensor) -> None:
        """``values`` were read by the worker whose turn it is; the next that waits for them may have them."""
        for need in self._paused.values():
            if isinstance(need, Run) and need.key == run.key:
                need.values = values
                return

    # -- whose turn it is --------------------------------------------------------------------------------------------

    def _next(self) -> Worker | None:
        """Who runs now; None when all have ended."""
        if self._is_ending:
            self._new.clear()
            return next(iter(self._paused), None)
        if self._new and len(self._begun) < self._most:
            return self._new.popleft()
        if (ready := self._ready()) is not None:
            return ready
        if self._ahead is not None:
            ahead, self._ahead = self._ahead, None
            ahead.deliver()
            return self._ready() or self._first_for(ahead.need.key)  # who is to raise what reading raised
        counts = Counter(need.key for need in self._paused.values())
        return None if not counts else self._first_for(max(counts, key=counts.__getitem__))

    def _ready(self) -> Worker | None:
        return next((worker for worker, need in self._paused.items() if need.is_there()), None)

    def _first_for(self, key: Key) -> Worker | None:
        return next((worker for worker, need in self._paused.items() if need.key == key), None)

    def _read_ahead(self, need: Need) -> None:
        """Begin to read what most will wait for, while others still use what is there."""
        if self._ahead is not None or need.residency.prefetcher is None or need.is_there():
            return
        counts = Counter(other.key for other in self._paused.values() if not other.is_there())
        to_come = len(self._paused) - counts.total() + len(self._new)  # most likely to the same as this one
        counts[need.key] += to_come
        if to_come and max(counts.values()) == counts[need.key]:
            self._ahead = ReadAhead.begin(need)

    def _hand_to(self, worker: Worker | None) -> None:
        if worker is None:
            self._all_done.set()
        elif worker in self._paused:
            worker.wake()
        else:
            self._begin(worker)

    def _begin(self, worker: Worker) -> None:
        thread = threading.Thread(target=self._work, args=(worker,), name="pylomin-lockstep", daemon=True)
        self._threads = [*(other for other in self._threads if other.is_alive()), thread]
        thread.start()

    def _work(self, worker: Worker) -> None:
        me = threading.get_ident()
        self._begun[me] = worker
        following: Worker | None = None
        try:
            worker.switched_in()
            worker.work()
        finally:
            del self._begun[me]
            try:
                worker.switched_out()
                following = self._next()
            finally:
                if following is None and self._ahead is not None:
                    self._ahead.deliver()
                    self._ahead = None
                self._hand_to(following)

    def _check_ending(self) -> None:
        if self._is_ending:
            raise Ended


class ReadAhead:
    """A need that is read in the background, and is there when it is delivered."""

    def __init__(self, need: Need, room: loading.Room) -> None:
        self.need = need
        self._room = room
        self._tensors: list[torch.Tensor] = []
        self._error: BaseException | None = None
        self._read_s = 0.0
        self._pid = os.getpid()
        self._done = threading.Event()

    @staticmethod
    def begin(need: Need) -> ReadAhead | None:
        """Start; None where nothing is read ahead, or there is no room now."""
        residency = need.residency
        with residency.lock:
            places = None if residency.reads_inline else need.places()
            reader = residency.prefetcher
            if places is None or reader is None or places.read_bytes < SMALL_GROUP_BYTES:
                return None
            residency.drop_ahead(())
            room = reader.reserve(residency, need.weights, places)
            if room is None:
                return None
            ahead = ReadAhead(need, room)
            need.started()
            reader.submit(ahead)
        return ahead

    def run(self) -> None:
        """In the reading thread."""
        started = time.perf_counter()
        try:
            self._tensors = self._room.load()
        except BaseException as error:  # for those who wait for it
            self._error = error.with_traceback(None)
        self._read_s = time.perf_counter() - started
        self._done.set()

    def deliver(self) -> None:
        """Wait for the bytes, and count them as in memory; or as failed, for the next who needs them to raise."""
        started = time.perf_counter()
        while not self._done.wait(FORK_CHECK_S):
            if os.getpid() != self._pid:
                return
        residency = self.need.residency
        residency.waited(time.perf_counter() - started)
        with residency.lock:
            if self._error is not None:
                self.need.failed(self._error)
            else:
                self.need.finished(self._room, self._tensors, self._read_s)
            self._tensors = []


class StepReader(Prefetcher):
    """Reads ahead what it is told to, and not what is predicted."""

    def schedule(self, residency: RunReads, *, after_tiles_of: Weight | None = None) -> None:
        """Nothing: see :class:`ReadAhead`."""

    def read_run(self, residency: RunReads, weight: Weight, run: tuple[int, int]) -> None:
        """Nothing: a worker that read for itself would read what others read, too."""
