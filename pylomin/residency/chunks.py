"""How bytes that go to a device are cut so that each read fits into a slot of the ring. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pylomin.io.buffers import PAGE_BYTES, aligned
from pylomin.io.files import Extent
from pylomin.io.runs import coalesce


@dataclass(frozen=True, slots=True)
class Wanted:
    """Bytes of one weight, and where on the device they come to lie."""

    piece: int  # position in what is loaded together
    first: int  # of a file, or of the weight as its store counts them
    nbytes: int
    target: int
    itemsize: int = 1


@dataclass(frozen=True, slots=True)
class Copy:
    """From a slot to the device."""

    piece: int
    source: int  # from the start of the slot, or of what of a file was read into it
    target: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class FileChunk:
    """A range of a file that is read at once."""

    start: int
    nbytes: int
    copies: tuple[Copy, ...]


@dataclass(frozen=True, slots=True)
class StoreRead:
    """Bytes of a weight that its store is asked for, and where in the slot they go."""

    piece: int
    offset_bytes: int
    source: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class StoreChunk:
    """What stores are asked for at once."""

    reads: tuple[StoreRead, ...]
    copies: tuple[Copy, ...]


def file_chunks(wanted: Sequence[Wanted], most_bytes: int) -> Iterator[FileChunk]:
    """Reads of a file, in its order; what lies close together is read together.

    Args:
        wanted: ``first`` counts from the start of the file.
        most_bytes: of a read with all the pages that it touches; a multiple of a page, two at least.
    """
    extents = [Extent(one.first, one.first + one.nbytes) for one in wanted]
    for run in coalesce(extents, gaps_take_memory=True):
        members = [wanted[i] for i in run.members]
        start = run.start
        while start < run.stop:
            stop = _end_of_chunk(start, run.stop, members, most_bytes)
            copies = []
            for one in members:
                first, end = max(start, one.first), min(stop, one.first + one.nbytes)
                if first < end:
                    copies.append(Copy(one.piece, first - start, one.target + first - one.first, end - first))
            if copies:
                yield FileChunk(start, stop - start, tuple(copies))
            start = stop


def _end_of_chunk(start: int, stop: int, members: Sequence[Wanted], most_bytes: int) -> int:
    page = start - start % PAGE_BYTES
    if stop - page <= most_bytes:
        return stop
    end = page + most_bytes
    for one in members:
        if one.first < end < one.first + one.nbytes:  # no element is cut
            return end - (end - one.first) % one.itemsize
    return end


def store_chunks(wanted: Sequence[Wanted], most_bytes: int, alignment: int) -> Iterator[StoreChunk]:
    """What stores are asked for, several small weights at once. Rows of one weight are copied together.

    Args:
        wanted: ``first`` counts from the first byte of the weight.
        most_bytes: of what is asked for at once; a multiple of ``alignment``.
        alignment: of each weight in the slot.
    """
    reads: list[StoreRead] = []
    copies: list[Copy] = []
    position = 0
    for one in wanted:
        if reads and reads[-1].piece != one.piece:
            position = aligned(position, alignment)
        done = 0
        while done < one.nbytes:
            if position >= most_bytes:
                yield StoreChunk(tuple(reads), tuple(copies))
                reads, copies, position = [], [], 0
            nbytes = min(one.nbytes - done, most_bytes - position)
            reads.append(StoreRead(one.piece, one.first + done, position, nbytes))
            _add(copies, Copy(one.piece, position, one.target + done, nbytes))
            done, position = done + nbytes, position + nbytes
    if reads:
        yield StoreChunk(tuple(reads), tuple(copies))


def _add(copies: list[Copy], copy: Copy) -> None:
    """Append, or lengthen the last one."""
    if copies and copies[-1].piece == copy.piece:
        last = copies[-1]
        if (last.source + last.nbytes, last.target + last.nbytes) == (copy.source, copy.target):
            copies[-1] = Copy(copy.piece, last.source, last.target, last.nbytes + copy.nbytes)
            return
    copies.append(copy)
