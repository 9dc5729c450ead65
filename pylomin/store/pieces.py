"""The values of stored weights, a piece at a time, so that a weight of any size takes little memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from pylomin.io.buffers import PAGE_BYTES, aligned, anonymous_memory
from pylomin.io.modes import CACHED
from pylomin.store.base import InMemoryStore, ReadRequest, WeightStore
from pylomin.store.extents import ExtentStore, StoredWeight, read_direct
from pylomin.store.tensor_bytes import byte_view

T = TypeVar("T")

PIECE_BYTES = 1 << 22  # 4 MiB: larger reads were no faster


def read_pieces(store: WeightStore, name: str) -> Iterator[torch.Tensor]:
    """One weight as runs of its elements; each stays as it is until the next but one is asked for.

    A store that may have to compute a weight as a whole in order to read some of it is asked for all at once. A large
    weight that is not cached is read past the page cache, which it would fill with what is not read again soon.

    Raises:
        WeightNotFoundError, StoreReadError: as ``store`` does.
    """
    if isinstance(store, InMemoryStore):
        yield store.tensor(name).detach()
        return
    info = store.info(name)
    numel, itemsize = math.prod(info.shape), info.dtype.itemsize
    step = max(1, PIECE_BYTES // itemsize) if isinstance(store, ExtentStore) else max(1, numel)
    cold = _cold(store, name)
    buffers: list[torch.Tensor] = []
    for number, start in enumerate(range(0, numel, step)):
        nbytes = min(step, numel - start) * itemsize
        if len(buffers) < 2:  # the size of the first piece is that of the largest
            buffers.append(_buffer(nbytes + (2 * PAGE_BYTES if cold else 0), cold is not None))
        buffer = buffers[number % 2]
        if cold:
            offset = (cold.extent.start + start * itemsize) % PAGE_BYTES
            read_direct(cold, name, start * itemsize, nbytes, byte_view(buffer))
            yield buffer[offset : offset + nbytes].view(info.dtype)
        else:
            store.read([ReadRequest(name, start * itemsize, byte_view(buffer[:nbytes]))])
            yield buffer[:nbytes].view(info.dtype)


def slices_of(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A contiguous tensor as runs of its elements; views, not copies."""
    flat, step = tensor.reshape(-1), max(1, PIECE_BYTES // tensor.element_size())
    for start in range(0, flat.numel(), step):
        yield flat[start : start + step]


def made_ahead(
    items: Iterator[T], *, one_core: bool = False, beside: Callable[[T], bool] = lambda item: True
) -> Iterator[T]:
    """The items, none of them None, each made by another thread while the one before it is used.

    Args:
        one_core: that thread is to use one core, since others read, hash and write at the same time: threads of torch
            that wait for each other while those run took twice as long.
        beside: whether an item is small enough for the next to be made while it is in memory.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="pylomin-made-ahead") as thread:
        if one_core:
            thread.submit(_use_one_core).result()
            torch.set_num_threads(torch.get_num_threads())  # what later threads begin with is as it was
        made = thread.submit(next, items, None)
        while (item := made.result()) is not None:
            del made  # it holds the item, too
            if goes_on := beside(item):
                made = thread.submit(next, items, None)
            yield item
            del item
            if not goes_on:
                made = thread.submit(next, items, None)


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


def _buffer(nbytes: int, cold: bool) -> torch.Tensor:
    """Memory that begins with a page; for direct reads of huge pages, into which they are half as fast again."""
    if cold:
        return torch.frombuffer(anonymous_memory(aligned(nbytes, PAGE_BYTES)), dtype=torch.uint8)
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
