"""What is in memory of the weights of one model, and what should be; under the lock of its residency."""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from pylomin.io.buffers import ALIGNMENT_BYTES, PAGE_BYTES, SMALL_BYTES, BufferPool, aligned, block_bytes
from pylomin.io.modes import Mode
from pylomin.residency import loading
from pylomin.residency.carrier import DEVICE_ALIGNMENT_BYTES, Carrier, carrier_to
from pylomin.residency.device import is_streamed_to
from pylomin.residency.device_memory import Arrival
from pylomin.residency.mapped_room import MappedRoom
from pylomin.residency.piece import Piece
from pylomin.residency.places import Places
from pylomin.residency.prefetcher import Prefetcher, TilesAhead
from pylomin.residency.reading import Reading, choose_reading
from pylomin.residency.recording import Recording
from pylomin.residency.retention import Retention
from pylomin.residency.simulation import Group
from pylomin.residency.stats import Stats
from pylomin.residency.tiling import bytes_per_tile, lines_of, tile_rows
from pylomin.residency.trace import Key
from pylomin.residency.weight import State, Weight

if TYPE_CHECKING:
    from pylomin.residency.turns import Turns

MOST_PLACES = 1024  # groups and tiles, and twice as many as there are weights, of which is known where they come to lie
MOST_SPARE = 16  # of a budget of which a smaller share is left free, the window is not made smaller
REVIEW_USES = 64  # and at least as many as there are weights, between reviews of the reading mode
REVIEW_S = 1.0


def _unpacked_bytes(weight: Weight) -> int:
    """What is decoded of a weight that is not used by tiles: all, or a row, or an expert."""
    if not weight.looked_up:
        return block_bytes(weight.peak_load_bytes)
    return block_bytes(lines_of(weight.layout)[1] * weight.element_bytes)


def _alignment(weight: Weight) -> int:
    return DEVICE_ALIGNMENT_BYTES if is_streamed_to(weight.layout.device) else ALIGNMENT_BYTES


@dataclass(eq=False, slots=True)
class Loaded:
    """What one read brought into memory; it leaves together, because it lies in one buffer."""

    members: Key
    nbytes: int  # that it takes in the ledger
    is_unpacked: bool  # decoded from what is in memory: it leaves with its use
    kept: bool = False  # it stays when nobody holds it; counted against the part of the budget outside the window
    used: bool = False
    last_use: int = 0  # number of the use
    spoiled: bool = False  # written to, and the write could not be kept
    arrivals: tuple[Arrival, ...] = ()  # on devices
    room: MappedRoom | None = None  # to be kept when it leaves


