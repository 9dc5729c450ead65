"""Cold files, and the speed of the disk under them."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

READ_BYTES = 16 << 20  # 16 MiB, about a group of the models here
ENOUGH_BYTES = 1 << 30  # 1 GiB; a longer read tells nothing more

DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def drop_caches(files: Iterable[Path]) -> str:
    """Get ``files`` out of the page cache, and with the right to do so everything else; says what was done.

    What was written a moment ago is written out first: the system keeps dirty pages.
    """
    os.sync()
    for file in files:
        forget(file)
    try:
        DROP_CACHES.write_text("3")
    except OSError:
        return "the files' pages dropped (posix_fadvise)"
    return "all caches of the system dropped"


def forget(file: Path) -> None:
    """Get one clean file out of the page cache; without effect on pages that a process maps."""
    if not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def cached_share(file: Path) -> float | None:
    """Share of the file's pages that are in the page cache; None where the system does not tell.

    By ``mincore``, which reads nothing (a read with RWF_NOWAIT may start readahead).
    """
    size_bytes = file.stat().st_size
    pages = -(-size_bytes // mmap.PAGESIZE)
    if pages == 0:
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    vector = ctypes.create_string_buffer(pages)
    # ACCESS_COPY: private and writable, which is what from_buffer asks for; nothing is written.
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), size_bytes, access=mmap.ACCESS_COPY) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        failed = libc.mincore(ctypes.addressof(first), size_bytes, vector)
        del first  # or the mapping could not be closed
    return None if failed else sum(byte & 1 for byte in vector.raw) / pages


def disk_bandwidth(file: Path, mode: Literal["direct", "buffered"] = "direct") -> float:
    """Bytes per second of reading ``file`` from the disk, in the way and in the sizes that pylomin reads it.

    Args:
        file: up to ``ENOUGH_BYTES`` of it are read, from the start.
        mode: ``"direct"`` (past the page cache) or ``"buffered"`` (through it, each piece dropped again). Where the
            file system refuses direct reads, they are buffered.
    """
    size_bytes = min(file.stat().st_size, ENOUGH_BYTES)
    descriptor = _open(file, mode)
    forget(file)
    with mmap.mmap(-1, READ_BYTES) as buffer, memoryview(buffer) as view:  # page-aligned, as direct reads require
        view[:: mmap.PAGESIZE] = bytes(READ_BYTES // mmap.PAGESIZE)  # page faults are no part of reading
        position = 0
        start = time.perf_counter()
        while position < size_bytes:
            count = os.preadv(descriptor, [view], position)
            if mode == "buffered":
                os.posix_fadvise(descriptor, position, count, os.POSIX_FADV_DONTNEED)
            position += count
            if count < READ_BYTES:
                break  # the end of the file
        elapsed_s = time.perf_counter() - start
    os.close(descriptor)
    return position / elapsed_s


def _open(file: Path, mode: str) -> int:
    if mode == "direct" and hasattr(os, "O_DIRECT"):
        with contextlib.suppress(OSError):  # what a file system says that has no direct reads
            return os.open(file, os.O_RDONLY | os.O_DIRECT)
    return os.open(file, os.O_RDONLY)
