"""A small weight file, and what may happen to it."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import NamedTuple

from pylomin.io.files import WeightFile

CONTENT = bytes(range(256)) * 64  # 16 KiB


def read(file: WeightFile, offset: int, *sizes: int) -> list[bytes]:
    buffers = [bytearray(size) for size in sizes]
    file.read(offset, [memoryview(buffer) for buffer in buffers])
    return [bytes(buffer) for buffer in buffers]


def touch_later(path: Path) -> None:
    """Move the modification time on, whatever the resolution of the file system's clock."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))


def overwrite(path: Path, content: bytes) -> None:
    """Change the file in place: same inode, later modification time."""
    later = path.stat().st_mtime_ns + 10**9
    with open(path, "r+b") as file:
        file.truncate(0)
        file.write(content)
    os.utime(path, ns=(later, later))


def open_descriptors() -> int:
    gc.collect()  # what others left
    return len(os.listdir("/dev/fd"))


class Shown(NamedTuple):
    nbytes: int
    resident_bytes: int


def shown_of(path: Path) -> list[Shown]:
    """The mappings of a file in this process."""
    lines = Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines()
    found = []
    for i, line in enumerate(lines):
        if line.endswith(f" {path}"):
            sizes = dict(following.split()[:2] for following in lines[i + 1 : i + 8])
            found.append(Shown(int(sizes["Size:"]) << 10, int(sizes["Rss:"]) << 10))
    return found
