"""Weights that are composed from parts of other stores' weights, and read from where those lie."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from pylomin.errors import StoreFormatError, StoreReadError
from pylomin.store.base import ReadRequest, WeightInfo, WeightStore
from pylomin.store.dtypes import nbytes_of
from pylomin.store.requests import check_request, weight_not_found
from pylomin.store.tensor_bytes import byte_view

_MIN_RUN_BYTES = 1 << 12  # 4 KiB; shorter runs are read together and copied, for a request of its own takes 2 µs
_BATCH_BYTES = 1 << 20  # 1 MiB of blocks at a time, while short runs are copied
_MAX_PLACES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes ``[offset_bytes, offset_bytes + nbytes)`` of a weight in ``store``."""

    store: WeightStore
    name: str
    offset_bytes: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class VirtualWeight:
    """A weight of ``blocks`` equal blocks, each of which takes the next slice of every part, in their order.

    One block is the parts one after the other: tensors that are stacked, or concatenated along dimension 0.
    Concatenating shapes ``(a, b, x)`` and ``(a, b, y)`` along dimension 2 makes ``a * b`` blocks.

    Raises:
        StoreFormatError: the parts do not fill the shape, or exceed the weights that they are of.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    blocks: int = 1
    info: WeightInfo = field(init=False)
    starts: tuple[int, ...] = field(init=False)  # of each part's slice within a block, in bytes

    def __post_init__(self) -> None:
        info = WeightInfo(self.dtype, self.shape, nbytes_of(self.dtype, self.shape))
        found = sum(part.nbytes for part in self.parts)
        if found != info.nbytes or self.blocks < 1 or any(part.nbytes % self.blocks for part in self.parts):
            raise StoreFormatError(
                f"a virtual weight of {self.dtype} {list(self.shape)} in {self.blocks} blocks was given "
                f"{[part.nbytes for part in self.parts]} bytes; expected {info.nbytes} in all, and whole blocks."
            )
        for part in self.parts:
            limit = part.store.info(part.name).nbytes
            if not 0 <= part.offset_bytes <= part.offset_bytes + part.nbytes <= limit:
                raise StoreFormatError(
                    f"{part.nbytes} bytes at {part.offset_bytes} are no part of weight {part.name!r} in "
                    f"{part.store.describe(part.name)}, which has {limit}."
                )
        slices = itertools.accumulate((part.nbytes // self.blocks for part in self.parts), initial=0)
        object.__setattr__(self, "info", info)
        object.__setattr__(self, "starts", tuple(slices)[:-1])

    @property
    def block_bytes(self) -> int:
        return self.info.nbytes // self.blocks

    @property
    def has_short_runs(self) -> bool:
        """A read of it would scatter into very many small pieces."""
        return self.blocks > 1 and self.block_bytes < _MIN_RUN_BYTES * len(self.parts)

    def runs(self, start: int, stop: int) -> Iterator[tuple[Part, int, int]]:
        """The parts under bytes ``[start, stop)``, in order: part, offset in it, number of bytes."""
        position = start
        while position < stop:
            block, within = divmod(position, self.block_bytes)
            # The last part that starts here or before: empty ones share their start with the next.
            index = bisect.bisect_right(self.starts, within) - 1
            part = self.parts[index]
            slice_bytes = part.nbytes // self.blocks
            skipped = within - self.starts[index]
            nbytes = min(slice_bytes - skipped, stop - position)
            yield part, block * slice_bytes + skipped, nbytes
            position += nbytes


class VirtualStore:
    """A :class:`~pylomin.store.base.WeightStore` of :class:`VirtualWeight`, which holds no bytes of its own.

    A read of some bytes reads just the parts under them, straight into the destination. Where a weight interleaves
    its parts in short runs, these pass through a temporary of 1 MiB.
    """

    def __init__(self, weights: Mapping[str, VirtualWeight]) -> None:
        self._weights = dict(weights)
        self._is_closed = False

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def weight(self, name: str) -> VirtualWeight:
        """How one weight is composed. Raises WeightNotFoundError."""
        try:
            return self._weights[name]
        except KeyError:
            raise weight_not_found(name, self._weights, "a virtual store") from None

    def info(self, name: str) -> WeightInfo:
        """Metadata of one weight. Raises WeightNotFoundError."""
        return self.weight(name).info

    def describe(self, name: str) -> str:
        """The places of its parts, each once. Raises WeightNotFoundError."""
        places = list(dict.fromkeys(part.store.describe(part.name) for part in self.weight(name).parts))
        more = f" and {len(places) - _MAX_PLACES_SHOWN} more" if len(places) > _MAX_PLACES_SHOWN else ""
        return ", ".join(places[:_MAX_PLACES_SHOWN]) + more

    def read(self, requests: Sequence[ReadRequest]) -> None:
        """Fill every destination; all that one underlying store has of them is asked of it in one call.

        Raises:
            WeightNotFoundError: a weight is not in the store.
            StoreReadError: naming the underlying weights and their file; or this store is closed.
        """
        if self._is_closed and requests:
            raise StoreReadError(f"weight {requests[0].name!r} was in a virtual store that is closed.")
        by_store: dict[int, tuple[WeightStore, list[ReadRequest]]] = {}
        for request in requests:
            for store, piece in self._pieces(request):
                by_store.setdefault(id(store), (store, []))[1].append(piece)
        for store, pieces in by_store.values():
            store.read(pieces)

    def close(self) -> None:
        """Close the underlying stores. Idempotent."""
        self._is_closed = True
        for store in {id(part.store): part.store for w in self._weights.values() for part in w.parts}.values():
            store.close()

    def _pieces(self, request: ReadRequest) -> Iterator[tuple[WeightStore, ReadRequest]]:
        """What stores that hold bytes are asked for ``request``; short runs are read here instead."""
        weight = self.weight(request.name)
        check_request(request, weight.info, self.describe(request.name))
        if weight.has_short_runs:
            _read_short_runs(weight, request)
            return
        position = 0
        for part, offset, nbytes in weight.runs(request.offset_bytes, request.offset_bytes + len(request.destination)):
            destination = request.destination[position : position + nbytes]
            piece = ReadRequest(part.name, part.offset_bytes + offset, destination)
            if isinstance(part.store, VirtualStore):
                yield from part.store._pieces(piece)
            else:
                yield part.store, piece
            position += nbytes


def _read_short_runs(weight: VirtualWeight, request: ReadRequest) -> None:
    start, stop = request.offset_bytes, request.offset_bytes + len(request.destination)
    if start == stop:
        return
    block_bytes = weight.block_bytes
    batch = max(1, _BATCH_BYTES // block_bytes)
    last = -(-stop // block_bytes)  # (exclusive)
    for first in range(start // block_bytes, last, batch):
        count = min(batch, last - first)
        blocks = torch.empty(count, block_bytes, dtype=torch.uint8)
        for part, column in zip(weight.parts, weight.starts, strict=True):
            slice_bytes = part.nbytes // weight.blocks
            slices = torch.empty(count, slice_bytes, dtype=torch.uint8)
            offset = part.offset_bytes + first * slice_bytes
            part.store.read([ReadRequest(part.name, offset, byte_view(slices))])
            blocks[:, column : column + slice_bytes] = slices
        begin, end = max(start, first * block_bytes), min(stop, (first + count) * block_bytes)
        source = byte_view(blocks)[begin - first * block_bytes : end - first * block_bytes]
        request.destination[begin - start : end - start] = source
