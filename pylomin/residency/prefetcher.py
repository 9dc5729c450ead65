"""Background reads: what is used next loads while what is used now computes."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from queue import SimpleQueue
from typing import TYPE_CHECKING, Protocol

import torch

from pylomin.residency import loading
from pylomin.residency.places import Places
from pylomin.residency.replay import Replay
from pylomin.residency.trace import Key
from pylomin.residency.weight import Source, State, Weight

if TYPE_CHECKING:
    from pylomin.residency.run_reads import RunReads

SMALL_GROUP_BYTES = 256 << 10  # 256 KiB; reading so little inline is quicker than waking a thread for it
FORK_CHECK_S = 1.0  # who waits for the thread looks so often whether this is the process that has it
MOST_PLANNED = 8  # groups to read ahead by a plan, where its window has room; more gain nothing


class Job(Protocol):
    """What the reading thread does."""

    def run(self) -> None: ...


class Prefetcher:
    """One reader thread, and what it is given to read.

    It does not know the residency it works for, but while a read is under way; so it keeps no model alive. The thread
    starts with the first read, and ends with :meth:`close`, with this object, and before the interpreter does. It is
    our own and fed by a SimpleQueue because those of concurrent.futures can be left locked by a KeyboardInterrupt.

    Args:
        depth: large groups to read ahead; None: one, or where there is a plan as many as its window holds.
    """

    def __init__(self, depth: int | None) -> None:
        self.fixed_depth = depth
        self.depth = depth or 1
        self._jobs: set[Job] = set()  # begun, and neither finished nor abandoned
        self._place: tuple[Replay, int] | None = None  # in the plan, when reads were last begun
        self._in_use_bytes = 0  # then
        self._was_full = False  # there was no room then for all that was to be read
        self._queue: SimpleQueue[Job | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def in_flight(self) -> int:
        return len(self._jobs)

    def close(self) -> None:
        """Let the reads that were begun finish, end the thread. Not under the residency's lock."""
        if self._thread is not None:
            _end(self._queue, self._thread, os.getpid())

    def schedule(self, residency: RunReads, *, after_tiles_of: Weight | None = None) -> None:
        """Start reading what is used next. Under the residency's lock.

        Never takes memory from what is needed now: what finds no room is read when it is used.

        Args:
            after_tiles_of: what is used now; all its tiles are on their way.
        """
        if residency.reads_inline:
            return
        retention = residency.retention
        place = retention.place() if not residency.tiles_bytes else None  # tiles in use are not in it
        if place is not None and self._is_done(place, residency):
            return
        self._place, self._was_full = None, False
        wanted, tiled = self._wanted(residency, after_tiles_of is not None)
        # The next may be a small one; and tiles of what is used now are used soon.
        residency.drop_ahead([*wanted, *islice(retention.ahead(), 1), retention.now(), tiled])
        if tiled:
            residency.begin_tiles(tiled, after_tiles_of)
        for weights, tiles_bytes in wanted.values():
            if not self.read_group(residency, weights, tiles_bytes):
                self._was_full = True
                break
        if place is not None:
            self._place, self._in_use_bytes = place, residency.pool.in_use_bytes()

    def _is_done(self, place: tuple[Replay, int], residency: RunReads) -> bool:
        """Whether there is nothing to begin that could not be begun the last time: most uses are of residents."""
        if self._place is None or place[0] is not self._place[0]:
            return False
        steps = place[1] - self._place[1]
        # The next use of what streams wants one more, and makes no room; its release does.
        is_same = steps == 0 or (steps == 1 and self._was_full)
        return is_same and residency.pool.in_use_bytes() >= self._in_use_bytes

    def read_group(self, residency: RunReads, weights: Sequence[Weight], other_bytes: int = 0) -> bool:
        """Start reading what is missing of weights that are used together; False where it finds no room.

        Under the residency's lock.

        Args:
            other_bytes: to leave free beside them.
        """
        missing = [w for w in weights if w.state is State.OFFLOADED and w.error is None]
        if not missing:
            return True
        room = _reserve_ahead(residency, missing, residency.places_of(missing), other_bytes)
        if room is None:
            return False
        job = _Job(self._jobs, residency, missing, room)
        try:
            self._jobs.add(job)
            residency.load_started(missing, in_background=True)
            if room.places.is_pinned:
                job.run(reads_on=False)
            else:
                self.submit(job)
        except BaseException:
            job.abandon()
            raise
        return True

    def reserve(self, residency: RunReads, weights: Sequence[Weight], places: Places) -> loading.Room | None:
        """Memory for what :meth:`submit` is given to read; None where there is none now. Under the residency's lock."""
        return _reserve_ahead(residency, weights, places, residency.tiles_bytes)

    def submit(self, job: Job) -> None:
        """Run it in the reading thread."""
        self._start_thread()
        self._queue.put(job)

    def read_run(self, residency: RunReads, weight: Weight, run: tuple[int, int]) -> RunAhead | None:
        """Start reading one run of a weight for somebody who comes for it; None if it should not be read ahead.

        Under the residency's lock.
        """
        places = residency.places_of_runs(weight, [run])
        if residency.reads_inline or places.read_bytes < SMALL_GROUP_BYTES:
            return None
        room = _reserve_ahead(residency, [weight], places, 0)
        if room is None:
            return None
        ahead = RunAhead(self._jobs, residency, room)
        try:
            self._jobs.add(ahead)
            if places.is_pinned:
                ahead.run()
            else:
                self.submit(ahead)
        except BaseException:
            self._jobs.discard(ahead)
            raise
        return ahead

    def _wanted(self, residency: RunReads, last_tile: bool) -> tuple[dict[Key, tuple[list[Weight], int]], Key]:
        """What to read ahead of each group, with the bytes to leave free for tiles that are used until then.

        And the group of which tiles are to be read before all that; or none.
        """
        retention = residency.retention
        now = residency.weights_of(retention.now()) if residency.tiles_bytes and not last_tile else ()
        tiles_bytes = residency.tiles_bytes if any(weight.tiled for weight in now) else 0
        # A device copies in the order of requests: what is not requested ahead comes after all that is.
        least_bytes = 1 if residency.carriers else SMALL_GROUP_BYTES
        most = self.depth if retention.schedule is None else self.fixed_depth or MOST_PLANNED
        wanted: dict[Key, tuple[list[Weight], int]] = {}
        tiled: Key = ()
        for key in retention.ahead():
            group = residency.weights_of(key)
            weights = [weight for weight in group if not weight.tiled]
            if len(weights) < len(group):
                tiles_bytes = residency.tiles_bytes
                if not tiled and all(w.state is not State.OFFLOADED for before, _ in wanted.values() for w in before):
                    tiled = key
            nbytes = sum([weight.nbytes for weight in weights])
            if nbytes >= least_bytes:
                wanted.setdefault(key, (weights, tiles_bytes))
                most -= nbytes >= SMALL_GROUP_BYTES
                if most == 0:
                    break
        return wanted, tiled

    def _start_thread(self) -> None:
        if self._thread is None:
            thread = threading.Thread(target=_serve, args=(self._queue,), name="pylomin-prefetch", daemon=True)
            weakref.finalize(self, _end, self._queue, thread, os.getpid())
            thread.start()
            self._thread = thread


