"""Runs of the elements of a weight, for one use: rows that are looked up, tiles, pieces of what is copied."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import torch

from pylomin.residency import loading
from pylomin.residency.device_errors import SPARE_SHARE, capture_error
from pylomin.residency.places import Places
from pylomin.residency.rooms import Rooms
from pylomin.residency.turns import Group, Run, Turns
from pylomin.residency.waiting import Waiter
from pylomin.residency.weight import Weight


class RunReads(Rooms):
    """Reads runs, none of which stays."""

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

    def waited(self, seconds: float) -> None:
        """Of a forward, for a run that is read in the background."""
        with self.lock:
            self._stats.stall_s += seconds

    def read_on(self) -> None:
        """Under the lock: a background read has finished, and another can be begun."""
        if self._prefetcher is not None and self.retention.schedule is not None:
            self._prefetcher.schedule(self)

    def refuse_capture(self) -> None:
        """Raises TraceError where a CUDA graph is captured."""
        for carrier in self.carriers.values():
            if carrier.device.is_capturing():
                raise capture_error()


def _always() -> bool:
    return True
