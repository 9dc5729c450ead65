"""A residency over weights in memory that are read as if from a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from pylomin.residency.residency import Residency
from pylomin.residency.weight import Layout, Source, Weight, contiguous_stride
from pylomin.store.base import ReadRequest, WeightInfo, WeightStore
from pylomin.store.memory import MemoryStore

CPU = torch.device("cpu")


class CountingStore:
    """Not an in-memory store to those who ask, so its weights are read; counts what is."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = MemoryStore(tensors)
        self.reads: list[list[tuple[str, int, int]]] = []  # (name, offset, size) of each request of each call
        self.before_read: Callable[[], None] = lambda: None

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def info(self, name: str) -> WeightInfo:
        return self._tensors.info(name)

    def describe(self, name: str) -> str:
        return "the counting store"

    def read(self, requests: Sequence[ReadRequest]) -> None:
        self.reads.append([(r.name, r.offset_bytes, len(r.destination)) for r in requests])
        self.before_read()
        self._tensors.read(requests)

    def close(self) -> None:
        self._tensors.close()

    @property
    def bytes_read(self) -> int:
        return sum(size for read in self.reads for _, _, size in read)


def layout(dtype: torch.dtype, *shape: int) -> Layout:
    return Layout(dtype, shape, contiguous_stride(shape), CPU)


def weight_of(
    store: WeightStore, name: str, residency: Residency, *conversions: Layout, shape: tuple[int, ...] | None = None
) -> Weight:
    info = store.info(name)
    return Weight(name, Source(store, name, layout(info.dtype, *(shape or info.shape))), residency, conversions)


def groups(
    count: int, numel: int, memory_budget: int | None = None
) -> tuple[Residency, list[list[Weight]], CountingStore]:
    """``count`` groups of one float32 vector each; group ``i`` is filled with ``i``."""
    store = CountingStore({str(i): torch.full((numel,), float(i)) for i in range(count)})
    residency = Residency(memory_budget)
    return residency, [[weight_of(store, str(i), residency)] for i in range(count)], store


def value(weight: Weight) -> torch.Tensor:
    assert weight.tensor is not None
    return weight.tensor.detach()