@dataclass(eq=False, slots=True)
class _Job:
    """One background read."""

    under_way: set[Job]  # of its prefetcher; this is in it until it has finished or was abandoned
    residency: RunReads
    weights: Sequence[Weight]
    room: loading.Room

    def run(self, *, reads_on: bool = True) -> None:
        started = time.perf_counter()
        try:
            tensors = self.room.load()
            if self.residency.is_recording:
                self.residency.finish(self.room)
        except torch.cuda.OutOfMemoryError:  # of what converting takes; who needs the weights tries again
            self.abandon()
            return
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
                self.residency.load_finished(self.weights, self.room, tensors, time.perf_counter() - started)
                tensors.clear()  # or this frame would keep them in memory
                if reads_on:
                    self.residency.read_on()

    def abandon(self) -> None:
        with self.residency.lock:
            self.under_way.discard(self)
            self.residency.load_failed(self.weights)


class RunAhead:
    """One run of a weight that is read in the background, for one caller."""

    def __init__(self, under_way: set[Job], residency: RunReads, room: loading.Room) -> None:
        self._under_way = under_way
        self._residency: RunReads | None = residency  # until it has been read; the residency may keep this object
        self._room = room
        self._pid = os.getpid()
        self._tensor: torch.Tensor | None = None
        self._error: BaseException | None = None
        self._done = threading.Lock()
        self._done.acquire()

    def run(self) -> None:
        residency, self._residency = self._residency, None
        assert residency is not None
        started, read_s = time.perf_counter(), None
        try:
            self._tensor = self._room.load()[0]
            read_s = time.perf_counter() - started
        except BaseException as error:  # for the caller
            self._error = error.with_traceback(None)
        finally:
            with residency.lock:
                self._under_way.discard(self)
                residency.run_ended(self._room.places, read_s)
            self._done.release()

    def values(self, residency: RunReads) -> torch.Tensor | None:
        """The elements, waited for; None where they have to be read again. Called once.

        So it is in a forked child, where nobody reads, and where the device had no memory left.

        Raises what the read raised.
        """
        started = time.perf_counter()
        while not self._done.acquire(timeout=FORK_CHECK_S):
            if os.getpid() != self._pid:
                return None
        residency.waited(time.perf_counter() - started)
        if isinstance(self._error, torch.cuda.OutOfMemoryError):  # of what converting takes; to be tried again
            return None
        if self._error is not None:
            raise self._error
        self._room.use()
        tensor, self._tensor = self._tensor, None
        return tensor


@dataclass(frozen=True, slots=True)
class TilesAhead:
    """The first tiles of a weight, begun before somebody asks for them."""

    index: int  # of the weight
    source: Source  # from which they are read: what is written to the weight goes elsewhere
    runs: tuple[tuple[int, int], ...]
    begun: list[RunAhead]

    def are_of(self, weight: Weight, runs: Sequence[tuple[int, int]]) -> bool:
        """Whether they are what ``weight`` is used by, if that begins with ``runs``."""
        is_same = self.index == weight.index and self.source is weight.source
        return is_same and self.runs == tuple(runs[: len(self.runs)])


def _reserve_ahead(
    residency: RunReads, weights: Sequence[Weight], places: Places, other_bytes: int
) -> loading.Room | None:
    """Memory for what is read ahead; None unless ``other_bytes`` stay free beside it."""
    room_bytes = residency.room_ahead_bytes()
    if room_bytes is not None and places.peak_bytes + other_bytes > room_bytes:
        return None
    try:
        return residency.try_reserve_ahead(weights, places)
    except (MemoryError, OSError):  # the system has none left; what runs now must not fail for that
        return None


def _serve(queue: SimpleQueue[Job | None]) -> None:
    while (job := queue.get()) is not None:
        job.run()
        del job  # or this thread would keep the model alive while it waits
    queue.put(None)  # for another thread: an interrupt may have come while the first was started


def _end(queue: SimpleQueue[Job | None], thread: threading.Thread, owner_pid: int) -> None:
    """Runs also in finalizers: in the thread itself, where the last reference was its own, and in forked children."""
    if os.getpid() == owner_pid:
        queue.put(None)
        if thread.is_alive() and thread is not threading.current_thread():
            thread.join()
