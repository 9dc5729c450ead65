"""Pages of a file shown in memory of our own, without a copy.

Python's ``mmap`` duplicates the descriptor for every mapping, which 10,000 weights cannot afford. So it only makes the
place, anonymous memory without a descriptor, whose end is C code that no interrupt stops; the file goes over it.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence

from pylomin.io import syscalls
from pylomin.io.buffers import HUGE_PAGE_BYTES, PAGE_BYTES, aligned


def mapped_bytes(offset_bytes: int, nbytes: int) -> int:
    """Bytes of the pages that hold a range of a file."""
    return aligned(offset_bytes % PAGE_BYTES + nbytes, PAGE_BYTES)


def show_pages(
    fd: int,
    offset_bytes: int,
    nbytes: int,
    pages: mmap.mmap,
    at_bytes: int,
    *,
    whole_huge: bool = False,
    scattered: bool = False,
) -> None:
    """Let ``pages`` show the file pages that hold a range, at ``at_bytes``. OSError, and then they are as before.

    Args:
        whole_huge: show all of the huge pages that hold the range. There must be room for them around ``at_bytes``,
            which is as far from the beginning of a huge page as the range is in the file.
        scattered: little of it is used, here and there; the system should not read all of a huge page for that.
    """
    first, length = _shown(offset_bytes, nbytes, at_bytes, whole_huge=whole_huge)
    address = _address(pages, first, length)
    try:
        syscalls.map_file(address, length, fd, offset_bytes - offset_bytes % PAGE_BYTES - (at_bytes - first))
    except OSError:
        # Some kernels unmap first and then fail; others' memory must not come where ``pages`` will be unmapped.
        syscalls.fill_hole(address, length)
        raise
    if length >= HUGE_PAGE_BYTES and not scattered:
        syscalls.prefer_huge_pages(address, length)


def drop_shown(offset_bytes: int, nbytes: int, pages: mmap.mmap, at_bytes: int, *, whole_huge: bool = False) -> None:
    """Give back the memory of what :func:`show_pages` mapped. Used again, it is what the file holds."""
    first, length = _shown(offset_bytes, nbytes, at_bytes, whole_huge=whole_huge)
    syscalls.drop(_address(pages, first, length), length)


def fault_in(offset_bytes: int, nbytes: int, pages: mmap.mmap, at_bytes: int) -> None:
    """Fault in what :func:`show_pages` mapped, ahead of use. OSError where a use would be a bus error."""
    length = mapped_bytes(offset_bytes, nbytes)
    syscalls.populate(_address(pages, at_bytes, length), length)


def copy_ranges(ranges: Sequence[tuple[int, int]], first: int, pages: mmap.mmap, buffer: memoryview) -> None:
    """Copy ranges ``(offset, bytes)`` of a file, one after the other, into ``buffer``.

    Args:
        first: offset of the file that :func:`show_pages` showed at the beginning of ``pages``.

    Raises OSError where a use of the pages would be a bus error.
    """
    source = ctypes.addressof(ctypes.c_char.from_buffer(pages)) - (first - first % PAGE_BYTES)
    destination = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    for offset, nbytes in ranges:
        start = source + offset
        page = start - start % PAGE_BYTES
        syscalls.populate(page, aligned(start + nbytes - page, PAGE_BYTES))
        ctypes.memmove(destination, start, nbytes)
        destination += nbytes


def _shown(offset_bytes: int, nbytes: int, at_bytes: int, *, whole_huge: bool) -> tuple[int, int]:
    """Where in its pages a range of a file is shown, and how many bytes."""
    length = mapped_bytes(offset_bytes, nbytes)
    if not whole_huge:
        return at_bytes, length
    before = (offset_bytes - offset_bytes % PAGE_BYTES) % HUGE_PAGE_BYTES
    return at_bytes - before, aligned(before + length, HUGE_PAGE_BYTES)


def _address(pages: mmap.mmap, at_bytes: int, length: int) -> int:
    if at_bytes % PAGE_BYTES or at_bytes < 0 or at_bytes + length > len(pages):
        raise ValueError(f"{length} bytes do not fit at {at_bytes} of {len(pages)} bytes of pages")
    return ctypes.addressof(ctypes.c_char.from_buffer(pages, at_bytes))
