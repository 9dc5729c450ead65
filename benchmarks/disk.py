"""Cold files, and the speed of the disk under them."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from pylomin.io.buffers import BufferPool
from pylomin.io.direct import direct_bytes
from pylomin.io.files import Extent, WeightFile

ENOUGH_BYTES = 1 << 30  # 1 GiB; a longer read tells nothing more
ENOUGH_S = 0.5  # of computing; longer tells nothing more
LOAD_ROWS, LOAD_COLUMNS = 8192, 2048  # of a float32 matrix of 64 MiB, which no cache holds

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


def speeds_together(file: Path, mode: Literal["direct", "buffered"], piece_bytes: int) -> tuple[float, float]:
    """How much reading and computing slow each other down: processors, and the way to memory, are theirs in common.

    Computing is what decoding is, products of a matrix and a vector in all threads of torch.

    Returns:
        Bytes per second of :func:`disk_bandwidth` meanwhile; and the speed of computing meanwhile, as a share of its
        speed alone.
    """
    matrix, vector = torch.ones(LOAD_ROWS, LOAD_COLUMNS), torch.ones(1, LOAD_COLUMNS)
    start = time.perf_counter()
    alone = _products_per_s(matrix, vector, lambda: time.perf_counter() - start < ENOUGH_S)
    with ThreadPoolExecutor(1) as thread:
        reading = thread.submit(disk_bandwidth, file, mode, piece_bytes)
        meanwhile = _products_per_s(matrix, vector, lambda: not reading.done())
        return reading.result(), meanwhile / alone


def _products_per_s(matrix: torch.Tensor, vector: torch.Tensor, goes_on: Callable[[], bool]) -> float:
    count, start = 0, time.perf_counter()
    while goes_on() or not count:
        nn.functional.linear(vector, matrix)
        count += 1
    return count / (time.perf_counter() - start)