class Contents:
    """Which weights there are, what of them was loaded, what of that stays, and where the next comes to lie.

    The base of :class:`~pylomin.residency.residency.Residency`, which adds holds, threads and writes.
    """

    def __init__(self, memory_budget: int | None = None) -> None:
        self.lock = threading.RLock()
        self.pool = BufferPool(memory_budget)
        self.retention = Retention()
        self.reading = Reading()
        self.readers = loading.ALONE
        self._requested_mode: Mode | None = None
        self._stats = Stats()
        self._weights: weakref.WeakValueDictionary[int, Weight] = weakref.WeakValueDictionary()
        self._weights_seen = 0
        self._total_bytes = 0  # if all weights were in memory, each on its own
        self._next_index = itertools.count()
        self._places: dict[tuple[Key, tuple[int, int] | None], Places] = {}
        self._prefetcher: Prefetcher | None = None
        self._in_memory: dict[Loaded, None] = {}  # oldest first
        self._ahead: dict[Loaded, None] = {}  # of these, what was read ahead and not used yet
        self._tiles_ahead: TilesAhead | None = None  # the first tiles of the weight that is used next
        self._uses = 0
        self._settled = False  # all that is used stays: nothing to predict, and nothing to read
        self._kept_bytes = 0
        self.tiles_bytes = 0  # that the tiles of one weight take at one time, at most, by the plan
        self._largest_bytes = 0  # of anything loaded together so far
        self.least_bytes = 0  # that any budget must have
        self._spare_bytes = 0  # of the window that the plan has, for what it did not count
        self._unpacking_bytes = 0  # that the plan leaves for what is decoded while it is used
        self._unpacked_bytes = 0  # that is decoded now
        self._recording: Recording | None = None
        self.turns: Turns | None = None  # while workers run in lockstep
        self.carriers: dict[torch.device, Carrier] = {}  # to the devices that weights are streamed to
        self._review_at = REVIEW_USES  # number of the use at which the reading mode is chosen anew
        self._reviewed_s = 0.0

    @property
    def memory_budget(self) -> int | None:
        return self.pool.limit_bytes

    @property
    def prefetcher(self) -> Prefetcher | None:
        """What reads in the background."""
        return self._prefetcher

    @property
    def is_recording(self) -> bool:
        return self._recording is not None

    @property
    def depth(self) -> int:
        """Large groups that are read ahead where there is no plan."""
        return self._prefetcher.depth if self._prefetcher is not None else 0

    @property
    def keeps_all(self) -> bool:
        """Whether all weights fit into the budget together; then what is used by rows is kept whole, too."""
        budget = self.memory_budget
        if budget is None:
            return False
        with self.lock:
            self._forget_replaced()
            return self._total_bytes + self._unpacking_bytes <= budget

    def expect(self, nbytes: int, least_bytes: int = 0) -> None:
        """A group of so many bytes will be loaded; the window must have room for it.

        Args:
            least_bytes: the smallest budget under which all groups can be used.
        """
        self._largest_bytes = max(self._largest_bytes, nbytes)
        self.least_bytes = max(self.least_bytes, least_bytes)

    def weights_of(self, key: Key) -> list[Weight]:
        """The weights of a group that still exist."""
        return [weight for weight in map(self._weights.get, key) if weight is not None]

    def register(self, weight: Weight) -> int:
        """The index by which this residency knows a new weight."""
        index = next(self._next_index)
        self._weights[index] = weight
        device = weight.layout.device
        if is_streamed_to(device) and device not in self.carriers:
            self._stream_to(device)
        return index

    def _stream_to(self, device: torch.device) -> None:
        with self.lock:
            self.carriers[device] = carrier_to(device)

    def footprints(self, order: Iterable[Key]) -> dict[Key, Group]:
        """The memory that each group of an order takes."""
        with self.lock:
            return {key: self._footprint(key) for key in dict.fromkeys(order)}

    def _footprint(self, key: Key) -> Group:
        weights = self.weights_of(key)
        whole_bytes = self.places_of(weights).resident_bytes
        tiles_bytes = [self._tiles_bytes(weight) for weight in weights if weight.tiled]
        if not tiles_bytes:
            return Group(whole_bytes)
        held = [weight for weight in weights if not weight.tiled]
        return Group(whole_bytes, self.places_of(held).resident_bytes + max(tiles_bytes))

    def places_of(self, weights: Sequence[Weight]) -> Places:
        """Where weights that are loaded together come to lie; remembered, for they will be again."""
        return self._places_of(weights, None)

    def places_of_runs(self, weight: Weight, runs: Sequence[tuple[int, int]]) -> Places:
        """Where runs of the elements of one weight come to lie; remembered of a tile, but not of what is looked up."""
        if len(runs) == 1 and (runs[0][1] - runs[0][0]) * weight.element_bytes >= SMALL_BYTES:
            return self._places_of([weight], runs[0])
        return self._new_places([Piece.of(weight, runs)])

    def _new_places(self, pieces: Sequence[Piece]) -> Places:
        # With a budget weights stay, and what lies around them in huge pages would count twice.
        return Places(pieces, self.reading.mode, whole_huge=self.memory_budget is None)

    def _places_of(self, weights: Sequence[Weight], run: tuple[int, int] | None) -> Places:
        key = (tuple([weight.index for weight in weights]), run)
        places = self._places.get(key)
        if places is None or not places.of_weights(weights):
            runs = None if run is None else [run]
            places = self._new_places([Piece.of(weight, runs) for weight in weights])
            if weights and weights[0].parts:  # where they are decoded from depends on what is in memory now
                return places
            if len(self._places) > MOST_PLACES + 2 * len(self._weights):
                self._places.clear()
            self._places[key] = places
        return places

    def _plan(self, order: Sequence[Key]) -> None:
        """Uses repeat in this order: decide what stays. What no longer does leaves now, or when it is released."""
        for weight in list(self._weights.values()):
            weight.tiled = tile_rows(weight, self.memory_budget) is not None
        groups = self.footprints(order) if self.memory_budget is not None else {}
        self._unpacking_bytes = self._most_unpacked_bytes(order)
        budget = None if self.memory_budget is None else max(0, self.memory_budget - self._unpacking_bytes)
        # What stays may take a little more than planned: blocks are rounded up to pages, and some are reused. That must
        # not come from a window that has just room for two groups, or one would not be read while the other is used.
        self._spare_bytes = PAGE_BYTES * len(order)
        streams = budget is not None and sum([group.size_bytes for group in groups.values()]) > budget
        if budget is not None and streams and self._spare_bytes <= budget // MOST_SPARE:
            budget, self._spare_bytes = budget - self._spare_bytes, 0
        self.retention.plan(order, groups, budget, reads_ahead=self.reads_ahead)
        self._settled = self.retention.schedule is not None and not self.retention.streams and self._recording is None
        if self.retention.schedule is None:
            return
        planned = {index for key in order for index in key}
        self.tiles_bytes = 0
        for weight in list(self._weights.values()):
            weight.tiled = weight.tiled and not self.retention.stays((weight.index,))
            if weight.tiled and weight.index in planned:
                self.tiles_bytes = max(self.tiles_bytes, self._tiles_bytes(weight))
        for loaded in list(self._in_memory):
            if loaded.kept and self.retention.streams and not self.retention.stays(loaded.members):
                loaded.kept, self._kept_bytes = False, self._kept_bytes - loaded.nbytes
                if not self._is_held(loaded):
                    self._drop(loaded)
        self.pool.set_window(self._window_bytes())

    def _window_bytes(self) -> int:
        """The part of the budget that what streams is read into; none for mapped pages, or where nothing streams."""
        schedule, budget = self.retention.schedule, self.memory_budget
        if budget is None or schedule is None or not self.retention.streams or self.reading.mode == "mapped":
            return 0
        return max(0, schedule.window_bytes - self._spare_bytes)

    def _most_unpacked_bytes(self, order: Iterable[Key]) -> int:
        """What the weights of one group, at most, are decoded into."""
        whole_of: dict[int, Weight] = {}
        for weight in list(self._weights.values()):
            if not weight.transient:
                whole_of |= {part.index: weight for part in weight.parts}
        most_bytes = 0
        for key in set(order):
            packed = {whole_of[index]: None for index in key if index in whole_of}
            held_bytes = sum([_unpacked_bytes(weight) for weight in packed if not weight.tiled])
            tiles = [self._tiles_bytes(weight) for weight in packed if weight.tiled]
            most_bytes = max(most_bytes, held_bytes + max(tiles, default=0))
        return most_bytes

    def _tiles_bytes(self, weight: Weight) -> int:
        return (2 if self.reads_ahead else 1) * bytes_per_tile(weight, self.memory_budget)

    def _choose_reading(self) -> None:
        self._reviewed_s = time.perf_counter()
        weights = [weight for weight in list(self._weights.values()) if not weight.transient]
        kept_bytes = self.memory_budget or 2 * self._largest_bytes
        before = self.reading.mode
        if self.carriers:  # what is kept is kept there
            kept_bytes = sum(carrier.ring_bytes for carrier in self.carriers.values())
        self.reading = choose_reading(weights, self._requested_mode, kept_bytes=kept_bytes)
        if self.carriers and self.reading.mode == "mapped":
            why = f"{self.reading.why} Weights for a device are copied through pinned memory."
            self.reading = replace(self.reading, mode="buffered", is_cached=False, why=why)
        if self.reading.mode != before:
            self._places.clear()

    def _review_reading(self) -> None:
        """Now and then: what was read may be cached by now, or memory may have become tight."""
        before, now = (self.reading.mode, self.reads_ahead), time.perf_counter()
        self._review_at = self._uses + max(len(self._weights), REVIEW_USES)
        if self._requested_mode is None and now - self._reviewed_s > REVIEW_S:
            self._choose_reading()
            if (self.reading.mode, self.reads_ahead) != before:
                self._plan(self.retention.order)

    def _settle(self, loaded: Loaded) -> None:
        """Nobody holds it any more: it stays if it is planned to, if it fits beside the window, or is used next."""
        if loaded.spoiled or not self._may_stay(loaded):
            waits = self.reads_ahead or self.turns is not None
            if waits and not loaded.spoiled and not loaded.is_unpacked and self._is_next(loaded):
                loaded.used, self._ahead[loaded] = False, None  # as if it had been read ahead
            else:
                self._drop(loaded)
        elif not loaded.kept:
            loaded.kept, self._kept_bytes = True, self._kept_bytes + loaded.nbytes

    def _is_next(self, loaded: Loaded) -> bool:
        """Whether it is what has to be read next, if it leaves now; but for what is read by tiles and has room."""
        tiles_bytes = 0
        for key in self.retention.ahead():
            if not all(weight.tiled for weight in self.weights_of(key)):
                room_bytes = self.room_ahead_bytes() if tiles_bytes else None
                return not set(loaded.members).isdisjoint(key) and (room_bytes is None or room_bytes >= tiles_bytes)
            tiles_bytes = self.tiles_bytes
        return False

    def _may_stay(self, loaded: Loaded) -> bool:
        budget = self.memory_budget
        if budget is None or loaded.is_unpacked:
            return False
        if loaded.kept:
            return True
        self._forget_replaced()
        window_bytes = (1 + self.depth) * self._largest_bytes if self._total_bytes > budget else 0
        if self.retention.schedule is not None:
            if self.retention.streams and not self.retention.stays(loaded.members):
                return False
            window_bytes = self._unpacking_bytes  # the plan has seen to the rest
        room_bytes = budget - window_bytes - loaded.nbytes
        if self._kept_bytes <= room_bytes:
            return True
        if self.turns is not None:  # some workers may have used what would give way, and others not
            return False
        # The order is not known to repeat: in the place of what is predicted to be used later.
        others = [other for other in self._in_memory if other.kept and not self._is_held(other)]
        for other in self.retention.later(loaded, others, self._kept_bytes - room_bytes):
            self._drop(other)
        return self._kept_bytes <= room_bytes

    def _members(self, loaded: Loaded) -> list[Weight]:
        return [weight for weight in self.weights_of(loaded.members) if weight.loaded is loaded]

    def _is_held(self, loaded: Loaded) -> bool:
        return any(weight.holds for weight in self._members(loaded))

    def _drop(self, loaded: Loaded) -> None:
        if loaded.kept:
            loaded.kept, self._kept_bytes = False, self._kept_bytes - loaded.nbytes
        if not loaded.used:
            self._stats.wasted += not loaded.last_use
            self._ahead.pop(loaded, None)
        self._in_memory.pop(loaded, None)
        if loaded.is_unpacked:
            self._unpacked_bytes -= loaded.nbytes
        for weight in self._members(loaded):
            weight.state = State.OFFLOADED
            weight.tensor = weight.twin = weight.loaded = None
        room, loaded.room = loaded.room, None
        if room is None or not room.try_set_idle(self.pool):
            room = None  # or its memory would not be free yet
            self.pool.collect()

    def _forget_replaced(self) -> None:
        """Weights that users replaced are gone, and what they took of the budget is free."""
        if len(self._weights) != self._weights_seen:
            self._weights_seen = len(self._weights)
            whole = [weight for weight in list(self._weights.values()) if not weight.transient and not weight.parts]
            self._total_bytes = sum(
                block_bytes(aligned(weight.peak_load_bytes, _alignment(weight))) for weight in whole
            )
            for loaded in [loaded for loaded in self._in_memory if not self._members(loaded)]:
                self._drop(loaded)

    def _evict_one(self) -> bool:
        if self._tiles_ahead is not None:  # what is being read leaves when it is there
            self._tiles_ahead = None
            return True
        idle = [loaded for loaded in self._in_memory if not self._is_held(loaded)]
        if idle:
            self._drop(self.retention.victim(idle))
        return bool(idle)

    def reserve_in_window(self, weights: Sequence[Weight], places: Places) -> loading.Room | None:
        """Memory of the window for what streams now, in the place of what was read ahead in vain; None if it stays."""
        if not self.retention.streams or weights[0].parts or self._stays(weights):
            return None
        while True:
            room = self.try_reserve_ahead(weights, places)
            idle = [loaded for loaded in self._ahead if not self._is_held(loaded)] if room is None else []
            if not idle:
                return room
            self._drop(self.retention.victim(idle))

    def try_reserve_ahead(self, weights: Sequence[Weight], places: Places) -> loading.Room | None:
        """Memory for what is read ahead: of the window, if it streams; None where there is none now."""
        from_window = self.retention.streams and not self._stays(weights)
        return loading.try_reserve(
            self.pool, places, from_window=from_window, drop_cache=self.reading.drop_cache, readers=self.readers
        )

    def _stays(self, weights: Sequence[Weight]) -> bool:
        return self.retention.stays(tuple([weight.index for weight in weights]))

    def drop_ahead(self, wanted: Collection[Key]) -> None:
        """What was read ahead and is not used soon after all leaves."""
        tiles = self._tiles_ahead
        if not self._ahead and tiles is None:
            return
        members = {index for key in wanted for index in key}
        if tiles is not None and tiles.index not in members:
            self._tiles_ahead = None
        for loaded in [loaded for loaded in self._ahead if members.isdisjoint(loaded.members)]:
            self._drop(loaded)

    @property
    def reads_ahead(self) -> bool:
        return self._prefetcher is not None and not self.reads_inline

    @property
    def reads_inline(self) -> bool:
        """Reading ahead would cost more than it saves: there is nothing to copy."""
        return self.reading.mode == "mapped" and self.reading.is_cached

    def room_ahead_bytes(self) -> int | None:
        """What may be read ahead without taking the place of residents that are still to be loaded; None: no limit."""
        budget, schedule = self.memory_budget, self.retention.schedule
        if budget is None or schedule is None:
            return budget
        budget -= self._unpacking_bytes
        missing_bytes = max(0, budget - schedule.window_bytes - self._kept_bytes)
        in_use_bytes = self.pool.in_use_bytes() - min(self._unpacked_bytes, self._unpacking_bytes)
        return budget - in_use_bytes - missing_bytes
