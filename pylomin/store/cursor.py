"""Reading forward through the part of a weight file that describes it."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable

from pylomin.errors import StoreFormatError
from pylomin.io.files import Extent, Read, WeightFile

_FIRST_WINDOW_BYTES = 1 << 12  # 4 KiB, then twice as much each time: little is read of what is behind a short part
_LAST_WINDOW_BYTES = 1 << 18  # 256 KiB
_DIGEST_BYTES = 1 << 20  # 1 MiB at a time

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class Cursor:
    """A position in a file. Nothing outside ``[start, stop)`` is read, and never more is kept than asked for.

    Args:
        file: what to read.
        start: file offset of the first byte.
        stop: file offset behind the last byte (exclusive).
        what: names the part that is read, for error messages: ``"the header"``.
    """

    def __init__(self, file: WeightFile, start: int, stop: int, what: str) -> None:
        self.file = file
        self.stop = min(stop, file.size_bytes)
        self._what = what
        self._window = b""
        self._window_start = start
        self._window_bytes = _FIRST_WINDOW_BYTES
        self._offset = 0  # in the window

    @property
    def position(self) -> int:
        """File offset of the next byte."""
        return self._window_start + self._offset

    @property
    def left_bytes(self) -> int:
        """Bytes from the position to the end."""
        return self.stop - self.position

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes. Raises StoreFormatError where fewer are left."""
        offset = self._offset
        end = offset + count
        if end > len(self._window):
            self._refill(count)
            offset, end = 0, count
        self._offset = end
        return self._window[offset:end]

    def skip(self, count: int) -> None:
        """Move on without reading. Raises StoreFormatError where fewer bytes are left."""
        if self._offset + count <= len(self._window):
            self._offset += count
            return
        self._check_left(count)
        self._window_start, self._window, self._offset = self.position + count, b"", 0

    def line(self, limit: int) -> bytes:
        """The bytes before the next newline, which is passed; at most ``limit``."""
        found = bytearray()
        while (byte := self.take(1)) != b"\n":
            found += byte
            if len(found) > limit:
                raise self.error(f"has a text of more than {limit} bytes")
        return bytes(found)

    def u32(self) -> int:
        """The next 4 bytes as a number."""
        return int(_U32.unpack(self.take(4))[0])

    def u64(self) -> int:
        """The next 8 bytes as a number."""
        return int(_U64.unpack(self.take(8))[0])

    def error(self, problem: str) -> StoreFormatError:
        """The error for a malformed part, to be raised."""
        return StoreFormatError(
            f"{self._what} of {self.file.path!r} {problem} (at byte {self.position}). The file is damaged or of "
            "another format; download or convert it again."
        )

    def _check_left(self, count: int) -> None:
        if not 0 <= count <= self.left_bytes:
            raise self.error(f"ends too early: {count} more bytes are expected, {max(0, self.left_bytes)} are left")

    def _refill(self, count: int) -> None:
        self._check_left(count)
        start = self.position
        window = bytearray(min(max(count, self._window_bytes), self.stop - start))
        self._window_bytes = min(2 * self._window_bytes, _LAST_WINDOW_BYTES)
        self.file.read(start, [memoryview(window)])
        self._window, self._window_start, self._offset = bytes(window), start, 0


def watch_extents(file: WeightFile, extents: Iterable[Extent]) -> None:
    """A changed file of the same size counts as mended while the bytes in ``extents`` are what they are now."""
    watched = tuple(extents)
    expected = _digest(file.read, watched)
    file.set_validation(lambda read: _digest(read, watched) == expected)


def _digest(read: Read, extents: Iterable[Extent]) -> bytes:
    digest = hashlib.sha256()
    buffer = bytearray(_DIGEST_BYTES)
    for extent in extents:
        for start in range(extent.start, extent.stop, _DIGEST_BYTES):
            view = memoryview(buffer)[: min(_DIGEST_BYTES, extent.stop - start)]
            read(start, [view])
            digest.update(view)
    return digest.digest()
