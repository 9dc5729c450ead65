"""One stretch of memory in which blocks of many sizes follow each other, so that its pages are used again and again."""

from __future__ import annotations

import mmap
from typing import Any

from pylomin.io.spaces import Space


class Arena:
    """Bookkeeping of what is free in ``memory``: neighbours that are free become one.

    What streams through a window comes and goes in about the same order, so there is always a large free stretch; a
    list of free blocks would rarely hold one of the right size. A block is taken from where it leaves the longest
    stretch when all that is in use now has gone: in the middle there would be room for another on neither side.
    Not thread-safe.

    Args:
        memory: pages; ``nbytes`` of them are used.
        space: what they are made of, if they are no ordinary ones.
    """

    def __init__(self, memory: Any, nbytes: int, space: Space | None = None) -> None:
        self.memory = memory
        self.nbytes = nbytes
        self.space = space
        self._free: list[tuple[int, int]] = [(0, nbytes)]  # (first byte, last exclusive), in order

    @property
    def free_bytes(self) -> int:
        return sum([stop - start for start, stop in self._free])

    def take(self, nbytes: int) -> int | None:
        """Where ``nbytes`` that were free begin; None where no free stretch is that long."""
        fitting = [(i, stretch) for i, stretch in enumerate(self._free) if stretch[1] - stretch[0] >= nbytes]
        ends = [(i, first) for i, (start, stop) in fitting for first in (start, stop - nbytes)]
        if not ends:
            return None
        i, first = max(ends, key=lambda end: max(end[1], self.nbytes - end[1] - nbytes))
        start, stop = self._free[i]
        around = ((start, first), (first + nbytes, stop))
        self._free[i : i + 1] = [stretch for stretch in around if stretch[0] < stretch[1]]
        return first

    def give(self, offset: int, nbytes: int) -> None:
        """Bytes from :meth:`take` are free again."""
        merged: list[tuple[int, int]] = []
        for start, stop in sorted([*self._free, (offset, offset + nbytes)]):
            if merged and merged[-1][1] == start:
                merged[-1] = (merged[-1][0], stop)
            else:
                merged.append((start, stop))
        self._free = merged

    def drop_free(self) -> None:
        """Give the pages of what is free back to the system; they come back, as zeros, when they are used."""
        for start, stop in self._free:
            drop_pages(self.memory, start, stop - start)


def drop_pages(memory: mmap.mmap, offset: int, nbytes: int) -> None:
    """Give pages back to the system. ``offset`` and ``nbytes`` are multiples of a page."""
    memory.madvise(mmap.MADV_DONTNEED, offset, nbytes)
