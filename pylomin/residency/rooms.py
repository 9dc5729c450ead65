"""Memory for what is loaded, and waiting for it; what was loaded, or was not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import torch

from pylomin.errors import BudgetError
from pylomin.io.sizes import format_bytes
from pylomin.residency import loading
from pylomin.residency.contents import Contents, Loaded
from pylomin.residency.device_errors import SPARE_SHARE, device_is_full
from pylomin.residency.mapped_room import MappedRoom
from pylomin.residency.places import Places
from pylomin.residency.waiting import Waiter
from pylomin.residency.weight import ResidentParameter, State, Weight, outside_inference_mode

MOST_MAPPED = 8192  # weights of a model whose mappings are kept; of 65,530 that Linux allows a process
GRACE = 2  # looks in vain before giving up: another thread may be just about to drop its last reference


class Rooms(Contents):
    """Finds room for loads, in the place of what is idle where it must, and changes the state of weights with them."""

    def __init__(self, memory_budget: int | None = None) -> None:
        super().__init__(memory_budget)
        self._holders: dict[int, int] = {}  # holds by thread
        # Threads that wait for memory, and whether they still need to.
        self._waiting: dict[int, Callable[[], bool]] = {}
        self._waiters: list[Waiter] = []
        self.choices: dict[str, str] = {}  # what was chosen, and why

    def set_budget(self, memory_budget: int | None) -> None:
        """Takes effect now: what is idle and no longer fits leaves."""
        with self.lock:
            while memory_budget is None or self.pool.in_use_bytes() > memory_budget:
                if not self._evict_one():
                    break
            self.pool.set_limit(memory_budget)
            self.choices.pop("budget", None)  # it was about another one
            self._places.clear()  # how much is mapped around a weight depends on whether there is a budget
            self._choose_reading()
            self._plan(self.retention.order)

    def _find_room(
        self,
        weights: Sequence[Weight],
        places: Places,
        needed: Callable[[], bool],
        thread_id: int,
        waiter: Waiter | None,
    ) -> loading.Room | None:
        """Memory for what is missing; None if the caller has to wait for it, as long as ``needed``."""
        is_full, used_bytes = False, 0  # by weights, when the device was full
        while True:
            room = self.reserve_in_window(weights, places) or loading.try_reserve(
                self.pool, places, drop_cache=self.reading.drop_cache, readers=self.readers
            )
            if room is not None:
                self._waiting.pop(thread_id, None)
                if used_bytes:
                    self.lower_budget(used_bytes, share=SPARE_SHARE)
                return room
            if self.pool.refusal is not None:
                used_bytes = self._make_room_on_device(weights, places, self.pool.refusal, again=is_full)
                is_full = True
                continue
            if not self._evict_one():
                break
        # Pages that are read or mapped whole take a little more than the bytes that are needed of them.
        exact = Places(places.pieces, "buffered")
        room = loading.try_reserve(self.pool, exact, drop_cache=self.reading.mode != "mapped", readers=self.readers)
        if room is not None:
            self._waiting.pop(thread_id, None)
            return room
        in_background = self._prefetcher is not None and self._prefetcher.in_flight
        if waiter is not None and not in_background and all(t == thread_id or self._waits(t) for t in self._holders):
            waiter.hopeless += 1
            if waiter.hopeless > GRACE:
                raise self._over_budget(weights, exact)
        self._waiting[thread_id] = needed
        return None

    def _make_room_on_device(
        self, weights: Sequence[Weight], places: Places, error: BaseException, *, again: bool
    ) -> int:
        """Under the lock; see :meth:`leave_device`. Raises DeviceMemoryError where that was not enough before."""
        if again:
            raise device_is_full(weights, places, self.pool.in_use_bytes(), self.memory_budget) from error
        return self.leave_device()

    def leave_device(self) -> int:
        """Whatever is not in use leaves, for a device has no memory left.

        Returns the bytes that weights had; 0 where that did not change.
        """
        with self.lock:
            used_bytes = self.pool.in_use_bytes()
            while self._evict_one():
                pass
            self.pool.trim()
            return used_bytes if self.pool.in_use_bytes() < used_bytes else 0

    def lower_budget(self, used_bytes: int, *, share: int) -> None:
        """With ``used_bytes`` (> 0) of weights a device was full: one part of so many is not for weights from now on.

        Or the next pass would come to the same point with the same weights in memory. What is in use stays so, and what
        is loaded whole now still is.
        """
        with self.lock:
            budget = self.memory_budget
            least_bytes = max(self.least_bytes, 2 * self._largest_bytes, self.pool.in_use_bytes())
            lower = max(least_bytes, used_bytes - used_bytes // share)
            if used_bytes and budget is not None and lower < budget:
                self.set_budget(lower)
                self.choices["budget"] = f"lowered from {format_bytes(budget)}, for the device had no memory left"

    def _over_budget(self, weights: Sequence[Weight], places: Places) -> BudgetError:
        largest = max(weights, key=lambda weight: weight.nbytes)
        needed_bytes = places.peak_bytes
        used_bytes, budget = self.pool.in_use_bytes(), self.memory_budget or 0
        return BudgetError(
            f"weight '{largest.name}' needs {format_bytes(needed_bytes)} of memory now, but memory_budget is {budget} "
            f"({format_bytes(budget)}), of which {format_bytes(used_bytes)} are in use by weights that a running "
            "forward holds or by tensors that outlive their use (an autograd graph, a saved reference, an exception's "
            f"traceback). Use memory_budget of at least {used_bytes + needed_bytes}, or run under torch.no_grad()."
        )

    def _waits(self, thread_id: int) -> bool:
        needed = self._waiting.get(thread_id)
        return needed is not None and needed()

    def _stop_waiting(self, thread_id: int, waiter: Waiter | None) -> None:
        self._waiting.pop(thread_id, None)
        if waiter is not None:
            self._stats.stall_s += time.perf_counter() - waiter.started

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.wake()

    def load_started(self, weights: Iterable[Weight], *, in_background: bool = False) -> None:
        self._stats.prefetched += in_background
        for weight in weights:
            weight.state = State.LOADING

    def load_finished(
        self, weights: Sequence[Weight], room: loading.Room, tensors: Sequence[torch.Tensor], read_s: float
    ) -> None:
        places = room.places
        loaded = Loaded(tuple([weight.index for weight in weights]), places.resident_bytes, bool(weights[0].parts))
        loaded.arrivals = room.arrivals
        if isinstance(room, MappedRoom):
            loaded.room = room
        elif room.mapped and len(self._weights) <= MOST_MAPPED:
            loaded.room = MappedRoom(room)
        self._in_memory[loaded] = None
        if not any(weight.holds for weight in weights):
            self._ahead[loaded] = None
        with torch._C._DisableFuncTorch(), outside_inference_mode():
            for weight, tensor in zip(weights, tensors, strict=True):
                weight.tensor = ResidentParameter.of(tensor)
                weight.loaded_version = weight.tensor._version
                weight.loaded = loaded
                weight.state = State.RESIDENT
        if loaded.is_unpacked:
            self._unpacked_bytes += loaded.nbytes
        else:
            self._largest_bytes = max(self._largest_bytes, places.peak_bytes)
        self._count_read(places.read_bytes, read_s)
        self._wake()

    def _count_read(self, nbytes: int, read_s: float) -> None:
        if nbytes:
            self._stats.bytes_read += nbytes
            self._stats.read_s += read_s
            if self._recording is not None:
                self._recording.read(nbytes, read_s)

    def load_failed(self, weights: Iterable[Weight]) -> None:
        for weight in weights:
            if weight.state is State.LOADING:
                weight.tensor = weight.twin = weight.loaded = None
                weight.state = State.OFFLOADED
        self._wake()

    def finish(self, room: loading.Room) -> None:
        """The host waits for what was loaded; only while a pass is measured, so that times are those of copies."""
        for arrival in room.arrivals:
            arrival.finish()
