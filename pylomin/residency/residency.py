"""States of weights, the ledger, hold and release. Nothing else changes what is resident."""

from __future__ import annotations

import gc
import itertools
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from pylomin.errors import BudgetError, ScratchError, without_frames
from pylomin.io.buffers import BufferPool
from pylomin.residency import loading
from pylomin.residency.hold import Hold
from pylomin.residency.limits import format_bytes
from pylomin.residency.overlay import Overlay
from pylomin.residency.prefetcher import Prefetcher
from pylomin.residency.stats import Stats
from pylomin.residency.trace import Key, Trace
from pylomin.residency.weight import ResidentParameter, State, Weight, dense_layout
from pylomin.store.scratch import ScratchDirectory

RECHECK_S = 0.05  # views die without telling anyone, so who waits looks again
GRACE = 2  # such looks before giving up: another thread may be just about to drop its last reference


class _Waiter:
    """One thread that waits for a change. Not a Condition, whose wait an interrupt can leave without its lock."""

    __slots__ = ("_lock", "hopeless", "started")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.hopeless = 0  # times it was found that nobody could free the memory it waits for
        self.started = time.perf_counter()

    def enlist(self, waiters: list[_Waiter]) -> None:
        """Under the residency's lock: be woken by the next change."""
        self._lock.acquire(blocking=False)
        waiters.append(self)

    def wait(self) -> None:
        """Outside of the residency's lock."""
        self._lock.acquire(timeout=RECHECK_S)

    def wake(self) -> None:
        if self._lock.locked():
            self._lock.release()


@dataclass(eq=False, slots=True)
class Loaded:
    """What one read brought into memory; it leaves together, because it lies in one buffer."""

    members: Key
    nbytes: int
    kept: bool = False  # a resident: counted against the part of the budget outside the window
    used: bool = False
    spoiled: bool = False  # written to, and the write could not be kept


