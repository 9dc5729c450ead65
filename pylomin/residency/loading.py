"""From bytes in a store to tensors: sizes first, then memory, then one read, then conversions."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch.utils._python_dispatch import _disable_current_modes

from pylomin.errors import without_frames
from pylomin.io.buffers import BufferPool, aligned, block_bytes
from pylomin.residency.weight import Layout, Source, Weight
from pylomin.store.base import InMemoryStore, ReadRequest, WeightStore

Attach = Callable[[torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class Piece:
    """A weight as it is stored now, or runs of its elements, packed one after the other.

    Made under the lock of the residency: afterwards the weight may be written to, and this still is what it was.
    """

    source: Source
    conversions: tuple[Layout, ...]
    runs: tuple[tuple[int, int], ...] | None = None  # (first, last exclusive), counted as elements lie in memory

    @staticmethod
    def of(weight: Weight, runs: Iterable[tuple[int, int]] | None = None) -> Piece:
        return Piece(weight.source, weight.conversions, None if runs is None else tuple(runs))

    def layouts(self) -> list[Layout]:
        """The stored tensor's, then one for each conversion."""
        steps = [self.source.layout, *self.conversions]
        if self.runs is None:
            return steps
        shape = (sum(stop - start for start, stop in self.runs),)
        return [replace(step, shape=shape, stride=(1,)) for step in steps]

    @property
    def stored_bytes(self) -> int:
        return self.layouts()[0].nbytes

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


def _copied_when_written(stored: torch.Tensor) -> torch.Tensor:
    """The same memory until somebody writes to what is returned."""
    try:
        return torch._lazy_clone(stored)
    except RuntimeError:
        return stored.clone()


@dataclass(slots=True)
class Room:
    """Memory set aside in the pool for a list of pieces. What is not used goes back when this object dies."""

    buffer: ctypes.Array[ctypes.c_char] | None
    conversions: list[Attach]


def needed_bytes(pieces: Sequence[Piece]) -> tuple[int, list[int]]:
    """Bytes of the one buffer that the pieces are read into, and of the tensor of each conversion."""
    buffer = sum(aligned(piece.stored_bytes) for piece in pieces if piece.source.memory is None)
    return buffer, [step.nbytes for piece in pieces for step in piece.layouts()[1:]]


def peak_bytes(pieces: Sequence[Piece]) -> int:
    """What loading the pieces takes at one time, as the pool counts it."""
    buffer_bytes, converted_bytes = needed_bytes(pieces)
    return block_bytes(buffer_bytes) + sum(converted_bytes)


def resident_bytes(pieces: Sequence[Piece]) -> int:
    """What the loaded pieces take, as the pool counts it: the last conversion of each, or the buffer they lie in."""
    converted_bytes = sum(piece.layouts()[-1].nbytes for piece in pieces if piece.conversions)
    unconverted = any(not piece.conversions for piece in pieces)
    return converted_bytes + (block_bytes(needed_bytes(pieces)[0]) if unconverted else 0)


def try_reserve(pool: BufferPool, pieces: Sequence[Piece]) -> Room | None:
    """Room for the pieces, or None where the budget leaves none."""
    buffer_bytes, converted_bytes = needed_bytes(pieces)
    room = Room(None, [])
    if buffer_bytes:
        room.buffer = pool.try_take(buffer_bytes)
        if room.buffer is None:
            return None
    for nbytes in converted_bytes:
        attach = pool.try_adopt(nbytes)
        if attach is None:
            return None
        room.conversions.append(attach)
    return room


def load(pieces: Sequence[Piece], room: Room) -> list[torch.Tensor]:
    """Read and convert; one tensor for each piece, in the execution layout. Needs no lock."""
    # Loading is no part of what surrounds it: transforms, and modes that watch or fake operations.
    with torch._C._DisableFuncTorch():
        if not torch._C._len_torch_dispatch_stack():  # the common case; importing what disables modes takes a second
            return _load(pieces, room)
        with _disable_current_modes():
            return _load(pieces, room)


def _load(pieces: Sequence[Piece], room: Room) -> list[torch.Tensor]:
    try:
        tensors = _read(pieces, room.buffer)
    except BaseException as error:
        room.buffer = None
        room.conversions.clear()
        raise without_frames(error)  # noqa: B904
    attach = iter(room.conversions)
    with torch.inference_mode(False), torch.no_grad():
        for i, piece in enumerate(pieces):
            for layout in piece.layouts()[1:]:
                converted = layout.empty().copy_(tensors[i])
                next(attach)(converted)
                tensors[i] = converted
    return tensors


def _read(pieces: Sequence[Piece], buffer: ctypes.Array[ctypes.c_char] | None) -> list[torch.Tensor]:
    view = memoryview(buffer).cast("B") if buffer is not None else memoryview(b"")
    requests: dict[int, tuple[WeightStore, list[ReadRequest]]] = {}
    tensors: list[torch.Tensor] = []
    position = 0
    # Tensors that are born in inference mode cannot be saved for backward later.
    with torch.inference_mode(False):
        for piece in pieces:
            source, layout = piece.source, piece.layouts()[0]
            if source.memory is not None:
                tensors.append(piece.stored_tensor(source.memory))
                continue
            if layout.nbytes == 0:
                tensors.append(layout.empty())
                continue
            assert buffer is not None
            destination = view[position : position + layout.nbytes]
            requests.setdefault(id(source.store), (source.store, []))[1].extend(piece.requests(destination))
            flat = torch.frombuffer(buffer, dtype=layout.dtype, count=layout.numel, offset=position)
            tensors.append(flat.as_strided(layout.shape, layout.stride))
            position += aligned(layout.nbytes)
    for store, wanted in requests.values():
        store.read(wanted)
    return tensors
