"""Where extents of a file come to lie in one buffer, in each reading mode, so that tensors can use them there."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pylomin.io.buffers import ALIGNMENT_BYTES, HUGE_PAGE_BYTES, PAGE_BYTES, BufferPool, Pages, aligned, block_bytes
from pylomin.io.direct import direct_bytes
from pylomin.io.files import Extent, WeightFile
from pylomin.io.mapping import drop_shown, mapped_bytes
from pylomin.io.modes import Mode
from pylomin.io.runs import Run, coalesce


@dataclass(frozen=True, slots=True)
class PlacedRun:
    """A run of extents and its part of the buffer."""

    run: Run
    mode: Mode
    at_bytes: int  # where its part of the buffer starts
    offsets: tuple[int, ...]  # where in the buffer each extent of the run starts
    whole_huge: bool = False  # it is mapped with all of the huge pages that hold it


@dataclass(frozen=True, slots=True)
class Placement:
    """A layout of extents in one buffer; made by :func:`place`."""

    mode: Mode
    runs: tuple[PlacedRun, ...]
    buffer_bytes: int
    offsets: tuple[int, ...]  # where in the buffer each extent starts, in the order given; multiples of 64
    memory_bytes: int  # that the buffer takes in the ledger: less than its bytes where parts of it are never used

    def try_take(self, pool: BufferPool, *, from_window: bool = False) -> Any | None:
        """The buffer of ``buffer_bytes`` (> 0), or None where the pool's limit leaves no room.

        Something that :func:`torch.frombuffer` takes, and whose bytes are in use until the last tensor on it dies.
        """
        if self.mode == "mapped":
            return pool.try_take_pages(self.buffer_bytes, self.memory_bytes)
        return pool.try_take(self.buffer_bytes, from_window=from_window)

    @property
    def is_mapped(self) -> bool:
        """Whether nothing is copied, as long as the system does not refuse to map it."""
        return all(placed.mode == "mapped" for placed in self.runs)

    def drop(self, pages: Pages) -> None:
        """Give the memory of a buffer back whose pages show the file: used again, they would be read again."""
        for placed in self.runs:
            run = placed.run
            drop_shown(run.start, run.nbytes, pages, placed.at_bytes, whole_huge=placed.whole_huge)


def can_map(extents: Sequence[Extent]) -> bool:
    """Are all extents aligned in the file as tensors must be in memory?"""
    return all(extent.start % ALIGNMENT_BYTES == 0 for extent in extents)


def place(extents: Sequence[Extent], mode: Mode, *, whole_huge: bool = False) -> Placement:
    """Lay extents of one file, in any order and also overlapping, out in one buffer.

    In mapped mode, runs that cannot be used where they lie, or that the system refuses to map, are read into pages
    of the same buffer.

    Args:
        whole_huge: map large runs with all of the huge pages (2 MiB) that hold them. Then also the first and the last
            are mapped at once, and not in pages of 4 KiB, which takes five times as long for a weight of 4 MiB; but
            what lies around it may count as memory of the process, too.
    """
    wanted = [i for i, extent in enumerate(extents) if extent.nbytes]
    offsets = [0] * len(extents)
    runs: list[PlacedRun] = []
    end = unused_bytes = 0
    for run in coalesce([extents[i] for i in wanted], gaps_take_memory=mode != "buffered"):
        run = Run(run.extents, tuple(wanted[i] for i in run.members))
        if mode == "mapped" and can_map(run.extents):
            around = whole_huge and run.nbytes >= HUGE_PAGE_BYTES
            first = aligned(end, HUGE_PAGE_BYTES if around else PAGE_BYTES)
            begin = _congruent(run, first)
            placed, last = _mapped(run, begin, whole_huge=around)
            unused_bytes += begin - aligned(end, PAGE_BYTES)
            end = aligned(last, HUGE_PAGE_BYTES) if around else last
            unused_bytes += end - last
        elif mode == "direct":
            placed, end = _direct(run, aligned(end, PAGE_BYTES))
        else:
            placed, end = _packed(run, aligned(end))
        runs.append(placed)
        for i, offset in zip(run.members, placed.offsets, strict=True):
            offsets[i] = offset
    used_bytes = end - unused_bytes
    memory_bytes = aligned(used_bytes, PAGE_BYTES) if mode == "mapped" else block_bytes(used_bytes)
    return Placement(mode, tuple(runs), end, tuple(offsets), memory_bytes)


def read_run(
    file: WeightFile, placed: PlacedRun, buffer: Any, *, drop_cache: bool = False, again: bool = False
) -> bool:
    """Bring the bytes of one run into its part of the buffer. The GIL is released while they come.

    Args:
        buffer: from :meth:`Placement.try_take`.
        drop_cache: leave nothing of a buffered read in the page cache.
        again: they were mapped there already, and dropped since.

    Returns:
        Whether they are mapped.

    Raises:
        StoreReadError, StoreChangedError: as :meth:`WeightFile.read`.
    """
    run = placed.run
    if placed.mode == "mapped" and file.map(
        run.start, run.nbytes, buffer, placed.at_bytes, whole_huge=placed.whole_huge, again=again
    ):
        return True
    view = memoryview(buffer).cast("B")
    if placed.mode == "direct":
        file.read_direct(run.start, run.nbytes, view[placed.at_bytes :])
        _align(placed, ctypes.addressof(ctypes.c_char.from_buffer(view)))
        return False
    destinations = [view[at : at + extent.nbytes] for at, extent in zip(placed.offsets, run.extents, strict=True)]
    file.read(run.start, run.scatter(destinations), drop_cache=drop_cache)
    return False


def _congruent(run: Run, at_bytes: int) -> int:
    """The first place for a large run at which its huge pages in the file can be huge pages in memory.

    Then the system maps 2 MiB where it would map 512 pages, and there is less to look up for who uses them.
    """
    if run.nbytes < HUGE_PAGE_BYTES:
        return at_bytes
    start = run.start - run.start % PAGE_BYTES
    return at_bytes + (start - at_bytes) % HUGE_PAGE_BYTES


def _mapped(run: Run, at_bytes: int, *, whole_huge: bool) -> tuple[PlacedRun, int]:
    before = run.start % PAGE_BYTES
    offsets = tuple(at_bytes + before + extent.start - run.start for extent in run.extents)
    placed = PlacedRun(run, "mapped", at_bytes, offsets, whole_huge)
    return placed, at_bytes + mapped_bytes(run.start, run.nbytes)


def _packed(run: Run, at_bytes: int) -> tuple[PlacedRun, int]:
    offsets = []
    end = at_bytes
    for extent in run.extents:
        offsets.append(aligned(end))
        end = offsets[-1] + extent.nbytes
    return PlacedRun(run, "buffered", at_bytes, tuple(offsets)), end


def _direct(run: Run, at_bytes: int) -> tuple[PlacedRun, int]:
    """Extents arrive as they lie in the file; then each moves up to the next aligned place that is free."""
    offsets: list[int] = []
    end = at_bytes
    for extent, source in zip(run.extents, _sources(run, at_bytes), strict=True):
        offsets.append(aligned(max(source, end)))
        end = offsets[-1] + extent.nbytes
    read_end = at_bytes + direct_bytes(run.start, run.nbytes)
    return PlacedRun(run, "direct", at_bytes, tuple(offsets)), max(end, read_end)


def _align(placed: PlacedRun, address: int) -> None:
    sources = _sources(placed.run, placed.at_bytes)
    moves = list(zip(placed.run.extents, sources, placed.offsets, strict=True))
    # From the last to the first: each goes up, into what those after it have left.
    for extent, source, destination in reversed(moves):
        if source != destination:
            ctypes.memmove(address + destination, address + source, extent.nbytes)


def _sources(run: Run, at_bytes: int) -> list[int]:
    """Where in the buffer a direct read puts the extents."""
    before = run.start % PAGE_BYTES
    return [at_bytes + before + extent.start - run.start for extent in run.extents]