class Residency:
    """The weights of one model that are offloaded: brings them in, counts them, lets them go.

    References go one way: tensors hold weights, weights hold their residency. It knows its weights only by index, so
    that a model that is dropped is gone at once, with its files, threads and memory.
    """

    def __init__(self, memory_budget: int | None = None) -> None:
        self.pool = BufferPool(memory_budget)
        self.trace = Trace()
        self.scratch: ScratchDirectory | None = None
        self._stats = Stats()
        self._overlay = Overlay()
        self._weights: weakref.WeakValueDictionary[int, Weight] = weakref.WeakValueDictionary()
        self._weights_seen = 0
        self._total_bytes = 0  # if all weights were in memory
        self._next_index = itertools.count()
        self._prefetcher: Prefetcher | None = None
        self._idle: dict[Loaded, None] = {}  # resident and not held, oldest first
        self._kept_bytes = 0
        self._largest_bytes = 0  # of anything loaded together so far
        self._holders: Counter[int] = Counter()  # pins by thread
        self._waiting: dict[
            int, Callable[[], bool]
        ] = {}  # threads that wait for memory, and whether they still need to
        self._waiters: list[_Waiter] = []
        self.lock = threading.RLock()
        _all.add(self)

    # -- settings and counters --------------------------------------------------------------------------------------

    @property
    def memory_budget(self) -> int | None:
        return self.pool.limit_bytes

    def set_budget(self, memory_budget: int | None) -> None:
        """Takes effect now: what is idle and no longer fits leaves."""
        with self.lock:
            if memory_budget is None:
                for loaded in list(self._idle):
                    self._drop(loaded)
            while memory_budget is not None and self.pool.in_use_bytes() > memory_budget:
                if not self._evict_one():
                    break
            self.pool.set_limit(memory_budget)

    def set_depth(self, depth: int) -> None:
        """Read this many large groups ahead; 0 ends prefetching."""
        with self.lock:
            prefetcher, self._prefetcher = self._prefetcher, Prefetcher(depth) if depth else None
        if prefetcher is not None:
            prefetcher.close()  # outside the lock, which the running read needs to finish
        with self.lock:
            self.drop_unused(wanted=())

    @property
    def depth(self) -> int:
        return self._prefetcher.depth if self._prefetcher is not None else 0

    def stats(self) -> Stats:
        """The counters now."""
        with self.lock:
            return replace(
                self._stats,
                memory_budget=self.memory_budget,
                resident_bytes=self.pool.in_use_bytes(),
                peak_bytes=self.pool.peak_bytes,
            )

    def copy(self) -> Residency:
        """For a copy of the model: the same settings and scratch files, a ledger of its own."""
        clone = Residency(self.memory_budget)
        clone.scratch = self.scratch
        clone.set_depth(self.depth)
        return clone

    def expect(self, nbytes: int) -> None:
        """A group of so many bytes will be loaded; the window must have room for it."""
        self._largest_bytes = max(self._largest_bytes, nbytes)

    def weights_of(self, key: Key) -> list[Weight]:
        """The weights of a group that still exist."""
        return [weight for weight in map(self._weights.get, key) if weight is not None]

    def register(self, weight: Weight) -> int:
        """The index by which this residency knows a new weight."""
        index = next(self._next_index)
        self._weights[index] = weight
        return index

    # -- use --------------------------------------------------------------------------------------------------------

    def hold(self, weights: Sequence[Weight]) -> Hold:
        """``with residency.hold(weights):`` they are resident inside the block.

        Raises:
            BudgetError: they do not fit beside what is held now.
            StoreReadError: their bytes cannot be read, or could not in the background before.
        """
        return Hold(self, weights)

    def acquire(self, hold: Hold) -> None:
        with self.lock:
            for weight in hold.weights:
                weight.holds += 1
                hold.pinned.append(weight)
            self._holders[hold.thread_id], hold.counted = self._holders[hold.thread_id] + 1, True
        missed, waiter = False, None
        while True:
            with self.lock:
                claim = self._claim(hold, waiter)
                if claim is None and all(weight.state is State.RESIDENT for weight in hold.weights):
                    self._used(hold, missed)
                    self._stop_waiting(hold.thread_id, waiter)
                    return
                if claim is None:
                    waiter = waiter or _Waiter()
                    waiter.enlist(self._waiters)
            if claim is None:
                assert waiter is not None
                waiter.wait()
                continue
            missed = True
            started = time.perf_counter()
            tensors = loading.load(*claim)
            with self.lock:
                self.load_finished(hold.claimed, tensors)
                hold.claimed = []
                self._stats.stall_s += time.perf_counter() - started

    def release(self, hold: Hold) -> None:
        """The end of a hold, also of one that failed half-way. Writes made meanwhile go to the overlay."""
        with self.lock:
            errors = [error for weight in hold.pinned if (error := self._keep_writes(weight)) is not None]
            self.load_failed(hold.claimed)
            hold.claimed = []
            self._waiting.pop(hold.thread_id, None)
            self._unpin(hold)
        if errors:
            raise errors[0]

    def load_private(self, weight: Weight) -> torch.Tensor:
        """All values, in a tensor that nobody else sees."""
        with self.hold([weight]), torch.inference_mode(False), torch.no_grad():
            assert weight.tensor is not None
            return weight.tensor.detach().clone(memory_format=torch.preserve_format)

    def load_runs(self, weight: Weight, runs: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Runs ``(first, last exclusive)`` of elements, counted as they lie in memory, in one 1-D tensor."""
        me, waiter = threading.get_ident(), _Waiter()
        room = None
        while room is None:
            with self.lock:
                piece = loading.Piece.of(weight, runs)
                room = self._find_room([weight], [piece], lambda: True, me, waiter)
                if room is None:
                    waiter.enlist(self._waiters)
                else:
                    self._stop_waiting(me, waiter)
            if room is None:
                waiter.wait()
        values = loading.load([piece], room)[0]
        with self.lock:
            self._stats.loads += 1
            self._stats.bytes_read += piece.stored_bytes
        return values

    def stream_runs(self, weight: Weight, runs: Sequence[tuple[int, int]]) -> Iterator[torch.Tensor]:
        """Each run (first, last exclusive) of elements in turn, as a 1-D tensor; valid until the next is asked for."""
        for run in runs:
            yield self.load_runs(weight, [run])

    def write(self, weight: Weight, values: torch.Tensor) -> None:
        """Replace the values. The store that they came from is not touched."""
        waiter = _Waiter()
        while True:
            with self.lock:
                if weight.state is not State.LOADING:
                    self._write(weight, values)
                    return
                waiter.enlist(self._waiters)
            waiter.wait()

    def take_over(self, weight: Weight, values: torch.Tensor) -> Weight:
        """A new weight in the place of ``weight``, with the values, and the shape and dtype, of a tensor."""
        layout = dense_layout(values)
        with self.lock:
            source = self._overlay.keep(weight, values, layout)
        return Weight(weight.name, source, self, () if source.layout == layout else (layout,))

    # -- under the lock ---------------------------------------------------------------------------------------------

    def _claim(self, hold: Hold, waiter: _Waiter | None) -> tuple[list[loading.Piece], loading.Room] | None:
        """Mark what is missing as loading, by this hold, and set memory aside; None if there is nothing to load now."""
        for weight in hold.weights:
            if (error := weight.error) is not None:
                for failed_with_it in hold.weights:
                    failed_with_it.error = None
                raise error
        missing = [weight for weight in hold.weights if weight.state is State.OFFLOADED]
        if not missing:
            return None
        pieces = [loading.Piece.of(weight) for weight in missing]
        needed = partial(_any_offloaded, missing)
        room = self._find_room(missing, pieces, needed, hold.thread_id, waiter)
        if room is None:
            return None
        hold.claimed = missing
        self.load_started(missing)
        return pieces, room

    def _used(self, hold: Hold, missed: bool) -> None:
        for weight in hold.weights:
            loaded: Loaded = weight.loaded
            loaded.used = True
            self._idle.pop(loaded, None)
        self._stats.loads += missed
        self._stats.hits += not missed
        if any(weight.transient for weight in hold.weights):
            return
        self.trace.record(tuple(weight.index for weight in hold.weights))
        if self._prefetcher is not None:
            self._prefetcher.schedule(self)

    def load_started(self, weights: Iterable[Weight], *, in_background: bool = False) -> None:
        self._stats.prefetched += in_background
        for weight in weights:
            weight.state = State.LOADING

    def load_finished(self, weights: Sequence[Weight], tensors: Sequence[torch.Tensor]) -> None:
        loaded = Loaded(tuple(weight.index for weight in weights), sum(weight.peak_load_bytes for weight in weights))
        with torch._C._DisableFuncTorch(), torch.inference_mode(False):
            for weight, tensor in zip(weights, tensors, strict=True):
                weight.tensor = ResidentParameter(tensor, requires_grad=False)
                weight.loaded_version = weight.tensor._version
                weight.loaded = loaded
                weight.state = State.RESIDENT
        self._stats.bytes_read += sum(weight.source.layout.nbytes for weight in weights)
        self._largest_bytes = max(self._largest_bytes, loaded.nbytes)
        if all(weight.holds == 0 for weight in weights):
            self._idle[loaded] = None
        self._wake()

    def load_failed(self, weights: Iterable[Weight]) -> None:
        for weight in weights:
            if weight.state is State.LOADING:
                weight.tensor = weight.twin = weight.loaded = None
                weight.state = State.OFFLOADED
        self._wake()

    def _unpin(self, hold: Hold) -> None:
        # An interrupt is delivered at calls: between any two of them this can stop, and be taken up again.
        while hold.pinned:
            weight = hold.pinned[-1]
            if weight.loaded is not None and weight.loaded not in hold.unsettled:
                hold.unsettled.append(weight.loaded)
            weight.holds -= 1
            del hold.pinned[-1]
        if hold.counted:
            self._holders[hold.thread_id], hold.counted = self._holders[hold.thread_id] - 1, False
        if self._holders[hold.thread_id] <= 0:
            self._holders.pop(hold.thread_id, None)
        while hold.unsettled:
            loaded = hold.unsettled[-1]
            if all(member.holds == 0 for member in self._members(loaded)):
                self._settle(loaded)
            del hold.unsettled[-1]
        self._wake()

    def _settle(self, loaded: Loaded) -> None:
        """Nobody holds it any more: it stays if it fits beside the window that others stream through.

        So a fixed set stays, the first that fit: on a cyclic order it hits every time round, where keeping the
        most recently used would never hit.
        """
        budget = self.memory_budget
        if not loaded.kept and not loaded.spoiled and budget is not None:
            self._forget_replaced()
            window_bytes = (1 + self.depth) * self._largest_bytes if self._total_bytes > budget else 0
            if self._kept_bytes + loaded.nbytes + window_bytes <= budget:
                loaded.kept, self._kept_bytes = True, self._kept_bytes + loaded.nbytes
        if loaded.kept and not loaded.spoiled:
            self._idle[loaded] = None
        else:
            self._drop(loaded)

    def _members(self, loaded: Loaded) -> list[Weight]:
        return [weight for weight in self.weights_of(loaded.members) if weight.loaded is loaded]

    def _drop(self, loaded: Loaded) -> None:
        if loaded.kept:
            loaded.kept, self._kept_bytes = False, self._kept_bytes - loaded.nbytes
        self._stats.wasted += not loaded.used
        self._idle.pop(loaded, None)
        for weight in self._members(loaded):
            weight.state = State.OFFLOADED
            weight.tensor = weight.twin = weight.loaded = None
        self.pool.collect()

    def _forget_replaced(self) -> None:
        """Weights that users replaced are gone, and what they took of the budget is free."""
        if len(self._weights) != self._weights_seen:
            self._weights_seen = len(self._weights)
            self._total_bytes = sum(w.peak_load_bytes for w in list(self._weights.values()) if not w.transient)
            for loaded in [loaded for loaded in self._idle if not self._members(loaded)]:
                self._drop(loaded)

    def _evict_one(self) -> bool:
        if self._idle:
            # The newest: on a cyclic order the oldest is needed first.
            self._drop(next(reversed(self._idle)))
            return True
        # What an interrupt left behind: neither held nor idle.
        for weight in list(self._weights.values()):
            if weight.state is State.RESIDENT and all(member.holds == 0 for member in self._members(weight.loaded)):
                self._drop(weight.loaded)
                return True
        return False

    def _find_room(
        self,
        weights: Sequence[Weight],
        pieces: Sequence[loading.Piece],
        needed: Callable[[], bool],
        thread_id: int,
        waiter: _Waiter | None,
    ) -> loading.Room | None:
        """Memory for ``pieces``; None if the caller has to wait for it, as long as ``needed``."""
        while True:
            room = loading.try_reserve(self.pool, pieces)
            if room is not None:
                self._waiting.pop(thread_id, None)
                return room
            if not self._evict_one():
                break
        in_background = self._prefetcher is not None and self._prefetcher.in_flight
        if waiter is not None and not in_background and all(t == thread_id or self._waits(t) for t in self._holders):
            waiter.hopeless += 1
            if waiter.hopeless > GRACE:
                raise self._over_budget(weights, pieces)
        self._waiting[thread_id] = needed
        return None

    def _waits(self, thread_id: int) -> bool:
        needed = self._waiting.get(thread_id)
        return needed is not None and needed()

    def _stop_waiting(self, thread_id: int, waiter: _Waiter | None) -> None:
        self._waiting.pop(thread_id, None)
        if waiter is not None:
            self._stats.stall_s += time.perf_counter() - waiter.started

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.wake()

    def _over_budget(self, weights: Sequence[Weight], pieces: Sequence[loading.Piece]) -> BudgetError:
        largest = max(weights, key=lambda weight: weight.nbytes)
        buffer_bytes, converted_bytes = loading.needed_bytes(pieces)
        needed_bytes = buffer_bytes + sum(converted_bytes)
        used_bytes, budget = self.pool.in_use_bytes(), self.memory_budget or 0
        return BudgetError(
            f"weight '{largest.name}' needs {format_bytes(needed_bytes)} of memory now, but memory_budget is {budget} "
            f"({format_bytes(budget)}), of which {format_bytes(used_bytes)} are in use by weights that a running "
            "forward holds or by tensors that outlive their use (an autograd graph, a saved reference, an exception's "
            f"traceback). Use memory_budget of at least {used_bytes + needed_bytes}, or run under torch.no_grad()."
        )

    def drop_unused(self, wanted: Collection[Key]) -> None:
        members = {index for key in wanted for index in key}
        for loaded in [loaded for loaded in self._idle if not loaded.used]:
            if members.isdisjoint(loaded.members):
                self._drop(loaded)

    # -- writes -----------------------------------------------------------------------------------------------------

    def _keep_writes(self, weight: Weight) -> ScratchError | None:
        """A forward that wrote to its resident weight wrote to the weight; or did not, and here is why."""
        tensor = weight.tensor
        if tensor is None or tensor._version == weight.loaded_version:
            return None
        weight.loaded_version = tensor._version
        try:
            self._redirect(weight, tensor)
        except ScratchError as error:
            weight.loaded.spoiled = True
            without_frames(error)
            return error
        return None

    def _write(self, weight: Weight, values: torch.Tensor) -> None:
        self._redirect(weight, values)
        if weight.tensor is None:
            return
        if all(member.holds == 0 for member in self._members(weight.loaded)):
            self._drop(weight.loaded)
        else:  # a forward that runs now sees the new values, as it would in an ordinary model
            with torch.no_grad():
                weight.tensor.copy_(values)
            weight.loaded_version = weight.tensor._version

    def _redirect(self, weight: Weight, values: torch.Tensor) -> None:
        """From now on the weight's bytes are a copy of ``values`` that is this model's own."""
        layout = weight.layout
        weight.source = self._overlay.keep(weight, values, layout)
        weight.writes += 1
        weight.conversions = () if weight.source.layout == layout else (layout,)
        weight.shared = None
        weight.error = None  # it was about bytes that nobody needs any more

    def _reset_after_fork(self) -> None:
        """In a forked child: threads other than this one, and what they were doing, do not exist."""
        self.lock = threading.RLock()
        self._waiters, self._waiting = [], {}
        self._overlay.reset_after_fork()
        self._prefetcher = Prefetcher(self.depth) if self.depth else None
        # What those threads refer to is never released; it is the parent's memory, shared until somebody writes.
        self.pool = BufferPool(self.memory_budget)
        with self.lock:
            self.load_failed(list(self._weights.values()))
            self._release_other_threads()
            for loaded in list(self._idle):
                self._drop(loaded)

    def _release_other_threads(self) -> None:
        me = threading.get_ident()
        if set(self._holders) <= {me}:
            return
        # Found by the garbage collector, because keeping a list of them would cost time in every forward.
        for hold in gc.get_objects():
            if type(hold) is Hold and hold.residency is self and hold.thread_id != me:
                self._unpin(hold)
        self._holders = Counter({me: self._holders[me]} if self._holders[me] > 0 else {})


def resident_bytes_of_all() -> int:
    """Of all models in this process."""
    return sum(residency.pool.asked_bytes() for residency in list(_all))


def _any_offloaded(weights: Sequence[Weight]) -> bool:
    return any(weight.state is State.OFFLOADED for weight in weights)


_all: weakref.WeakSet[Residency] = weakref.WeakSet()


def _reset_all_after_fork() -> None:
    for residency in list(_all):
        residency._reset_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_all_after_fork)
