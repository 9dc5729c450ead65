"""How fast the bytes of a file come, in each way that pylomin reads them."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

from pylomin.io import page_cache
from pylomin.io.direct import direct_bytes
from pylomin.io.files import Extent, WeightFile
from pylomin.io.mapping import mapped_bytes
from pylomin.io.modes import Mode

MODES: tuple[Mode, ...] = ("mapped", "buffered", "direct")
PIECE_BYTES = 16 << 20  # 16 MiB of one read: about a group of weights
WARM = 0.99  # of a file in the page cache counts as cached
COLD = 0.01


@dataclass(frozen=True, slots=True)
class Speed:
    """One way to read, cold or cached."""

    mode: Mode
    state: str  # "cold" or "cached": where the bytes were
    bytes_per_s: float | None
    why_not: str = ""  # where there is no speed


def speeds(paths: Sequence[str], limit_bytes: int) -> list[Speed]:
    """Read at most ``limit_bytes`` of the files in each way, from the disk and from the page cache."""
    ways = [(mode, state) for state in ("cold", "cached") for mode in MODES if (mode, state) != ("direct", "cached")]
    return [measure(paths, mode, state, limit_bytes) for mode, state in ways]


def measure(paths: Sequence[str], mode: Mode, state: str, limit_bytes: int) -> Speed:
    """One of them. Direct reads never come from the page cache, nor leave anything in it."""
    nbytes, elapsed_s = 0, 0.0
    for path in paths:
        file = WeightFile(path)
        try:
            size_bytes = min(file.size_bytes, limit_bytes - nbytes)
            if size_bytes <= 0:
                break
            problem = _refusal(file, mode) or _prepare(file, state, size_bytes)
            if problem:
                return Speed(mode, state, None, problem)
            elapsed_s += _read(file, mode, size_bytes)
            nbytes += size_bytes
        finally:
            file.close()
    return Speed(mode, state, nbytes / elapsed_s) if nbytes else Speed(mode, state, None, "the files are empty")


def _refusal(file: WeightFile, mode: Mode) -> str:
    refused = {"mapped": file.map_refused, "buffered": None, "direct": file.direct_refused}[mode]
    return refused or ""


def _prepare(file: WeightFile, state: str, size_bytes: int) -> str:
    """Get the start of the file into the page cache or out of it; why not, where that is so."""
    if state == "cached":
        _read(file, "buffered", size_bytes)
    else:
        descriptor = os.open(file.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # the system drops no page that is not written out
            page_cache.drop(descriptor, 0, file.size_bytes)
        except OSError:
            pass  # what is cached tells
        finally:
            os.close(descriptor)
    cached = file.cached_fraction([Extent(0, size_bytes)])
    if cached is None:
        return "the system does not say what is cached"
    if state == "cached":
        return "" if cached >= WARM else f"only {cached:.0%} of the file stays in the page cache"
    return "" if cached <= COLD else f"{cached:.0%} of the file stays in the page cache"


def _read(file: WeightFile, mode: Mode, size_bytes: int) -> float:
    """Seconds. The pages that are read into are there already."""
    room = mmap.mmap(-1, mapped_bytes(0, PIECE_BYTES))
    with memoryview(room) as view:
        for page in range(0, len(room), mmap.PAGESIZE):
            view[page] = 0
        started = time.perf_counter()
        for position in range(0, size_bytes, PIECE_BYTES):
            nbytes = min(PIECE_BYTES, size_bytes - position)
            if mode == "mapped":
                file.map(position, nbytes, room)
            elif mode == "direct":
                file.read_direct(position, nbytes, view[: direct_bytes(position, nbytes)])
            else:
                file.read(position, [view[:nbytes]])
        return time.perf_counter() - started
