"""From bytes in a store to tensors: memory first, then reads, then conversions."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from pylomin.errors import StoreReadError, without_frames
from pylomin.io.buffers import BufferPool, Pages
from pylomin.residency.device_memory import Arrival, DeviceBytes
from pylomin.residency.piece import Piece
from pylomin.residency.places import Places
from pylomin.residency.readers import Readers
from pylomin.residency.weight import Layout, outside_inference_mode
from pylomin.store.base import ReadRequest, WeightStore
from pylomin.store.extents import read_placed

Attach = Callable[[torch.Tensor], None]

ALONE = Readers()
MANY_RUNS = 16  # of a weight, from which on a mapping is cheaper than a read for each


class Room:
    """Memory for a list of pieces, and what brings them there. What is not used goes back when this object dies."""

    __slots__ = (
        "_buffers",
        "_conversions",
        "_decoded",
        "_drop_cache",
        "_packed",
        "_readers",
        "_shipped",
        "arrivals",
        "mapped",
        "places",
    )

    again = False  # what is mapped is mapped already, and was dropped since

    def __init__(self, places: Places, *, drop_cache: bool = False, readers: Readers = ALONE) -> None:
        self.places = places
        self.arrivals: tuple[Arrival, ...] = ()  # of what was loaded, for each device
        self.mapped: tuple[Pages, ...] = ()  # once it is loaded, for each file, if all that was done is mapping it
        self._drop_cache = drop_cache
        self._readers = readers
        self._buffers: list[Any] = []  # for each file
        self._packed: ctypes.Array[ctypes.c_char] | None = None
        self._shipped: list[DeviceBytes] = []  # for each shipment
        self._decoded: list[Any] = []
        self._conversions: list[Attach | DeviceBytes | None] = []

    def try_take(self, pool: BufferPool, *, from_window: bool = False) -> bool:
        """Take the memory; False where the budget leaves none."""
        places = self.places
        for part in places.from_files:
            buffer = part.placement.try_take(pool, from_window=from_window)
            if buffer is None:
                return False
            self._buffers.append(buffer)
        if places.packed_bytes:
            self._packed = pool.try_take(places.packed_bytes, from_window=from_window)
            if self._packed is None:
                return False
        for shipment in places.shipments:
            shipped = pool.try_take(shipment.nbytes, from_window=from_window, space=shipment.carrier)
            if shipped is None:
                return False
            self._shipped.append(shipped)
        for layout in places.decoded:
            decoded = pool.try_take(layout.nbytes, of_any_block=True, space=places.carrier_of(layout))
            if decoded is None:
                return False
            self._decoded.append(decoded)
        for layout in places.converted:
            carrier = places.carrier_of(layout)
            if carrier is None:
                attach = pool.try_adopt(layout.nbytes)
            elif layout.nbytes:
                attach = pool.try_take(layout.nbytes, of_any_block=True, space=carrier)
            else:
                self._conversions.append(None)
                continue
            if attach is None:
                return False
            self._conversions.append(attach)
        return True

    def load(self, *, urgent: bool = False) -> list[torch.Tensor]:
        """Read and convert; one tensor for each piece, in the execution layout. Once; needs no lock.

        On a device they need not be there yet: what uses them calls :meth:`use` first.

        Args:
            urgent: somebody waits. On a device, they come before what is read ahead.
        """
        # Loading is no part of what surrounds it: transforms, and modes that watch or fake operations.
        with torch._C._DisableFuncTorch():
            if not torch._C._len_torch_dispatch_stack():  # the common case; importing what disables modes is slow
                return self._load(urgent)
            with _disable_current_modes():
                return self._load(urgent)

    def use(self) -> None:
        """What this thread begins from now on finds the tensors there."""
        for arrival in self.arrivals:
            arrival.use()

    def _load(self, urgent: bool) -> list[torch.Tensor]:
        try:
            if not self.places.carriers:
                return self._read_and_convert()
            return self._load_on_devices(urgent)
        except BaseException as error:
            raise without_frames(error)  # noqa: B904
        finally:
            self._clear()

    def _read_and_convert(self) -> list[torch.Tensor]:
        tensors = self._read()
        if self._decoded or self.places.decoded:
            tensors = self._decode(tensors)
        if self._conversions:
            self._convert(tensors)
        return tensors

    def _load_on_devices(self, urgent: bool) -> list[torch.Tensor]:
        """In streams for copies; where nothing has to be copied, in the current ones, which wait for no copy."""
        shipped_to = {shipment.carrier for shipment in self.places.shipments}
        with ExitStack() as streams:
            for carrier in self.places.carriers.values():
                if carrier in shipped_to:
                    device = carrier.device
                    streams.enter_context(device.on(device.urgent_stream if urgent else device.copy_stream))
            tensors = self._read_and_convert()
            for carrier in self.places.carriers.values():
                # Also of what was only on the way, and is free again: its uses end with this, too.
                out = [*self._shipped, *self._decoded, *self._conversions]
                uses = [part.uses for part in out if isinstance(part, DeviceBytes) and part.is_of(carrier.device)]
                self.arrivals += (Arrival(carrier.device, uses),)
        return tensors

    def _clear(self) -> None:
        """Give the memory back as far as no tensor views it."""
        self._packed = None
        self._buffers.clear()
        self._shipped.clear()
        self._decoded.clear()
        self._conversions.clear()

    def _read(self) -> list[torch.Tensor]:
        places = self.places
        placed: list[tuple[Any, int] | None] = [None] * len(places.to_read)  # buffer, offset
        mapped = places.is_mapped
        for part, buffer in zip(places.from_files, self._buffers, strict=True):
            mapped &= read_placed(
                part.file, part.placement, part.names, buffer, drop_cache=self._drop_cache, again=self.again
            )
            for i, offset in zip(part.pieces, part.placement.offsets, strict=True):
                placed[i] = (buffer, offset)
        if self._packed is not None:
            self._read_packed(self._packed, placed)
        with outside_inference_mode():
            for shipment, shipped in zip(places.shipments, self._shipped, strict=True):
                target = shipped.begin()
                shipment.carrier.ship(
                    shipment, places.to_read, target, drop_cache=self._drop_cache, readers=self._readers
                )
                for i, offset in zip(shipment.pieces, shipment.offsets, strict=True):
                    placed[i] = (shipped, offset)
            tensors = list(map(_tensor, places.to_read, places.read_layouts, placed))
        if mapped and not self.again:
            self.mapped = tuple(self._buffers)
        return tensors

    def _decode(self, read: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What was read, with the pieces that are decoded from it in the place of their parts."""
        rest, buffers, tensors = iter(read), iter(self._decoded), []
        with outside_inference_mode(), torch.no_grad():
            for piece, layouts in zip(self.places.pieces, self.places.layouts, strict=True):
                if piece.unpacking is None:
                    tensors.append(next(rest))
                    continue
                buffer = next(buffers)
                if isinstance(buffer, DeviceBytes):
                    buffer.begin()
                values = _tensor(piece, layouts[0], (buffer, 0))
                piece.unpacking.decode(piece.source, rest, values)
                tensors.append(values)
        return tensors

    def _read_packed(self, buffer: ctypes.Array[ctypes.c_char], placed: list[tuple[Any, int] | None]) -> None:
        view = memoryview(buffer).cast("B")
        requests: dict[int, tuple[WeightStore, list[ReadRequest]]] = {}
        for i, offset in self.places.packed:
            piece = self.places.to_read[i]
            destination = view[offset : offset + self.places.read_layouts[i].nbytes]
            store = piece.source.store
            placed[i] = (buffer, offset)
            if not self._copy_cached(piece, destination):
                _announce(piece)
                requests.setdefault(id(store), (store, []))[1].extend(piece.requests(destination))
        for store, wanted in requests.values():
            store.read(wanted)

    def _copy_cached(self, piece: Piece, destination: memoryview) -> bool:
        """Rows that lie scattered in a file that is in the page cache."""
        stored = piece.source.stored
        if self.places.mode != "mapped" or stored is None or piece.runs is None or len(piece.runs) < MANY_RUNS:
            return False
        try:
            return stored.file.copy_cached(piece.extents(stored), destination)
        except StoreReadError as error:
            raise type(error)(f"could not read weight {piece.source.name!r}: {error}") from error

    def _convert(self, tensors: list[torch.Tensor]) -> None:
        memory = iter(self._conversions)
        with outside_inference_mode(), torch.no_grad():
            for i, layouts in enumerate(self.places.layouts):
                for layout in layouts[1:]:
                    at = next(memory)
                    converted = _shaped(at.begin(), layout) if isinstance(at, DeviceBytes) else layout.empty()
                    converted.copy_(tensors[i])
                    if at is not None and not isinstance(at, DeviceBytes):
                        at(converted)
                    tensors[i] = converted


