"""From bytes in a store to tensors: places first, then memory, then reads, then conversions."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from pylomin.errors import StoreReadError, without_frames
from pylomin.io.buffers import BufferPool, Pages, aligned, block_bytes
from pylomin.io.files import Extent, WeightFile
from pylomin.io.modes import Mode
from pylomin.io.placed import Placement, place
from pylomin.io.syscalls import may_keep_mappings
from pylomin.residency.carrier import Carrier, Shipment, carrier_to
from pylomin.residency.device import is_streamed_to
from pylomin.residency.device_memory import Arrival, DeviceBytes
from pylomin.residency.readers import Readers
from pylomin.residency.unpacking import Unpacking
from pylomin.residency.weight import Layout, Source, Weight, outside_inference_mode, steps_of
from pylomin.store.base import InMemoryStore, ReadRequest, WeightStore
from pylomin.store.extents import StoredWeight, read_placed

if TYPE_CHECKING:
    from pylomin.residency.mapped_room import MappedRoom

Attach = Callable[[torch.Tensor], None]

ALONE = Readers()
MANY_RUNS = 16  # of a weight, from which on a mapping is cheaper than a read for each
SMALL_READ_BYTES = 64 << 10  # 64 KiB; so little is copied faster than it is mapped, and not worth a direct read


@dataclass(frozen=True, slots=True)
class Piece:
    """A weight as it is stored now, or runs of its elements, packed one after the other.

    Made under the lock of the residency: afterwards the weight may be written to, and this still is what it was.
    """

    source: Source
    conversions: tuple[Layout, ...]
    runs: tuple[tuple[int, int], ...] | None = None  # (first, last exclusive), counted as elements lie in memory
    unpacking: Unpacking | None = None  # if it is decoded here, and not by its store

    @staticmethod
    def of(weight: Weight, runs: Iterable[tuple[int, int]] | None = None) -> Piece:
        chosen = None if runs is None else tuple(runs)
        return Piece(weight.source, weight.conversions, chosen, Unpacking.of(weight, chosen) if weight.parts else None)

    @property
    def device(self) -> torch.device | None:
        """Where it is streamed to; None: nowhere, for it is read where it is used, or copied when it was read."""
        device = self.conversions[-1].device if self.conversions else self.source.layout.device
        return device if is_streamed_to(device) else None

    def to_read(self) -> list[Piece]:
        """Itself, or those of its parts that are not in memory."""
        if self.unpacking is None:
            return [self]
        device = self.device
        return [
            Piece(source, () if device is None else (replace(source.layout, device=device),), runs)
            for source, runs in self.unpacking.missing
        ]

    def layouts(self) -> list[Layout]:
        """The stored tensor's (of one that is decoded here, the decoded one's), then one for each conversion."""
        steps = [*steps_of(self.source, self.conversions, decoded=self.unpacking is not None)]
        if self.runs is None:
            return steps
        shape = (sum(stop - start for start, stop in self.runs),)
        return [replace(step, shape=shape, stride=(1,)) for step in steps]

    @property
    def stored(self) -> StoredWeight | None:
        """Where in a file it is, if that is one run of bytes."""
        return self.source.stored if self.runs is None or len(self.runs) == 1 else None

    def extents(self, stored: StoredWeight) -> list[Extent]:
        if self.runs is None:
            return [stored.extent]
        begin, itemsize = stored.extent.start, self.source.layout.dtype.itemsize
        return [Extent(begin + start * itemsize, begin + stop * itemsize) for start, stop in self.runs]

    def requests(self, destination: memoryview) -> list[ReadRequest]:
        name, itemsize = self.source.name, self.source.layout.dtype.itemsize
        if self.runs is None:
            return [ReadRequest(name, 0, destination)]
        requests, position = [], 0
        for start, stop in self.runs:
            end = position + (stop - start) * itemsize
            requests.append(ReadRequest(name, start * itemsize, destination[position:end]))
            position = end
        return requests

    def bytes_in_memory(self, first: int, nbytes: int) -> torch.Tensor:
        """Some of the stored bytes, where the store has them in memory; no copy."""
        assert self.source.memory is not None
        stored = self.source.memory.tensor(self.source.name).detach()
        return stored.reshape(-1).view(torch.uint8)[first : first + nbytes]

    def stored_tensor(self, store: InMemoryStore) -> torch.Tensor:
        """The values where the store has them in memory; no copy but of more than one run."""
        layout = self.source.layout
        stored = store.tensor(self.source.name).detach()
        if self.runs is None:
            return _copied_when_written(stored).as_strided(layout.shape, layout.stride)
        runs = [stored.as_strided((b - a,), (1,), stored.storage_offset() + a) for a, b in self.runs]
        return runs[0] if len(runs) == 1 else torch.cat(runs) if runs else stored.new_empty(0)


def _copied_when_written(stored: torch.Tensor) -> torch.Tensor:
    """The same memory until somebody writes to what is returned."""
    try:
        return torch._lazy_clone(stored)
    except RuntimeError:
        return stored.clone()


@dataclass(frozen=True, slots=True)
class _FromFile:
    """Pieces that are extents of one file, and where they come to lie."""

    file: WeightFile
    pieces: tuple[int, ...]  # positions in the list that is loaded
    names: tuple[str, ...]
    placement: Placement


class Places:
    """Where a list of pieces comes to lie in memory. Worked out once for what is loaded again and again."""

    __slots__ = (
        "carriers",
        "converted",
        "decoded",
        "from_files",
        "idle_room",
        "is_mapped",
        "layouts",
        "mode",
        "packed",
        "packed_bytes",
        "peak_bytes",
        "pieces",
        "read_bytes",
        "read_layouts",
        "resident_bytes",
        "shipments",
        "to_read",
    )

    def __init__(self, pieces: Sequence[Piece], mode: Mode, *, whole_huge: bool = False) -> None:
        self.mode = mode
        self.idle_room: MappedRoom | None = None  # of an earlier load
        self.pieces = tuple(pieces)
        self.layouts = [piece.layouts() for piece in pieces]
        self.to_read = [read for piece in pieces for read in piece.to_read()]
        self.read_layouts = [piece.layouts()[0] for piece in self.to_read]  # as they are stored
        self.read_bytes = 0
        self.packed: list[tuple[int, int]] = []  # (piece, offset) of those that a store reads itself
        self.packed_bytes = 0
        by_file: dict[WeightFile, list[tuple[int, Extent]]] = {}
        by_device: dict[torch.device, list[tuple[int, Piece]]] = {}
        for i, piece in enumerate(self.to_read):
            nbytes = self.read_layouts[i].nbytes
            self.read_bytes += nbytes
            if nbytes and (device := piece.device) is not None:
                by_device.setdefault(device, []).append((i, piece))
                continue
            if piece.source.memory is not None or nbytes == 0:
                continue
            if (stored := piece.stored) is not None:
                by_file.setdefault(stored.file, []).append((i, piece.extents(stored)[0]))
            else:
                self.packed.append((i, self.packed_bytes))
                self.packed_bytes += aligned(nbytes)
        self.from_files = [_from_file(file, placed, self.to_read, mode, whole_huge) for file, placed in by_file.items()]
        # The devices that pieces are streamed to, or decoded on.
        self.carriers = {device: carrier_to(device) for piece in pieces if (device := piece.device) is not None}
        self.shipments = [
            Shipment.of(self.carriers[device], of_device, direct=mode == "direct")
            for device, of_device in by_device.items()
        ]
        # What pieces are decoded and converted into, each into memory of its own.
        self.decoded = [
            layouts[0]
            for piece, layouts in zip(pieces, self.layouts, strict=True)
            if piece.unpacking is not None and layouts[0].nbytes
        ]
        self.converted = [layout for layouts in self.layouts for layout in layouts[1:]]
        # Whole weights, used where the file is mapped, as long as the system does not refuse that; and can be again.
        self.is_mapped = (
            0 < sum([len(part.pieces) for part in self.from_files]) == len(self.to_read)
            and all(piece.runs is None for piece in pieces)
            and all(part.placement.is_mapped for part in self.from_files)
            and not (self.decoded or self.converted)
            and may_keep_mappings()
        )
        buffer_bytes = block_bytes(self.packed_bytes) + sum(part.placement.memory_bytes for part in self.from_files)
        buffer_bytes += sum(block_bytes(shipment.nbytes, shipment.carrier) for shipment in self.shipments)
        decoded_bytes = sum(block_bytes(layout.nbytes, self.carrier_of(layout)) for layout in self.decoded)
        converted_bytes = sum(map(self._converted_bytes, self.converted))
        # Memory that loading takes at one time, as the pool counts it; and what of that stays: the last conversion of
        # each piece, or what it was read or decoded into.
        self.peak_bytes = self.resident_bytes = buffer_bytes + decoded_bytes + converted_bytes
        if all(len(layouts) > 1 for layouts in self.layouts):
            self.resident_bytes = sum(self._converted_bytes(layouts[-1]) for layouts in self.layouts)
        elif all(piece.unpacking is not None for piece in pieces):
            self.resident_bytes = decoded_bytes + converted_bytes

    def carrier_of(self, layout: Layout) -> Carrier | None:
        """What brings it to its device; None where nothing has to."""
        return self.carriers.get(layout.device) if self.carriers else None

    def _converted_bytes(self, layout: Layout) -> int:
        carrier = self.carrier_of(layout)
        return layout.nbytes if carrier is None else block_bytes(layout.nbytes, carrier)

    @property
    def is_pinned(self) -> bool:
        """There is nothing to read, so that beginning to load takes no time."""
        return (
            bool(self.shipments) and not (self.from_files or self.packed) and all(s.is_pinned for s in self.shipments)
        )

    def of_weights(self, weights: Sequence[Weight]) -> bool:
        """Whether these are the places of ``weights`` as they are stored now."""
        for piece, weight in zip(self.pieces, weights, strict=True):
            if piece.source is not weight.source or piece.conversions is not weight.conversions:
                return False
        return True


def _from_file(
    file: WeightFile, placed: Sequence[tuple[int, Extent]], pieces: Sequence[Piece], mode: Mode, whole_huge: bool
) -> _FromFile:
    extents = [extent for _, extent in placed]
    small = sum(extent.nbytes for extent in extents) < SMALL_READ_BYTES
    names = tuple(pieces[i].source.name for i, _ in placed)
    placement = place(extents, "buffered" if small else mode, whole_huge=whole_huge)
    return _FromFile(file, tuple(i for i, _ in placed), names, placement)


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
        with torch.inference_mode(False), torch.no_grad():
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
        with torch.inference_mode(False), torch.no_grad():
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
