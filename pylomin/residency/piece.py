"""What is loaded: a weight, or some of its elements, as it is stored now."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from pylomin.io.files import Extent
from pylomin.residency.device import is_streamed_to
from pylomin.residency.unpacking import Unpacking
from pylomin.residency.weight import Layout, Source, Weight, steps_of
from pylomin.store.base import InMemoryStore, ReadRequest
from pylomin.store.extents import StoredWeight


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
