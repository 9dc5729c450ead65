"""Complete reads at a file position, whatever the system makes of a single call."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

_MAX_BUFFERS = 1024  # IOV_MAX on Linux and macOS; one preadv takes no more
_MAX_READ_BYTES = 0x7FFFF000  # 2 GiB - 4096: Linux transfers no more per call, macOS refuses 2 GiB
_COPY_BYTES = 1 << 24  # 16 MiB at a time through a temporary where preadv is missing


def fill(fd: int, offset_bytes: int, buffers: Sequence[memoryview]) -> tuple[int, OSError | None]:
    """Fill all ``buffers``; returns the bytes read, and the error that stopped it. Fewer and no error: end of file."""
    pending = [buffer for buffer in buffers if len(buffer)]
    position = offset_bytes
    done = 0  # buffers filled
    while done < len(pending):
        try:
            count = _read_some(fd, _one_call(pending, done), position)
        except OSError as error:
            return position - offset_bytes, error
        if count == 0:
            break
        position += count
        while done < len(pending) and count >= len(pending[done]):
            count -= len(pending[done])
            done += 1
        if count:
            pending[done] = pending[done][count:]
    return position - offset_bytes, None


def pieces(buffers: Sequence[memoryview], nbytes: int) -> Iterator[list[memoryview]]:
    """The same memory in lists of ``nbytes`` each, the last one shorter."""
    piece: list[memoryview] = []
    room = nbytes
    for buffer in buffers:
        while len(buffer) >= room:
            yield [*piece, buffer[:room]]
            piece, buffer, room = [], buffer[room:], nbytes
        if len(buffer):
            piece.append(buffer)
            room -= len(buffer)
    if piece:
        yield piece


def _one_call(pending: list[memoryview], start: int) -> list[memoryview]:
    """As many of ``pending[start:]`` as one call may read, the last one cut where needed."""
    batch: list[memoryview] = []
    room = _MAX_READ_BYTES
    for buffer in pending[start : start + _MAX_BUFFERS]:
        batch.append(buffer[:room])
        room -= len(batch[-1])
        if room == 0:
            break
    return batch


def _read_some(fd: int, buffers: list[memoryview], offset_bytes: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, buffers, offset_bytes)
    data = os.pread(fd, min(len(buffers[0]), _COPY_BYTES), offset_bytes)
    buffers[0][: len(data)] = data
    return len(data)