def _tensor(piece: Piece, layout: Layout, where: tuple[Any, int] | None) -> torch.Tensor:
    """What was read, or is decoded, there: (buffer, offset)."""
    if where is None:
        memory = piece.source.memory if piece.device is None else None
        return layout.empty() if memory is None else piece.stored_tensor(memory)
    buffer, offset = where
    if isinstance(buffer, DeviceBytes):
        return _shaped(buffer.tensor(offset, layout.nbytes), layout)
    flat = torch.frombuffer(buffer, dtype=layout.dtype, count=layout.numel, offset=offset)
    if piece.runs is not None or layout.shape == flat.shape:
        return flat
    return flat.as_strided(layout.shape, layout.stride)


def _shaped(values: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Bytes (1-D, uint8) as a tensor of this layout."""
    return values[: layout.nbytes].view(layout.dtype).as_strided(layout.shape, layout.stride)


def _announce(piece: Piece) -> None:
    """Rows that lie scattered in a file: the disk may look for all of them at once."""
    stored = piece.source.stored
    if stored is not None and piece.runs is not None and len(piece.runs) >= MANY_RUNS:
        for extent in piece.extents(stored):
            stored.file.prefetch_hint(extent.start, extent.nbytes)


def try_reserve(
    pool: BufferPool,
    places: Places,
    *,
    from_window: bool = False,
    drop_cache: bool = False,
    readers: Readers = ALONE,
) -> Room | None:
    """Room for the pieces, or None where the budget leaves none."""
    if places.idle_room is not None:
        return places.idle_room.try_use_again(pool, places)
    room = Room(places, drop_cache=drop_cache, readers=readers)
    return room if room.try_take(pool, from_window=from_window) else None
