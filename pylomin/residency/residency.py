"""States of weights, the ledger, hold and release. Nothing else changes what is resident."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from pylomin.errors import ScratchError
from pylomin.io.buffers import BufferPool
from pylomin.io.modes import Mode
from pylomin.residency import loading
from pylomin.residency.contents import Loaded
from pylomin.residency.device_errors import SPARE_SHARE
from pylomin.residency.hold import DeviceHold, Hold, UnpackingHold
from pylomin.residency.places import Places
from pylomin.residency.prefetcher import Prefetcher
from pylomin.residency.readers import Readers
from pylomin.residency.recording import Measured, Recording
from pylomin.residency.run_reads import RunReads
from pylomin.residency.stats import Stats
from pylomin.residency.tiling import tile_rows
from pylomin.residency.trace import Key
from pylomin.residency.turns import Group
from pylomin.residency.waiting import Waiter
from pylomin.residency.weight import State, Weight, dense_layout, used_from
from pylomin.residency.writes import Writes
from pylomin.store.scratch import ScratchDirectory

RESIDENT = State.RESIDENT  # looked up in every forward
COMPUTING_SHARE = 4  # of what weights have, so much is left to computing when it found too little


class Residency(RunReads, Writes):
    """The weights of one model that are offloaded: brings them in, counts them, lets them go.

    References go one way: tensors hold weights, weights hold their residency. It knows its weights only by index, so
    that a model that is dropped is gone at once, with its files, threads and memory.
    """

    def __init__(self, memory_budget: int | None = None) -> None:
        super().__init__(memory_budget)
        self.scratch: ScratchDirectory | None = None
        self.quantizes_inputs = False  # whether linears may round them to the precision of the weight
        self._hold_class: type[Hold] = Hold
        self._plan(())
        _all.add(self)

    # -- settings and counters --------------------------------------------------------------------------------------

    def _stream_to(self, device: torch.device) -> None:
        super()._stream_to(device)
        self._hold_class = DeviceHold

    def set_reading_mode(self, mode: Mode | None) -> None:
        """Read in this mode, wherever it is possible; None: in the one that suits."""
        with self.lock:
            self._requested_mode = mode
            self._choose_reading()
            self._plan(self.retention.order)

    def set_readers(self, count: int) -> None:
        """Let so many threads read the weights that go to a device."""
        with self.lock:
            self.readers = Readers(count)

    def set_depth(self, depth: int | None) -> None:
        """Read this many large groups ahead; None: as many as the plan's window holds, 0: none."""
        self.exchange_prefetcher(Prefetcher(depth) if depth != 0 else None)
        with self.lock:
            self._plan(self.retention.order)

    def exchange_prefetcher(self, other: Prefetcher | None) -> None:
        """Read with ``other`` from now on; what was read ahead by the one before leaves."""
        with self.lock:
            prefetcher, self._prefetcher = self._prefetcher, other
        if prefetcher is not None:
            prefetcher.close()  # outside the lock, which the running read needs to finish
        with self.lock:
            self.drop_ahead(wanted=())

    def stats(self) -> Stats:
        """The counters now."""
        with self.lock:
            return replace(
                self._stats,
                memory_budget=self.memory_budget,
                reading_mode=self.reading.mode,
                reading_why=self.reading.why,
                resident_bytes=self.pool.in_use_bytes(),
                peak_bytes=self.pool.peak_bytes,
                pinned_bytes=sum(carrier.ring_bytes for carrier in self.carriers.values()),
            )

    def start_recording(self) -> None:
        """Record uses, of all threads, until :meth:`stop_recording`."""
        with self.lock:
            self._recording, self._settled = Recording(), False

    def stop_recording(self) -> Measured | None:
        """What was recorded; None if nothing was used."""
        with self.lock:
            recording, self._recording = self._recording, None
            return recording.measured(self._stats.stall_s) if recording is not None and recording.uses else None

    def adopt(self, order: Sequence[Key], measured: Measured | None = None) -> None:
        """Plan for uses in this order, before they are seen."""
        with self.lock:
            self.retention.learn(order, measured)
            self._plan(order)

    def load_residents(self) -> None:
        """Load now what stays by the plan, in the order of its use.

        Loaded between the layers of a pass, what stays would come to lie between the hidden states that malloc hands
        out and takes back, and the holes would add up to a good part of the budget.
        """
        for key in dict.fromkeys(self.retention.order):
            if self.retention.stays(key):
                with self.hold(self.weights_of(key)):
                    pass

    def copy(self) -> Residency:
        """For a copy of the model: the same settings and scratch files, a ledger of its own."""
        clone = Residency(self.memory_budget)
        clone.scratch = self.scratch
        clone.quantizes_inputs = self.quantizes_inputs
        clone.readers = Readers(self.readers.count)
        clone.set_depth(self._prefetcher.fixed_depth if self._prefetcher is not None else 0)
        return clone

    # -- use --------------------------------------------------------------------------------------------------------

    def hold(self, weights: Sequence[Weight], group: Sequence[Weight] | None = None) -> Hold | UnpackingHold:
        """``with residency.hold(weights):`` they are resident inside the block.

        Args:
            group: all weights that are used in the block, also those that load by tiles; default: ``weights``, all of
                which have to be resident.

        Raises:
            BudgetError: they do not fit beside what is held now.
            StoreReadError: their bytes cannot be read, or could not in the background before.
        """
        for weight in weights if group is None else group:
            if weight.parts:
                return self._unpacking_hold(weights, group)
        return self._hold_class(self, weights, group)

    def _unpacking_hold(self, weights: Sequence[Weight], group: Sequence[Weight] | None) -> Hold | UnpackingHold:
        made = self._hold_class
        packed = [weight for weight in weights if weight.parts]
        if group is None:
            return UnpackingHold(made(self, used_from(weights), None), made(self, packed, None))
        kept = used_from([weight for weight in group if weight in weights or weight.parts])
        whole = [weight for weight in kept if not (weight.is_part and weight.tiled)]
        hold = made(self, whole, used_from(group))
        return UnpackingHold(hold, made(self, packed, packed)) if packed else hold

    def acquire(self, hold: Hold) -> None:
        with self.lock:
            for weight in hold.weights:
                weight.holds += 1
                hold.pinned.append(weight)
            holders, me = self._holders, hold.thread_id
            holders[me], hold.counted = holders.get(me, 0) + 1, True
            if self._try_use(hold, missed=False):
                return
        if self.turns is not None:
            self._take_turns(self.turns, Group(self, hold.weights))
        missed, waiter, is_full = False, None, False
        while True:
            with self.lock:
                claim = self._claim(hold, waiter)
                if claim is None and self._try_use(hold, missed=missed):
                    self._stop_waiting(hold.thread_id, waiter)
                    return
                if claim is None:
                    waiter = waiter or Waiter()
                    waiter.enlist(self._waiters)
            if claim is None:
                assert waiter is not None
                waiter.wait()
                continue
            missed = True
            started = time.perf_counter()
            try:
                tensors = claim.load(urgent=True)
            except torch.cuda.OutOfMemoryError as error:
                is_full = self._device_was_full(hold, claim.places, error, again=is_full)
                continue
            if self._recording is not None:
                self.finish(claim)
            with self.lock:
                stalled_s = time.perf_counter() - started
                self.load_finished(hold.claimed, claim, tensors, stalled_s)
                hold.claimed = []
                if claim.places.read_bytes:
                    self._stats.stall_s += stalled_s
                if self._try_use(hold, missed=True):
                    self._stop_waiting(hold.thread_id, waiter)
                    return

    def _try_use(self, hold: Hold, *, missed: bool) -> bool:
        """Begin the use of what is held; False where not all of it is in memory."""
        for weight in hold.weights:
            if weight.state is not RESIDENT:
                return False
        self._used(hold, missed)
        return True

    def _device_was_full(self, hold: Hold, places: Places, error: BaseException, *, again: bool) -> bool:
        """What loading takes beside the budget did not fit: make room, once."""
        with self.lock:
            claimed, hold.claimed = hold.claimed, []
            self.load_failed(claimed)
            used_bytes = self._make_room_on_device(claimed, places, error, again=again)
            self.lower_budget(used_bytes, share=SPARE_SHARE)
        return True

    def release(self, hold: Hold) -> None:
        """The end of a hold, also of one that failed half-way. Writes made meanwhile go to the overlay."""
        first_error: ScratchError | None = None
        with self.lock:
            for weight in hold.pinned:
                tensor = weight.tensor
                if tensor is not None and tensor._version != weight.loaded_version:
                    first_error = self._keep_writes(weight, tensor) or first_error
            tensor = None  # or its memory would not be free yet for what is read next
            if hold.claimed:
                self.load_failed(hold.claimed)
                hold.claimed = []
            if self._waiting:
                self._waiting.pop(hold.thread_id, None)
            self._unpin(hold)
        if first_error is not None:
            raise first_error

    def use_by_tiles(self, hold: Hold) -> bool:
        """What did not fit is used by tiles from now on, where that is possible. Whether that changes anything."""
        with self.lock:
            for weight in hold.group or ():
                weight.tiled = weight.tiled or tile_rows(weight, self.memory_budget) is not None
        whole = [weight for weight in hold.weights if not weight.tiled]
        changed = hold.group is not None and len(whole) < len(hold.weights)
        hold.weights = whole if changed else hold.weights
        return changed

    def make_room_for_computing(self) -> None:
        """A computation on a device found no memory: what is idle leaves, of other models, too."""
        self.lower_budget(self.leave_device(), share=COMPUTING_SHARE)
        for other in list(_all):
            if other is not self and not other.carriers.keys().isdisjoint(self.carriers):
                other.leave_device()

    def load_private(self, weight: Weight) -> torch.Tensor:
        """All values, in a tensor that nobody else sees."""
        with self.hold([weight]), torch.inference_mode(False), torch.no_grad():
            assert weight.tensor is not None
            return weight.tensor.detach().clone(memory_format=torch.preserve_format)

    def take_over(self, weight: Weight, values: torch.Tensor) -> Weight:
        """A new weight in the place of ``weight``, with the values, and the shape and dtype, of a tensor."""
        layout = dense_layout(values)
        with self.lock:
            source = self._overlay.keep(weight, values, layout)
        return Weight(weight.name, source, self, () if source.layout == layout else (layout,))

    # -- under the lock ---------------------------------------------------------------------------------------------

    def _claim(self, hold: Hold, waiter: Waiter | None) -> loading.Room | None:
        """Mark what is missing as loading, by this hold, and set memory aside; None if there is nothing to load now."""
        for weight in hold.weights:
            if (error := weight.error) is not None:
                for failed_with_it in hold.weights:
                    failed_with_it.error = None
                raise error
        missing = [weight for weight in hold.weights if weight.state is State.OFFLOADED]
        if not missing:
            return None
        needed = partial(_any_offloaded, missing)
        room = self._find_room(missing, self.places_of(missing), needed, hold.thread_id, waiter)
        if room is None:
            return None
        hold.claimed = missing
        self.load_started(missing)
        return room

    def _used(self, hold: Hold, missed: bool) -> None:
        group = hold.weights if hold.group is None else hold.group
        if group and group[0].parts:  # decoded from what is in memory, for this use
            for weight in hold.weights:
                weight.loaded.used = True
            return
        self._uses += 1
        if missed:
            self._stats.loads += 1
        else:
            self._stats.hits += 1
            if self._settled and not self._ahead:
                return
        for weight in hold.weights:
            loaded: Loaded = weight.loaded
            loaded.last_use = self._uses
            if not loaded.used:
                loaded.used = True
                self._ahead.pop(loaded, None)
        for weight in group:
            if weight.transient:
                return
        key = tuple([weight.index for weight in group])
        if self._recording is not None:
            for carrier in self.carriers.values():
                carrier.device.finish()
            self._recording.use(key, self._stats.stall_s)
        order = self.retention.used(key)
        if order is not None:
            self._plan(order)
            self.retention.resume(key)
        if self._uses >= self._review_at:
            self._review_reading()
        if self._prefetcher is not None:
            self._prefetcher.schedule(self)

    def _unpin(self, hold: Hold) -> None:
        # An interrupt is delivered at calls: between any two of them this can stop, and be taken up again.
        while hold.pinned:
            weight = hold.pinned[-1]
            loaded: Loaded | None = weight.loaded
            if loaded is not None and (not loaded.kept or loaded.spoiled) and loaded not in hold.unsettled:
                hold.unsettled.append(loaded)
            weight.holds -= 1
            del hold.pinned[-1]
        holders, thread_id = self._holders, hold.thread_id
        if hold.counted:
            others = holders.get(thread_id, 1) - 1
            if others > 0:
                holders[thread_id], hold.counted = others, False
            else:
                if thread_id in holders:
                    del holders[thread_id]
                hold.counted = False
        if hold.unsettled:
            while hold.unsettled:
                loaded = hold.unsettled[-1]
                if not self._is_held(loaded):
                    self._settle(loaded)
                del hold.unsettled[-1]
            if self._prefetcher is not None:
                self._prefetcher.schedule(self)
        if self._waiters:
            self._wake()

    # -- forks ------------------------------------------------------------------------------------------------------

    def _reset_after_fork(self) -> None:
        """In a forked child: threads other than this one, and what they were doing, do not exist."""
        self.lock = threading.RLock()
        self._waiters, self._waiting, self.turns, self._tiles_ahead = [], {}, None, None
        self._overlay.reset_after_fork()
        self._prefetcher = Prefetcher(self._prefetcher.fixed_depth) if self._prefetcher is not None else None
        self.readers = Readers(self.readers.count)
        # What those threads refer to is never released; it is the parent's memory, shared until somebody writes.
        self.pool = BufferPool(self.memory_budget)
        self._places.clear()  # rooms that are kept are in the parent's pool
        for loaded in self._in_memory:
            loaded.room = None
        with self.lock:
            self.load_failed(list(self._weights.values()))
            self._release_other_threads()
            while self._evict_one():
                pass

    def _release_other_threads(self) -> None:
        me = threading.get_ident()
        if set(self._holders) <= {me}:
            return
        # Found by the garbage collector, because keeping a list of them would cost time in every forward.
        for hold in gc.get_objects():
            if isinstance(hold, Hold) and hold.residency is self and hold.thread_id != me:
                self._unpin(hold)
        mine = self._holders.get(me, 0)
        self._holders = {me: mine} if mine > 0 else {}


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
