"""One remote file in the cache: a local file with holes, and a record of which blocks of it are whole.

``<key>.data`` has the size of the remote file; blocks that are not there yet are holes. ``<key>.blocks`` is a header
and a byte for each block. A block is marked after all its bytes were written, so that a process that dies in between
leaves nothing that anybody would use. What was marked is used only until the system ends, unless it was written out
to the disk meanwhile: after a loss of power, marks may be there whose bytes are not.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import struct
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pylomin.io.descriptor import Descriptor

BLOCK_BYTES = 1 << 18  # 256 KiB; the least that is fetched: a header, some rows
HEADER_BYTES = 4096
_MISSING, _WRITTEN, _KEPT = 0, 1, 2  # a mark: not there; written; and on the disk, whatever happens
_FORMAT = 1
# Locks that belong to an open file and not to a process, so that they hold between stores of one process too.
_CLAIM = getattr(fcntl, "F_OFD_SETLK", None) if sys.platform == "linux" and struct.calcsize("P") == 8 else None


@dataclass(frozen=True, slots=True)
class Header:
    """What a ``.blocks`` file says before its marks. Changed under the lock of the cache only."""

    url: str  # what may be shown of it; for people who look
    tag: str
    size_bytes: int
    boot: str  # of the system, when the latest marks were made
    granted: int = 0  # blocks that it may have: those that are there, and those that will be
    sealed_ns: int | None = None  # when the data was modified last, once all is there and on the disk
    format: int = _FORMAT
    block_bytes: int = BLOCK_BYTES

    @property
    def blocks(self) -> int:
        return -(-self.size_bytes // BLOCK_BYTES)


def read_header(fd: int) -> Header | None:
    """The header of a ``.blocks`` file; None if it is not valid."""
    try:
        header = Header(**json.loads(os.pread(fd, HEADER_BYTES, 0)))
        valid = header.format == _FORMAT and header.block_bytes == BLOCK_BYTES
        return header if valid and os.fstat(fd).st_size == HEADER_BYTES + header.blocks else None
    except (ValueError, TypeError, OSError):
        return None


def write_header(fd: int, header: Header) -> None:
    # One page: whoever reads sees the old one or the new one.
    os.pwrite(fd, json.dumps(asdict(header)).encode().ljust(HEADER_BYTES), 0)


def boot_id() -> str:
    """Of the running system; empty where it has none, and then only what is on the disk is used later."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def prepare(data_fd: int, blocks_fd: int, fresh: Header) -> None:
    """Make what is there usable, or start anew. For whoever is the only one to use it; lets OSError pass."""
    header = read_header(blocks_fd)
    status = os.fstat(data_fd)
    same = header is not None and (header.tag, header.size_bytes) == (fresh.tag, fresh.size_bytes)
    if (
        header is None
        or not same
        or status.st_size != fresh.size_bytes
        or header.sealed_ns not in (None, status.st_mtime_ns)
    ):
        os.ftruncate(blocks_fd, 0)
        os.ftruncate(data_fd, 0)
        os.ftruncate(data_fd, fresh.size_bytes)
        os.ftruncate(blocks_fd, HEADER_BYTES + fresh.blocks)
        write_header(blocks_fd, fresh)
        return
    marks = _pread(blocks_fd, header.blocks, HEADER_BYTES)
    if not header.boot or header.boot != fresh.boot:
        for first, last in _runs(marks, _WRITTEN, 0, len(marks)):
            os.pwrite(blocks_fd, bytes(last - first), HEADER_BYTES + first)
        marks = _pread(blocks_fd, header.blocks, HEADER_BYTES)
    there = len(marks) - marks.count(_MISSING)
    write_header(blocks_fd, replace(header, boot=fresh.boot, granted=there))


