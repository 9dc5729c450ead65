"""Cold files, and the speed of the disk under them."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pylomin.io.buffers import BufferPool
from pylomin.io.direct import direct_bytes
from pylomin.io.files import Extent, WeightFile

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
    """Share of the file that is in the page cache; None where the system does not tell."""
    opened = WeightFile(file)
    try:
        return opened.cached_fraction([Extent(0, opened.size_bytes)])
    finally:
        opened.close()


def disk_bandwidth(file: Path, mode: Literal["direct", "buffered"] = "direct", piece_bytes: int = 16 << 20) -> float:
    """Bytes per second of reading ``file`` from the disk, by pylomin's own reader.

    Args:
        file: up to ``ENOUGH_BYTES`` of it are read, from the start.
        mode: ``"direct"`` (past the page cache, where the file system allows it) or ``"buffered"`` (through it, and
            dropped again).
        piece_bytes: of one read; what the groups of the model take. A multiple of a page.
    """
    forget(file)
    opened = WeightFile(file)
    size_bytes = min(opened.size_bytes, ENOUGH_BYTES)
    memory = BufferPool().try_take(piece_bytes)  # what pylomin reads into, too
    assert memory is not None
    view = memoryview(memory).cast("B")
    for page in range(0, piece_bytes, mmap.PAGESIZE):
        view[page] = 0  # page faults are no part of reading
    start = time.perf_counter()
    for position in range(0, size_bytes, piece_bytes):
        nbytes = min(piece_bytes, size_bytes - position)
        if mode == "direct":
            opened.read_direct(position, nbytes, view[: direct_bytes(position, nbytes)])
        else:
            opened.read(position, [view[:nbytes]], drop_cache=True)
    elapsed_s = time.perf_counter() - start
    opened.close()
    return size_bytes / elapsed_s
