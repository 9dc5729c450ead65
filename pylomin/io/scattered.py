"""Extents that lie scattered in a file, read with no page between them.

The system reads ahead of a reader, which would bring what lies between: of the half of each row, both halves. So all
extents are announced first, some MiB ahead; the disk then works on many of them at once, and reads just their pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pylomin.io import page_cache
from pylomin.io.buffers import PAGE_BYTES
from pylomin.io.reading import fill

_MAX_BUFFERS = 1024  # of one call, as the system limits it
_AHEAD_BYTES = 8 << 20  # 8 MiB that are announced before they are read; with 1 MiB the disk had too little to do

Read = tuple[int, list[memoryview], int]  # file offset, where its bytes go, how many of them


def fill_scattered(fd: int, ranges: Sequence[tuple[int, int]], buffer: memoryview) -> tuple[int, int, OSError | None]:
    """Fill ``buffer`` with ranges (start, stop exclusive) of a file, one after the other.

    Returns:
        The start of the read that failed, how many of its bytes came, and the error. All is there if the first is -1.
        Fewer bytes and no error: end of file.
    """
    reads = list(_reads(ranges, buffer))
    announced = ahead_bytes = 0
    for start, buffers, nbytes in reads:
        while announced < len(reads) and ahead_bytes < _AHEAD_BYTES:
            page_cache.read_ahead(fd, reads[announced][0], reads[announced][2])
            ahead_bytes += reads[announced][2]
            announced += 1
        count, error = fill(fd, start, buffers)
        if error is not None or count < nbytes:
            return start, count, error
        ahead_bytes -= nbytes
    return -1, 0, None


def _reads(ranges: Sequence[tuple[int, int]], buffer: memoryview) -> Iterator[Read]:
    """Ranges with no whole page between them are one read."""
    gap = memoryview(bytearray(2 * PAGE_BYTES))
    buffers: list[memoryview] = []
    start = stop = position = 0
    for first, last in ranges:
        if buffers and (not _touch(stop, first) or len(buffers) > _MAX_BUFFERS - 2):
            yield start, buffers, stop - start
            buffers = []
        if not buffers:
            start = first
        elif first > stop:
            buffers.append(gap[: first - stop])
        buffers.append(buffer[position : position + last - first])
        position += last - first
        stop = last
    if buffers:
        yield start, buffers, stop - start


def _touch(stop: int, first: int) -> bool:
    """Whether no whole page lies between the end of a range and the start of another, further on."""
    return first >= stop and first // PAGE_BYTES <= -(-stop // PAGE_BYTES)