class Entry:
    """What of a remote file is local. Of use in one thread, but for :meth:`is_local` and :meth:`keep`.

    Args:
        data: of the ``.data`` file, locked as being in use for as long as it is open.
        blocks: of the ``.blocks`` file, or None for an entry that keeps nothing.
        writable: may more be kept?
    """

    def __init__(self, data: Descriptor, blocks: Descriptor | None, size_bytes: int, *, writable: bool) -> None:
        self._data: Descriptor | None = data
        self.size_bytes = size_bytes
        self.writable = writable
        self.granted = 0  # blocks that this process may still begin to fetch
        self.owner_pid = os.getpid()  # of what is granted
        self._blocks = blocks
        self._whole = bytearray(-(-size_bytes // BLOCK_BYTES))  # 1 for blocks known to be there
        self._unkept = 0  # blocks marked since the last keep()
        self.refresh(0, len(self._whole))

    @staticmethod
    def nowhere(size_bytes: int) -> Entry:
        """For where no cache can be: a file that is nothing but a hole."""
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("pylomin-remote")
        else:
            with tempfile.TemporaryFile() as file:
                fd = os.dup(file.fileno())
        data = Descriptor(fd)
        os.ftruncate(fd, size_bytes)
        return Entry(data, None, size_bytes, writable=False)

    @property
    def data(self) -> Descriptor:
        """Of the local file."""
        assert self._data is not None
        return self._data

    @property
    def is_complete(self) -> bool:
        return 0 not in self._whole

    @property
    def unkept_bytes(self) -> int:
        """Marked since the last :meth:`keep`."""
        return self._unkept * BLOCK_BYTES

    @property
    def missing_blocks(self) -> int:
        return self._whole.count(0)

    def is_local(self, start: int, stop: int) -> bool:
        """Are the bytes ``[start, stop)`` here? From any thread."""
        first, last = _span(start, stop)
        return self._whole.find(0, first, last) < 0

    def missing(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Runs of blocks, (first, last exclusive), that hold bytes of ``[start, stop)`` and are not here."""
        first, last = _span(start, min(stop, self.size_bytes))
        return list(_runs(self._whole, 0, first, last))

    def bytes_of(self, first: int, last: int) -> tuple[int, int]:
        """(start, stop exclusive) of blocks ``[first, last)``."""
        return first * BLOCK_BYTES, min(last * BLOCK_BYTES, self.size_bytes)

    def refresh(self, first: int, last: int) -> bool:
        """See which of blocks ``[first, last)`` others brought; True if all are here."""
        if self._blocks is not None and self._whole.find(0, first, last) >= 0:
            marks = _pread(self._blocks.fd, last - first, HEADER_BYTES + first)
            self._whole[first:last] = bytes(mark != _MISSING for mark in marks)
        return self._whole.find(0, first, last) < 0

    def claim(self, first: int, last: int) -> bool:
        """Try to be the only one who fetches these blocks. The claim of a process that dies ends with it."""
        return self._lock(fcntl.F_WRLCK, first, last)

    def unclaim(self, first: int, last: int) -> None:
        self._lock(fcntl.F_UNLCK, first, last)

    def write(self, offset_bytes: int, content: bytes | bytearray) -> None:
        """Lets OSError pass."""
        data = self._data
        assert data is not None
        view = memoryview(content)
        while len(view):
            count = os.pwrite(data.fd, view, offset_bytes)
            offset_bytes += count
            view = view[count:]

    def mark(self, first: int, last: int) -> None:
        """Say that all bytes of these blocks are written. Lets OSError pass."""
        assert self._blocks is not None
        os.pwrite(self._blocks.fd, bytes([_WRITTEN]) * (last - first), HEADER_BYTES + first)
        self._whole[first:last] = b"\1" * (last - first)
        self._unkept += last - first

    def keep(self) -> int | None:
        """Write out to the disk what was marked. From any thread; takes its time, and lets OSError pass.

        Returns:
            If all of the file is here and was written out, when it was modified last.
        """
        data, blocks = self._data, self._blocks
        if data is None or blocks is None:
            return None
        self._unkept = 0
        marks = _pread(blocks.fd, len(self._whole), HEADER_BYTES)
        (os.fdatasync if hasattr(os, "fdatasync") else os.fsync)(data.fd)
        for first, last in _runs(marks, _WRITTEN, 0, len(marks)):
            os.pwrite(blocks.fd, bytes([_KEPT]) * (last - first), HEADER_BYTES + first)
        return None if _MISSING in marks else os.fstat(data.fd).st_mtime_ns

    @contextlib.contextmanager
    def header(self) -> Iterator[tuple[int, Header] | None]:
        """Descriptor and content of the header, to change; None if there is none."""
        header = None if self._blocks is None else read_header(self._blocks.fd)
        yield None if header is None or self._blocks is None else (self._blocks.fd, header)

    def close(self) -> None:
        """Give the descriptors back; that of the data lives as long as somebody reads."""
        self._data = self._blocks = None
        self.writable = False

    def _lock(self, kind: int, first: int, last: int) -> bool:
        if _CLAIM is None or self._blocks is None:
            return True  # several may fetch the same then, and write the same bytes
        flock = struct.pack("hhqqi4x", kind, os.SEEK_SET, HEADER_BYTES + first, last - first, 0)
        try:
            fcntl.fcntl(self._blocks.fd, _CLAIM, flock)
        except OSError as error:
            # Where the file system has no such locks, everybody may.
            return error.errno not in (errno.EAGAIN, errno.EACCES)
        return True


def _span(start: int, stop: int) -> tuple[int, int]:
    """The blocks that hold ``[start, stop)``: (first, last exclusive)."""
    first = start // BLOCK_BYTES
    return first, -(-stop // BLOCK_BYTES) if stop > start else first


def _runs(marks: bytes | bytearray, value: int, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Runs of marks of one value."""
    while (begin := marks.find(value, first, last)) >= 0:
        end = begin
        while end < last and marks[end] == value:
            end += 1
        yield begin, end
        first = end


def _pread(fd: int, nbytes: int, offset_bytes: int) -> bytes:
    """A record that was cut off, by whomever, says that nothing is there."""
    pieces = []
    while nbytes:
        piece = os.pread(fd, nbytes, offset_bytes)
        if not piece:
            pieces.append(bytes(nbytes))
            break
        pieces.append(piece)
        nbytes -= len(piece)
        offset_bytes += len(piece)
    return b"".join(pieces)
