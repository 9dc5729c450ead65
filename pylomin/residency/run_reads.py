"""Runs of the elements of a weight, for one use: rows that are looked up, tiles, pieces of what is copied."""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch

from pylomin.residency import loading
from pylomin.residency.device_errors import SPARE_SHARE, capture_error
from pylomin.residency.places import Places
from pylomin.residency.prefetcher import RunAhead, TilesAhead
from pylomin.residency.rooms import Rooms
from pylomin.residency.tiling import runs_of_tiles
from pylomin.residency.trace import Key
from pylomin.residency.turns import Group, Run, Turns
from pylomin.residency.waiting import Waiter
from pylomin.residency.weight import Weight, used_from

RUNS_AHEAD = 2  # of one weight: with one the disk waits while what was read is taken and the next is asked for


class RunReads(Rooms):
    """Reads runs, none of which stays."""

    @abstractmethod
    def hold(self, weights: Sequence[Weight], group: Sequence[Weight] | None = None) -> AbstractContextManager[None]:
        """``with residency.hold(weights):`` they are resident inside the block."""

    def load_runs(self, weight: Weight, runs: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Runs ``(first, last exclusive)`` of elements, counted as they lie in memory, in one 1-D tensor."""
        if weight.parts and self.keeps_all:  # the packed bytes stay, and only what is needed is decoded
            with self.hold(weight.parts):
                return self._load_runs(weight, runs)
        return self._load_runs(weight, runs)

    def stream_runs(self, weight: Weight, runs: Sequence[tuple[int, int]]) -> Iterator[torch.Tensor]:
        """Each run (first, last exclusive) of elements in turn, as a 1-D tensor; drop it before asking for the next.

        Where prefetching is on and there is room, the next runs are read while this one is used, and after the last of
        them what is used after this weight.
        """
        with self.lock:
            ahead, self._tiles_ahead = deque(self._begun(weight, runs)), None
        for i, run in enumerate(runs):
            values = ahead.popleft().values(self) if ahead else None
            if values is None:
                values = self.load_runs(weight, [run])
            with self.lock:
                ahead += self._read_ahead(weight, runs[i + 1 + len(ahead) : i + 1 + RUNS_AHEAD])
                if i + 1 + len(ahead) == len(runs):
                    self._read_after(weight)
            yield values
            del values

    def _begun(self, weight: Weight, runs: Sequence[tuple[int, int]]) -> list[RunAhead]:
        tiles = self._tiles_ahead
        return tiles.begun if tiles is not None and tiles.are_of(weight, runs) else []

    def _read_ahead(self, weight: Weight, runs: Sequence[tuple[int, int]]) -> list[RunAhead]:
        begun: list[RunAhead] = []
        prefetcher = self._prefetcher
        if prefetcher is None:
            return begun
        for run in runs:
            ahead = prefetcher.read_run(self, weight, run)
            if ahead is None:
                break
            begun.append(ahead)
        return begun

    def _read_after(self, weight: Weight) -> None:
        """Under the lock: all tiles of ``weight`` are on their way; begin what is used next."""
        now = self.retention.now()
        if self.turns is None and any(part.index in now for part in used_from([weight])):
            self.read_on(after_tiles_of=weight)

    def begin_tiles(self, key: Key, after: Weight | None) -> None:
        """Under the lock: begin the first tiles of a group, unless there are tiles of what is used before it to read.

        Args:
            after: of which all tiles are on their way.
        """
        is_busy = after is None and any(weight.tiled for weight in self.weights_of(self.retention.now()))
        if is_busy or self._prefetcher is None or self.carriers:
            return
        group = self.weights_of(key)
        # What is packed may be decoded by tiles of the whole, or used as it is; so do those that follow each other.
        is_part = after is not None and after.is_part
        tiled = next((weight for weight in group if weight.tiled and weight.is_part == is_part), None)
        if tiled is not None:
            self._prefetcher.read_group(self, [weight for weight in group if not weight.tiled])  # needed before them
            runs = runs_of_tiles(tiled, self.memory_budget)[:RUNS_AHEAD]
            begun = self._begun(tiled, runs)
            begun += self._read_ahead(tiled, runs[len(begun) :])
            if begun:
                self._tiles_ahead = TilesAhead(tiled.index, tiled.source, tuple(runs[: len(begun)]), begun)

    def _load_runs(self, weight: Weight, runs: Sequence[tuple[int, int]]) -> torch.Tensor:
        turns = self.turns
        if turns is None or turns.here() is None or len(runs) > 1 or not Run.is_worth_sharing(weight, runs):
            return self._read_runs(weight, runs)
        run = Run(self, weight, tuple(runs))
        self._take_turns(turns, run)
        values = turns.share(run)
        if values is None:
            values = self._read_runs(weight, runs)
            turns.give(run, values)
        return values

    def _take_turns(self, turns: Turns, need: Group | Run) -> None:
        """In lockstep: let others run until ``need`` is there, or is to be loaded by this thread."""
        worker, me = turns.here(), threading.get_ident()
        if worker is None:  # another thread's forward
            return
        with self.lock:
            self._waiting[me] = _always  # who runs now need not wait for the memory that this thread holds
        try:
            turns.pause(worker, need)
        finally:
            with self.lock:
                self._waiting.pop(me, None)

    def _read_runs(self, weight: Weight, runs: Sequence[tuple[int, int]]) -> torch.Tensor:
        if self.carriers:
            self.refuse_capture()
        is_full = False
        while True:
            room = self._room_for_runs(weight, runs)
            started = time.perf_counter()
            try:
                values = room.load(urgent=True)[0]
            except torch.cuda.OutOfMemoryError as error:
                with self.lock:
                    used_bytes = self._make_room_on_device([weight], room.places, error, again=is_full)
                    self.lower_budget(used_bytes, share=SPARE_SHARE)
                is_full = True
                continue
            room.use()
            read_s = time.perf_counter() - started
            with self.lock:
                self.run_was_read(room.places, read_s)
                if room.places.read_bytes:
                    self._stats.stall_s += read_s
            return values

    def _room_for_runs(self, weight: Weight, runs: Sequence[tuple[int, int]]) -> loading.Room:
        me, waiter = threading.get_ident(), Waiter()
        while True:
            with self.lock:
                places = self.places_of_runs(weight, runs)
                room = self._find_room([weight], places, lambda: True, me, waiter)
                if room is not None:
                    self._stop_waiting(me, waiter)
                    return room
                waiter.enlist(self._waiters)
            waiter.wait()

    def run_was_read(self, places: Places, read_s: float) -> None:
        with self.lock:
            self._stats.loads += places.read_bytes > 0
            self._count_read(places.read_bytes, read_s)

    def run_ended(self, places: Places, read_s: float | None) -> None:
        """Under the lock: a background read has ended; None where it failed. Who waits for memory looks again."""
        if read_s is not None:
            self.run_was_read(places, read_s)
        self._wake()

    def waited(self, seconds: float) -> None:
        """Of a forward, for a run that is read in the background."""
        with self.lock:
            self._stats.stall_s += seconds

    def read_on(self, *, after_tiles_of: Weight | None = None) -> None:
        """Under the lock: a background read has finished, or the last tile of a weight was begun; begin another."""
        if self._prefetcher is not None and self.retention.schedule is not None:
            self._prefetcher.schedule(self, after_tiles_of=after_tiles_of)

    def refuse_capture(self) -> None:
        """Raises TraceError where a CUDA graph is captured."""
        for carrier in self.carriers.values():
            if carrier.device.is_capturing():
                raise capture_error()


def _always() -> bool:
    return True
