"""The values of stored weights, a piece at a time, so that a weight of any size takes little memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from pylomin.store.base import InMemoryStore, ReadRequest, WeightStore
from pylomin.store.extents import ExtentStore
from pylomin.store.tensor_bytes import byte_view

PIECE_BYTES = 1 << 24  # 16 MiB: larger reads were no faster


def read_pieces(store: WeightStore, name: str) -> Iterator[torch.Tensor]:
    """One weight as runs of its elements; each is valid until the next is asked for.

    A store that may have to compute a weight as a whole in order to read some of it is asked for all at once.

    Raises:
        WeightNotFoundError, StoreReadError: as ``store`` does.
    """
    if isinstance(store, InMemoryStore):
        yield store.tensor(name).detach()
        return
    info = store.info(name)
    numel, itemsize = math.prod(info.shape), info.dtype.itemsize
    step = max(1, PIECE_BYTES // itemsize) if isinstance(store, ExtentStore) else max(1, numel)
    buffer = torch.empty(min(step, numel), dtype=info.dtype, device="cpu")
    for start in range(0, numel, step):
        piece = buffer[: min(step, numel - start)]
        store.read([ReadRequest(name, start * itemsize, byte_view(piece))])
        yield piece


def slices_of(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A contiguous tensor as runs of its elements; views, not copies."""
    flat, step = tensor.reshape(-1), max(1, PIECE_BYTES // tensor.element_size())
    for start in range(0, flat.numel(), step):
        yield flat[start : start + step]
