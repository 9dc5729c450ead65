"""Quantised weights, decoded from their packed parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pylomin.quantize.packing import CHUNK_BYTES, Packing
from pylomin.residency.device import is_streamed_to
from pylomin.residency.device_memory import Arrival
from pylomin.residency.weight import Source, Weight
from pylomin.store.quantized import check_scales

DEVICE_CHUNK_BYTES = 32 << 20  # 32 MiB; its temporaries are of the allocator's memory, beside the budget

Runs = tuple[tuple[int, int], ...]
"""(first, last exclusive) of elements, as they lie in memory."""


@dataclass(frozen=True, slots=True)
class Unpacking:
    """Whole rows of a quantised weight, decoded from parts that are in memory or are read for this.

    Attributes:
        rows: (first, last exclusive) of the weight's matrix.
        parts: all rows of each, where they are in memory.
        missing: what has to be read of the other parts, in their order; None: all of it.
        arrivals: of the parts that are in memory, where that is a device's.
    """

    packing: Packing
    rows: Runs
    parts: tuple[torch.Tensor | None, ...]
    missing: tuple[tuple[Source, Runs | None], ...]
    arrivals: tuple[Arrival, ...] = ()

    @staticmethod
    def of(weight: Weight, runs: Runs | None) -> Unpacking | None:
        """Under the residency's lock. None where the runs are no whole rows, or nothing: the store reads those."""
        packing = weight.source.packing
        assert packing is not None
        count, columns = packing.matrix_shape
        runs_of_rows = ((0, count * columns),) if runs is None else runs
        numel = sum(stop - start for start, stop in runs_of_rows)
        if not numel or any(start % columns or stop % columns for start, stop in runs_of_rows):
            return None
        rows = tuple((start // columns, stop // columns) for start, stop in runs_of_rows)
        parts = tuple(None if part.tensor is None else part.tensor.detach() for part in weight.parts)
        missing: list[tuple[Source, Runs | None]] = []
        for part, values, (_, width) in zip(weight.parts, parts, packing.part_rows(), strict=True):
            if values is None:
                of_part = None if runs is None else tuple((first * width, last * width) for first, last in rows)
                missing.append((part.source, of_part))
        arrivals = tuple(
            arrival for part in weight.parts if part.tensor is not None for arrival in part.loaded.arrivals
        )
        return Unpacking(packing, rows, parts, tuple(missing), arrivals)

    def decode(self, source: Source, read: Iterator[torch.Tensor], out: torch.Tensor) -> None:
        """Into ``out``, from what is in memory and what was ``read`` of the missing parts.

        Raises:
            StoreReadError: the scales are damaged.
        """
        for arrival in self.arrivals:
            arrival.use()
        count = sum(last - first for first, last in self.rows)
        chosen = tuple(
            next(read).view(count, width) if part is None else self._rows_of(part.view(-1, width))
            for part, (_, width) in zip(self.parts, self.packing.part_rows(), strict=True)
        )
        is_on_host = not is_streamed_to(out.device)
        if self.packing.has_scales and is_on_host:  # for a device, they are looked at on their way there
            check_scales(chosen[1], source.name, source.store.describe(source.name))
        matrix = out.view(count, self.packing.matrix_shape[1])
        # In pieces that stay in the processor's cache; on a device, that are not too small to keep it busy.
        chunk_bytes = CHUNK_BYTES if is_on_host else DEVICE_CHUNK_BYTES
        step = max(1, chunk_bytes // max(1, self.packing.row_bytes))
        for first in range(0, count, step):
            self.packing.decode_rows(tuple(part[first : first + step] for part in chosen), matrix[first : first + step])

    def _rows_of(self, part: torch.Tensor) -> torch.Tensor:
        if len(self.rows) == 1:
            return part[slice(*self.rows[0])]
        rows = torch.cat([torch.arange(first, last) for first, last in self.rows])
        return part.index_select(0, rows.to(part.device))
