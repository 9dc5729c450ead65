"""The values of stored weights, a piece at a time, so that a weight of any size takes little memory."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Generic, TypeVar

import torch

from pylomin.io.buffers import PAGE_BYTES, aligned, anonymous_memory
from pylomin.io.modes import CACHED
from pylomin.store.base import InMemoryStore, ReadRequest, WeightStore
from pylomin.store.extents import ExtentStore, StoredWeight, read_direct
from pylomin.store.tensor_bytes import byte_view

T = TypeVar("T")

PIECE_BYTES = 16 << 20  # 16 MiB: where all processors compute, reads of 4 MiB took a tenth longer
AHEAD = 2  # pieces to make while one is used: with one, readers, encoders and writers often waited for each other


class Buffers(threading.local):
    """Memory for pieces, in turn: each stays as it is until ``AHEAD`` more were made, and another is asked for.

    Of each thread its own: while one reads what is encoded, another may read what is not.
    """

    def __init__(self) -> None:
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * (1 + AHEAD)

    def next(self, nbytes: int) -> torch.Tensor:
        """At least so many bytes, at the beginning of a page."""
        buffer = self._buffers.pop(0)
        if len(buffer) < nbytes:
            # Of huge pages where it is large: direct reads into them are half as fast again.
            buffer = torch.frombuffer(anonymous_memory(aligned(nbytes, PAGE_BYTES)), dtype=torch.uint8)
        self._buffers.append(buffer)
        return buffer


def read_pieces(store: WeightStore, name: str, buffers: Buffers | None = None) -> Iterator[torch.Tensor]:
    """One weight as runs of its elements; each stays as it is until ``AHEAD`` more were made, and another is asked for.

    A store that may have to compute a weight as a whole in order to read some of it is asked for all at once. A large
    weight that is not cached is read past the page cache, which it would fill with what is not read again soon.

    Args:
        buffers: for the pieces of several large weights, one after the other.

    Raises:
        WeightNotFoundError, StoreReadError: as ``store`` does.
    """
    if isinstance(store, InMemoryStore):
        yield store.tensor(name).detach()
        return
    info = store.info(name)
    numel, itemsize = math.prod(info.shape), info.dtype.itemsize
    step = max(1, PIECE_BYTES // itemsize if isinstance(store, ExtentStore) else numel)
    cold = _cold(store, name)
    # Small weights have memory of their own: many of them are written together.
    buffers = Buffers() if buffers is None or not cold else buffers
    for start in range(0, numel, step):
        nbytes = min(step, numel - start) * itemsize
        if cold:
            offset = (cold.extent.start + start * itemsize) % PAGE_BYTES
            buffer = buffers.next(PIECE_BYTES + 2 * PAGE_BYTES)
            read_direct(cold, name, start * itemsize, nbytes, byte_view(buffer))
        else:
            offset, buffer = 0, buffers.next(nbytes)
            store.read([ReadRequest(name, start * itemsize, byte_view(buffer[:nbytes]))])
        yield buffer[offset : offset + nbytes].view(info.dtype)


def slices_of(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A contiguous tensor as runs of its elements; views, not copies."""
    flat, step = tensor.reshape(-1), max(1, PIECE_BYTES // tensor.element_size())
    for start in range(0, flat.numel(), step):
        yield flat[start : start + step]


def is_small(piece: torch.Tensor) -> bool:
    """Whether others may be made while it is in memory."""
    return piece.nbytes <= PIECE_BYTES


def made_ahead(
    items: Iterator[T], *, one_core: bool = False, beside: Callable[[T], bool] = lambda item: True
) -> Iterator[T]:
    """The items, of which another thread makes up to ``AHEAD`` more while one is used.

    Args:
        one_core: that thread is to use one core, since others read, hash and write at the same time: threads of torch
            that wait for each other while those run took twice as long.
        beside: whether an item is small enough for others to be made while it is in memory.
    """
    # Asked before another thread sets its own: a thread that never asked begins with what was set last in any.
    threads = torch.get_num_threads() if one_core else 0
    maker = _Maker(items, one_core, beside)
    thread = threading.Thread(target=maker.make, name="pylomin-made-ahead", daemon=True)
    try:
        thread.start()
        if one_core:
            maker.made.get()  # the thread has set its number of threads
            torch.set_num_threads(threads)  # so that threads that begin later are as they would have been
        while (item := maker.made.get()) is not None:
            if isinstance(item, _Failure):
                raise item.error
            maker.may_make.put(True)
            is_large = not beside(item)
            yield item
            del item
            if is_large:
                maker.may_go_on.put(True)
    finally:
        maker.may_make.put(False)
        maker.may_go_on.put(False)
        if thread.ident is not None:  # an interrupt may have come before it was started
            thread.join()


@dataclass(frozen=True)
class _Failure:
    error: BaseException


class _Maker(Generic[T]):
    """What the thread of :func:`made_ahead` does. Its queues are used as semaphores that an interrupt cannot break."""

    def __init__(self, items: Iterator[T], one_core: bool, beside: Callable[[T], bool]) -> None:
        self.made: SimpleQueue[T | _Failure | None] = SimpleQueue()
        self.may_make: SimpleQueue[bool] = SimpleQueue()  # once for each item, in all AHEAD more than were taken
        self.may_go_on: SimpleQueue[bool] = SimpleQueue()  # once for each large item
        self._items, self._one_core, self._beside = items, one_core, beside
        for _ in range(AHEAD):
            self.may_make.put(True)

    def make(self) -> None:
        try:
            if self._one_core:
                _use_one_core()
                self.made.put(None)
            while self.may_make.get():
                item = next(self._items, None)
                is_large = item is not None and not self._beside(item)
                self.made.put(item)
                if item is None or (is_large and not self.may_go_on.get()):
                    return
                del item
        except BaseException as error:  # for who takes the items
            self.made.put(_Failure(error))


def _use_one_core() -> None:
    torch.get_num_threads()  # the first use of torch in a thread sets the default
    torch.set_num_threads(1)


def _cold(store: WeightStore, name: str) -> StoredWeight | None:
    """Where a weight lies that is better read directly."""
    weight = store.weight(name) if isinstance(store, ExtentStore) else None
    if not isinstance(weight, StoredWeight) or weight.info.nbytes < PIECE_BYTES:
        return None
    if weight.extent.start % weight.info.dtype.itemsize or weight.file.direct_refused is not None:
        return None
    fraction = weight.file.cached_fraction([weight.extent])
    return weight if fraction is not None and fraction < CACHED else None
