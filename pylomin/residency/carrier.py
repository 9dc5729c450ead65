"""Brings bytes of weights to one device: read into the ring, copied behind the computation."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from pylomin.io.buffers import ALIGNMENT_BYTES, aligned
from pylomin.io.files import WeightFile
from pylomin.residency.chunks import FileChunk, StoreChunk, Wanted, file_chunks, store_chunks
from pylomin.residency.device import Device, Event, device_of
from pylomin.residency.device_memory import DeviceBytes, DeviceMemory
from pylomin.residency.memory_limits import memory_limits
from pylomin.residency.pinned import is_pinned
from pylomin.residency.readers import Readers
from pylomin.residency.ring import SLOT_BYTES, SLOTS, Ring, Slot
from pylomin.store.base import ReadRequest, WeightStore
from pylomin.store.extents import read_range
from pylomin.store.quantized import check_scales

if TYPE_CHECKING:
    from pylomin.residency.piece import Piece

DEVICE_ALIGNMENT_BYTES = 512  # of each tensor, as torch's own allocator gives: kernels, and so results, depend on it
LEAST_SLOTS = 2
HOST_SHARE = 8  # of the host's free memory that the ring takes at most


class Carrier:
    """One for each device; its ring is allocated once, with the first weights that need it.

    It is also the space that blocks of device memory are made of.

    Args:
        slot_bytes: see :class:`Ring`.
        slots: the most; fewer where the host has little memory.
    """

    alignment_bytes = DEVICE_ALIGNMENT_BYTES

    def __init__(self, device: Device, *, slot_bytes: int = SLOT_BYTES, slots: int = SLOTS) -> None:
        self.device = device
        self.slot_bytes = slot_bytes
        self._slots = slots
        self._ring: Ring | None = None
        self._lock = threading.Lock()
        # Host tensors that copies were begun from, until those have ended.
        self._sources: deque[tuple[Event, list[torch.Tensor]]] = deque()
        weakref.finalize(self, _await, self._sources).atexit = False

    @property
    def ring_bytes(self) -> int:
        """Of host memory; 0 while nothing needed it."""
        return 0 if self._ring is None else self._ring.nbytes

    def ring(self) -> Ring:
        with self._lock:
            if self._ring is None:
                self._ring = self._make_ring()
            return self._ring

    def _make_ring(self) -> Ring:
        available_bytes = memory_limits().available_bytes
        slots = self._slots
        if available_bytes is not None:
            slots = max(LEAST_SLOTS, min(slots, available_bytes // HOST_SHARE // self.slot_bytes))
        return Ring(self.device, self.slot_bytes, slots)

    # -- the space of blocks ----------------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> DeviceMemory:
        return DeviceMemory(self.device, nbytes)

    def hand_out(self, memory: DeviceMemory, offset_bytes: int, nbytes: int) -> DeviceBytes:
        return DeviceBytes(memory, offset_bytes, nbytes)

    def take_back(self, memory: DeviceMemory, offset_bytes: int, nbytes: int, uses: set[Hashable]) -> None:
        for stream in uses:
            memory.fence(offset_bytes, offset_bytes + nbytes, self.device.record(stream))

    # -- copies -----------------------------------------------------------------------------------------------------

    def ship(
        self,
        shipment: Shipment,
        pieces: Sequence[Piece],
        target: torch.Tensor,
        *,
        drop_cache: bool,
        readers: Readers,
    ) -> None:
        """Read, and begin to copy, in the stream that is the current one.

        Args:
            pieces: those that the shipment counts.
            target: 1-D, uint8, on the device.
            readers: of files, and of memory that is not pinned.

        Raises:
            StoreReadError: what was begun before goes on; ``target`` holds nothing of meaning.
        """
        self._forget_copied()
        parts: list[Part] = []
        for one in shipment.in_memory:
            parts += self._copy_pinned(one, pieces[one.piece], target)
        for file, chunk in shipment.in_files:
            parts.append(partial(self._read_and_copy, chunk, file, shipment, pieces, target, drop_cache))
        stream = self.device.current_stream()
        if parts:
            readers.run(self._in_slots(parts), len(parts), lambda: self._reading_into(stream))
        # Stores have threads of their own, or do not want several.
        asked = [partial(self._ask_and_copy, chunk, pieces, target) for chunk in shipment.in_stores]
        for step in self._in_slots(asked):
            step()

    @contextmanager
    def _reading_into(self, stream: Hashable) -> Iterator[None]:
        with self.device.on(stream), torch.inference_mode(False), torch.no_grad():
            yield

    def _in_slots(self, parts: Iterable[Part]) -> Iterator[Callable[[], None]]:
        """One step for each part, in whose turn a slot is claimed: so whoever has one waits for no other."""
        for part in parts:
            ring = self.ring()
            yield partial(_fill, part, ring, ring.take())

    def _read_and_copy(
        self,
        chunk: FileChunk,
        file: WeightFile,
        shipment: Shipment,
        pieces: Sequence[Piece],
        target: torch.Tensor,
        drop_cache: bool,
        ring: Ring,
        slot: Slot,
    ) -> None:
        names = [pieces[copy.piece].source.name for copy in chunk.copies]
        view = ring.view(slot)
        at = read_range(file, chunk.start, chunk.nbytes, view, names, direct=shipment.direct, drop_cache=drop_cache)
        for copy in chunk.copies:
            self._copy(ring, slot, at + copy.source, copy.nbytes, target, copy.target, pieces[copy.piece])

    def _ask_and_copy(
        self, chunk: StoreChunk, pieces: Sequence[Piece], target: torch.Tensor, ring: Ring, slot: Slot
    ) -> None:
        view = ring.view(slot)
        stores: dict[int, tuple[WeightStore, list[ReadRequest]]] = {}
        for read in chunk.reads:
            source = pieces[read.piece].source
            destination = view[read.source : read.source + read.nbytes]
            request = ReadRequest(source.name, read.offset_bytes, destination)
            stores.setdefault(id(source.store), (source.store, []))[1].append(request)
        for store, requests in stores.values():
            store.read(requests)
        for copy in chunk.copies:
            self._copy(ring, slot, copy.source, copy.nbytes, target, copy.target, pieces[copy.piece])

    def _copy(
        self, ring: Ring, slot: Slot, first: int, nbytes: int, target: torch.Tensor, at: int, piece: Piece
    ) -> None:
        source = ring.bytes(slot, first, nbytes)
        _check(piece, source)
        self.device.copy(target[at : at + nbytes], source)

    def _copy_pinned(self, one: Wanted, piece: Piece, target: torch.Tensor) -> Iterator[Part]:
        """Begin the copy; of memory that is not pinned, what brings it through the ring."""
        source = piece.bytes_in_memory(one.first, one.nbytes)
        _check(piece, source)
        if is_pinned(source):
            self.device.copy(target[one.target : one.target + one.nbytes], source)
            self._keep(source)
            return
        for first in range(0, one.nbytes, self.slot_bytes):
            last = min(first + self.slot_bytes, one.nbytes)
            yield partial(self._copy_twice, source[first:last], target[one.target + first : one.target + last])

    def _copy_twice(self, source: torch.Tensor, target: torch.Tensor, ring: Ring, slot: Slot) -> None:
        pinned = ring.bytes(slot, 0, source.nbytes)
        pinned.copy_(source)
        self.device.copy(target, pinned)

    def _keep(self, source: torch.Tensor) -> None:
        self._sources.append((self.device.record(self.device.current_stream()), [source]))

    def _forget_copied(self) -> None:
        with self._lock:  # or what another thread puts in the first place would go
            while self._sources and self._sources[0][0].query():
                self._sources.popleft()


Part = Callable[[Ring, Slot], None]
"""Fills a slot, and begins the copies from it."""


def _fill(part: Part, ring: Ring, slot: Slot) -> None:
    try:
        part(ring, slot)
    finally:
        slot.release()


@dataclass(frozen=True, slots=True)
class Shipment:
    """What of some pieces has to be copied to one device, from where, and where it comes to lie there."""

    carrier: Carrier
    pieces: tuple[int, ...]
    offsets: tuple[int, ...]  # of each, on the device
    nbytes: int
    direct: bool  # past the page cache
    in_memory: tuple[Wanted, ...]
    in_files: tuple[tuple[WeightFile, FileChunk], ...]
    in_stores: tuple[StoreChunk, ...]
    is_pinned: bool  # there is nothing to read, so that beginning the copies takes no time

    @staticmethod
    def of(carrier: Carrier, pieces: Sequence[tuple[int, Piece]], *, direct: bool) -> Shipment:
        offsets, end = [], 0
        in_memory: list[Wanted] = []
        by_file: dict[WeightFile, list[Wanted]] = {}
        of_stores: list[Wanted] = []
        for i, piece in pieces:
            layout = piece.layouts()[0]
            offsets.append(end)
            wanted = _wanted(i, piece, end)
            end = aligned(end + layout.nbytes, DEVICE_ALIGNMENT_BYTES)
            if piece.source.memory is not None:
                in_memory += wanted
            elif (stored := piece.stored) is not None:
                start = stored.extent.start
                by_file.setdefault(stored.file, []).extend(
                    Wanted(i, start + one.first, one.nbytes, one.target, one.itemsize) for one in wanted
                )
            else:
                of_stores += wanted
        most_bytes = carrier.slot_bytes
        is_pinned = not by_file and not of_stores and all(_is_pinned(piece) for _, piece in pieces)
        return Shipment(
            carrier,
            tuple(i for i, _ in pieces),
            tuple(offsets),
            end,
            direct,
            tuple(in_memory),
            tuple((file, chunk) for file, of_file in by_file.items() for chunk in file_chunks(of_file, most_bytes)),
            tuple(store_chunks(of_stores, most_bytes, ALIGNMENT_BYTES)),
            is_pinned,
        )


def _wanted(i: int, piece: Piece, target: int) -> list[Wanted]:
    """Its runs, in bytes, one after the other on the device."""
    itemsize = piece.source.layout.dtype.itemsize
    found = []
    for start, stop in ((0, piece.source.layout.numel),) if piece.runs is None else piece.runs:
        if stop > start:
            found.append(Wanted(i, start * itemsize, (stop - start) * itemsize, target, itemsize))
            target += (stop - start) * itemsize
    return found


def _is_pinned(piece: Piece) -> bool:
    return is_pinned(piece.bytes_in_memory(0, piece.source.layout.nbytes))


def _check(piece: Piece, source: torch.Tensor) -> None:
    """Scales are looked at on the host: on the device it would have to wait for the answer."""
    scales_of = piece.source.scales_of
    if scales_of is not None:
        check_scales(source.view(piece.source.layout.dtype), scales_of, piece.source.store.describe(piece.source.name))


def _await(sources: deque[tuple[Event, list[torch.Tensor]]]) -> None:
    while sources:
        sources.popleft()[0].synchronize()


_carriers: weakref.WeakValueDictionary[torch.device, Carrier] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def carrier_to(device: torch.device) -> Carrier:
    """One for all models whose weights go to ``device``; it goes, with its ring, when the last of them has gone."""
    with _lock:
        carrier = _carriers.get(device)
        if carrier is None:
            carrier = _carriers[device] = Carrier(device_of(device))
        return carrier
