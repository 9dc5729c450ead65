"""From bytes in a store to tensors: places first, then memory, then reads, then conversions."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from pylomin.errors import without_frames
from pylomin.io.buffers import PAGE_BYTES, BufferPool, aligned, block_bytes
from pylomin.io.files import Extent, WeightFile
from pylomin.io.modes import Mode
from pylomin.io.placed import Placement, place
from pylomin.quantize.packing import CHUNK_BYTES, Packing
from pylomin.residency.reading import Reading
from pylomin.residency.weight import Layout, Source, Weight, steps_of
from pylomin.store.base import InMemoryStore, ReadRequest, WeightStore
from pylomin.store.extents import StoredWeight, read_placed
from pylomin.store.quantized import check_scales

Attach = Callable[[torch.Tensor], None]

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

    def layouts(self) -> list[Layout]:
        """The stored tensor's (of one that is decoded here, the decoded one's), then one for each conversion."""
        steps: Sequence[Layout] = [self.source.layout, *self.conversions]
        if self.unpacking is not None:
            steps = steps_of(self.source, self.conversions)
        if self.runs is None:
            return [*steps]
        shape = (sum(stop - start for start, stop in self.runs),)
        return [replace(step, shape=shape, stride=(1,)) for step in steps]

    @property
    def stored_bytes(self) -> int:
        return self.layouts()[0].nbytes

    @property
    def to_read(self) -> tuple[Piece, ...]:
        """Itself, or those of its parts that are not in memory."""
        return (self,) if self.unpacking is None else self.unpacking.missing

    @property
    def read_bytes(self) -> int:
        """What loading it reads."""
        return sum([piece.stored_bytes for piece in self.to_read])

    @property
    def stored(self) -> StoredWeight | None:
        """Where in a file it is, if that is one run of bytes."""
        return self.source.stored if self.runs is None or len(self.runs) == 1 else None

    def extent(self, stored: StoredWeight) -> Extent:
        if self.runs is None:
            return stored.extent
        (start, stop), itemsize = self.runs[0], self.source.layout.dtype.itemsize
        return Extent(stored.extent.start + start * itemsize, stored.extent.start + stop * itemsize)

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

    def stored_tensor(self, store: InMemoryStore) -> torch.Tensor:
        """The values where the store has them in memory; no copy but of more than one run."""
        layout = self.source.layout
        stored = store.tensor(self.source.name).detach()
        if self.runs is None:
            return _copied_when_written(stored).as_strided(layout.shape, layout.stride)
        runs = [stored.as_strided((b - a,), (1,), stored.storage_offset() + a) for a, b in self.runs]
        return runs[0] if len(runs) == 1 else torch.cat(runs) if runs else stored.new_empty(0)


@dataclass(frozen=True, slots=True)
class Unpacking:
    """Whole rows of a quantised weight, decoded from parts that are in memory or are read for this."""

    packing: Packing
    rows: tuple[tuple[int, int], ...]  # (first, last exclusive) of its matrix
    parts: tuple[torch.Tensor | None, ...]  # all rows, where they are in memory
    missing: tuple[Piece, ...]  # in the order of parts

    @staticmethod
    def of(weight: Weight, runs: tuple[tuple[int, int], ...] | None) -> Unpacking | None:
        """None where the runs are no whole rows, or are none."""
        packing = weight.source.packing
        assert packing is not None
        count, columns = packing.matrix_shape
        rows = [(0, count * columns)] if runs is None else runs
        if not columns or not rows or any(start % columns or stop % columns for start, stop in rows):
            return None
        rows = tuple((start // columns, stop // columns) for start, stop in rows)
        parts = tuple(None if part.tensor is None else part.tensor.detach() for part in weight.parts)
        missing = []
        for part, in_memory, (_, width) in zip(weight.parts, parts, packing.part_rows(), strict=True):
            if in_memory is None:
                of_part = None if runs is None else tuple((first * width, last * width) for first, last in rows)
                missing.append(Piece(part.source, (), of_part))
        return Unpacking(packing, rows, parts, tuple(missing))

    def decode(self, name: str, path: str, read: Iterator[torch.Tensor], out: torch.Tensor) -> None:
        """Into ``out``, from what is in memory and what was read of ``missing``."""
        count = sum(last - first for first, last in self.rows)
        chosen = tuple(
            next(read).view(count, width) if part is None else self._rows_of(part.view(-1, width))
            for part, (_, width) in zip(self.parts, self.packing.part_rows(), strict=True)
        )
        if self.packing.has_scales:
            check_scales(chosen[1], name, path)
        matrix = out.view(count, self.packing.matrix_shape[1])
        # In pieces that stay in the processor's cache.
        step = max(1, CHUNK_BYTES // max(1, self.packing.row_bytes))
        for first in range(0, count, step):
            self.packing.decode_rows(tuple(part[first : first + step] for part in chosen), matrix[first : first + step])

    def _rows_of(self, part: torch.Tensor) -> torch.Tensor:
        if len(self.rows) == 1:
            return part[slice(*self.rows[0])]
        return part.index_select(0, torch.cat([torch.arange(first, last) for first, last in self.rows]))


def _copied_when_written(stored: torch.Tensor) -> torch.Tensor:
    """The same memory until somebody writes to what is returned."""
    try:
        return torch._lazy_clone(stored)
    except RuntimeError:
        return stored.clone()


@dataclass(slots=True)
class _FromFile:
    """Pieces that are extents of one file, and where they come to lie."""

    file: WeightFile
    pieces: list[int] = field(default_factory=list)  # positions in the list that is loaded
    extents: list[Extent] = field(default_factory=list)
    placement: Placement = field(init=False)
    buffer: Any = None

    def place(self, mode: Mode) -> None:
        small = sum(extent.nbytes for extent in self.extents) < SMALL_READ_BYTES
        self.placement = place(self.extents, "buffered" if small else mode)

    @property
    def memory_bytes(self) -> int:
        placement = self.placement
        if placement.mode == "mapped":
            return aligned(placement.buffer_bytes, PAGE_BYTES)
        return block_bytes(placement.buffer_bytes)


class Room:
    """Where a list of pieces comes to lie in memory; what each of them is read from and converted to."""

    def __init__(self, pieces: Sequence[Piece], reading: Reading) -> None:
        self.pieces = pieces
        self.to_read = [read for piece in pieces for read in piece.to_read]
        self.reading = reading
        self.from_files: dict[int, _FromFile] = {}  # by id of the file
        self.packed: list[tuple[int, int]] = []  # (piece, offset) of those that a store reads itself
        self.packed_bytes = 0
        self.buffer: ctypes.Array[ctypes.c_char] | None = None
        self.decoded: list[ctypes.Array[ctypes.c_char]] = []  # what pieces are decoded into, in their order
        self.conversions: list[Attach] = []
        for i, piece in enumerate(self.to_read):
            nbytes = piece.stored_bytes
            if piece.source.memory is not None or nbytes == 0:
                continue
            if (stored := piece.stored) is not None:
                part = self.from_files.setdefault(id(stored.file), _FromFile(stored.file))
                part.pieces.append(i)
                part.extents.append(piece.extent(stored))
            else:
                self.packed.append((i, self.packed_bytes))
                self.packed_bytes += aligned(nbytes)
        for part in self.from_files.values():
            part.place(reading.mode)

    @property
    def stored_bytes(self) -> int:
        """Memory that the stored bytes are read into."""
        return block_bytes(self.packed_bytes) + sum(part.memory_bytes for part in self.from_files.values())

    @property
    def decoded_bytes(self) -> list[int]:
        """Memory for each piece that is decoded."""
        return [piece.stored_bytes for piece in self.pieces if piece.unpacking is not None and piece.stored_bytes]

    @property
    def read_bytes(self) -> int:
        """What is read, of the bytes that were wanted."""
        return sum([piece.stored_bytes for piece in self.to_read])

    @property
    def converted_bytes(self) -> list[int]:
        return [step.nbytes for piece in self.pieces for step in piece.layouts()[1:]]

    @property
    def peak_bytes(self) -> int:
        """Memory that loading takes at one time, as the pool counts it."""
        return self.stored_bytes + sum(map(block_bytes, self.decoded_bytes)) + sum(self.converted_bytes)

    @property
    def resident_bytes(self) -> int:
        """Memory that stays when all is loaded: the last conversion of each piece, or what it was read into."""
        if all(piece.conversions for piece in self.pieces):
            return sum(piece.layouts()[-1].nbytes for piece in self.pieces)
        if all(piece.unpacking is not None for piece in self.pieces):
            return self.peak_bytes - self.stored_bytes
        return self.peak_bytes

    def try_take(self, pool: BufferPool) -> bool:
        """Take the memory; False where the budget leaves none, and all goes back when this object dies."""
        for part in self.from_files.values():
            part.buffer = part.placement.try_take(pool)
            if part.buffer is None:
                return False
        if self.packed_bytes:
            self.buffer = pool.try_take(self.packed_bytes)
            if self.buffer is None:
                return False
        for nbytes in self.decoded_bytes:
            buffer = pool.try_take(nbytes, of_any_block=True)
            if buffer is None:
                return False
            self.decoded.append(buffer)
        for nbytes in self.converted_bytes:
            attach = pool.try_adopt(nbytes)
            if attach is None:
                return False
            self.conversions.append(attach)
        return True

    def clear(self) -> None:
        """Give the memory back as far as no tensor views it."""
        self.buffer = None
        self.decoded.clear()
        self.conversions.clear()
        for part in self.from_files.values():
            part.buffer = None

    def load(self) -> list[torch.Tensor]:
        """Read and convert; one tensor for each piece, in the execution layout. Once; needs no lock."""
        # Loading is no part of what surrounds it: transforms, and modes that watch or fake operations.
        with torch._C._DisableFuncTorch():
            if not torch._C._len_torch_dispatch_stack():  # the common case; importing what disables modes is slow
                return self._load()
            with _disable_current_modes():
                return self._load()

    def _load(self) -> list[torch.Tensor]:
        try:
            tensors = self._read()
            if len(self.to_read) != len(self.pieces) or self.decoded:
                tensors = self._decode(tensors)
        except BaseException as error:
            self.clear()
            raise without_frames(error)  # noqa: B904
        if self.conversions:
            attach = iter(self.conversions)
            with torch.inference_mode(False), torch.no_grad():
                for i, piece in enumerate(self.pieces):
                    for layout in piece.layouts()[1:]:
                        converted = layout.empty().copy_(tensors[i])
                        next(attach)(converted)
                        tensors[i] = converted
        self.clear()
        return tensors

    def _decode(self, read: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What was read, with the pieces that are decoded from it in the place of their parts."""
        rest, buffers, tensors = iter(read), iter(self.decoded), []
        with torch.inference_mode(False), torch.no_grad():
            for piece in self.pieces:
                if piece.unpacking is None:
                    tensors.append(next(rest))
                    continue
                where = (next(buffers), 0) if piece.stored_bytes else None
                values = self._tensor(piece, where)
                source = piece.source
                piece.unpacking.decode(source.name, source.store.describe(source.name), rest, values)
                tensors.append(values)
        return tensors

    def _read(self) -> list[torch.Tensor]:
        pieces = self.to_read
        placed: list[tuple[Any, int] | None] = [None] * len(pieces)  # buffer, offset
        for part in self.from_files.values():
            names = [pieces[i].source.name for i in part.pieces]
            read_placed(part.file, part.placement, names, part.buffer, drop_cache=self.reading.drop_cache)
            for i, offset in zip(part.pieces, part.placement.offsets, strict=True):
                placed[i] = (part.buffer, offset)
        if self.packed:
            assert self.buffer is not None
            view = memoryview(self.buffer).cast("B")
            requests: dict[int, tuple[WeightStore, list[ReadRequest]]] = {}
            for i, offset in self.packed:
                store = pieces[i].source.store
                destination = view[offset : offset + pieces[i].stored_bytes]
                requests.setdefault(id(store), (store, []))[1].extend(pieces[i].requests(destination))
                placed[i] = (self.buffer, offset)
            for store, wanted in requests.values():
                store.read(wanted)
        # Tensors that are born in inference mode cannot be saved for backward later.
        with torch.inference_mode(False):
            return [self._tensor(piece, where) for piece, where in zip(pieces, placed, strict=True)]

    @staticmethod
    def _tensor(piece: Piece, where: tuple[Any, int] | None) -> torch.Tensor:
        if piece.source.memory is not None:
            return piece.stored_tensor(piece.source.memory)
        layout = piece.layouts()[0]
        if where is None:
            return layout.empty()
        buffer, offset = where
        flat = torch.frombuffer(buffer, dtype=layout.dtype, count=layout.numel, offset=offset)
        return flat if piece.runs is not None else flat.as_strided(layout.shape, layout.stride)


def try_reserve(pool: BufferPool, pieces: Sequence[Piece], reading: Reading) -> Room | None:
    """Room for the pieces, or None where the budget leaves none."""
    room = Room(pieces, reading)
    return room if room.try_take(pool) else None
