"""What the system keeps of a file in its page cache: asked for ahead, dropped, measured. Nothing here raises."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence

from pylomin.io import syscalls
from pylomin.io.buffers import PAGE_BYTES

_HINT_BYTES = 1 << 17  # 128 KiB, the usual device readahead: a hint over more is cut to it


def read_ahead(fd: int, offset_bytes: int, nbytes: int) -> None:
    """Start reading a range into the page cache."""
    if not hasattr(os, "posix_fadvise"):
        return
    # Some file systems refuse advice; the read that follows reports what is really wrong.
    with contextlib.suppress(OSError):
        stop = offset_bytes + nbytes
        for start in range(offset_bytes, stop, _HINT_BYTES):
            os.posix_fadvise(fd, start, min(_HINT_BYTES, stop - start), os.POSIX_FADV_WILLNEED)


def drop(fd: int, offset_bytes: int, nbytes: int) -> None:
    """Drop the pages that hold a range, but those that are mapped or not yet written."""
    if not hasattr(os, "posix_fadvise"):
        return
    # Whole pages: of others the system keeps the ends.
    start = offset_bytes - offset_bytes % PAGE_BYTES
    length = offset_bytes + nbytes - start
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, start, length + -length % PAGE_BYTES, os.POSIX_FADV_DONTNEED)


def cached_fraction(fd: int, ranges: Sequence[tuple[int, int]], samples: int) -> float | None:
    """How much of some ranges, (start, stop exclusive), is cached, from ``samples`` places; None where unknown."""
    if not ranges:
        return None
    counted = _counted(fd, ranges, samples)
    return _probed(fd, ranges, samples) if counted is None else counted


def _counted(fd: int, ranges: Sequence[tuple[int, int]], samples: int) -> float | None:
    """By asking the kernel how many pages of a range it has."""
    cached = total = 0
    for start, stop in ranges[:: -(-len(ranges) // samples)]:
        found = syscalls.cached_pages(fd, start, stop - start)
        if found is None:
            return None
        cached += found
        total += (stop - 1) // PAGE_BYTES - start // PAGE_BYTES + 1
    return cached / total


def _probed(fd: int, ranges: Sequence[tuple[int, int]], samples: int) -> float | None:
    """By reading single bytes, but only if no disk is needed for it."""
    if not hasattr(os, "RWF_NOWAIT"):
        return None
    cached = total = 0
    byte = bytearray(1)
    for position in _spread(ranges, samples):
        total += 1
        try:
            cached += os.preadv(fd, [byte], position, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno != errno.EAGAIN:
                return None
    return cached / total


def _spread(ranges: Sequence[tuple[int, int]], samples: int) -> Iterator[int]:
    """File positions at equal distances, counted over the bytes of the ranges."""
    step = -(-sum(stop - start for start, stop in ranges) // samples)
    ahead = step // 2
    for start, stop in ranges:
        yield from range(start + ahead, stop, step)
        ahead = (ahead - (stop - start)) % step if start + ahead < stop else ahead - (stop - start)
