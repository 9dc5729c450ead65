"""Where the entries of a zip file lie. Only the directory and the entries' headers are read.

Format: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, sections 4.3 and 4.5.3. Stricter than it: one disk,
no encryption, unique names, nothing before the first entry's offset that the directory does not count, and no two
entries that share bytes.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from pylomin.errors import StoreFormatError
from pylomin.io.files import Extent, WeightFile

STORED = 0
DEFLATED = 8
SIGNATURE = b"PK\x03\x04"

_MAX_DIRECTORY_BYTES = 1 << 24  # 16 MiB: about 200,000 entries
_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_MAX_COMMENT_BYTES = 0xFFFF
_ENCRYPTED = 1
_UTF8 = 1 << 11
_ZIP64_EXTRA = 1
_IN_EXTRA = 0xFFFFFFFF  # a 32-bit number that stands for one of 64 bits elsewhere
_REPLACE = "The file is damaged, truncated or no zip file; download or convert it again."


@dataclass(frozen=True, slots=True)
class ZipEntry:
    """One entry. ``extent`` holds its bytes as they are in the file, compressed or not."""

    name: str
    method: int  # STORED, DEFLATED or another number of the format
    size_bytes: int  # uncompressed, as the directory says
    crc: int  # CRC-32 of the uncompressed bytes, as the directory says
    extent: Extent


@dataclass(frozen=True, slots=True)
class ZipDirectory:
    """All entries by name, in file order, and the extent of the directory itself."""

    entries: dict[str, ZipEntry]
    extent: Extent


@dataclass(frozen=True, slots=True)
class _Listed:
    name: bytes
    decoded_name: str
    method: int
    crc: int
    stored_bytes: int
    size_bytes: int
    header_start: int


def read_zip_directory(file: WeightFile) -> ZipDirectory:
    """Read and check the directory of a zip file, and the header before each entry.

    Raises:
        StoreFormatError: something is malformed, lies outside the file or overlaps.
    """
    count, extent = _find_directory(file)
    raw = _read(file, extent.start, extent.nbytes)
    listed = sorted(_parse_directory(raw, count, file.path), key=lambda entry: entry.header_start)
    entries: dict[str, ZipEntry] = {}
    for entry, following in itertools.zip_longest(listed, listed[1:]):
        limit = extent.start if following is None else following.header_start
        if entry.decoded_name in entries:
            raise _malformed(file.path, f"has two entries named {entry.decoded_name!r}")
        entries[entry.decoded_name] = _locate(file, entry, limit)
    return ZipDirectory(entries, extent)


def _find_directory(file: WeightFile) -> tuple[int, Extent]:
    """How many entries the directory has, and where it lies."""
    end, numbers = _find_end(file)
    disk, first_disk, count_here, count, size, start = numbers
    large = _find_end64(file, end)
    if large is not None:
        end, fields = large
        if any(a not in (b, 0xFFFF, _IN_EXTRA) for a, b in zip(numbers, fields, strict=True)):
            raise _malformed(file.path, "has two ends of its directory that differ")
        disk, first_disk, count_here, count, size, start = fields
    if disk or first_disk or count_here != count:
        raise _malformed(file.path, "is one of several parts")
    if start + size != end or size > _MAX_DIRECTORY_BYTES or count * _CENTRAL.size > size:
        raise _malformed(file.path, f"claims a directory of {count} entries in {size} bytes at byte {start}")
    return count, Extent(start, end)


def _find_end(file: WeightFile) -> tuple[int, tuple[int, ...]]:
    """Where the end of the directory begins, and its numbers."""
    # Most files have no comment: then only the end is read, and nothing of the entries.
    for room_bytes in (0, _MAX_COMMENT_BYTES):
        tail_bytes = min(file.size_bytes, _END.size + room_bytes)
        tail = _read(file, file.size_bytes - tail_bytes, tail_bytes)
        found = tail.rfind(b"PK\x05\x06")
        if found >= 0 and found + _END.size <= len(tail):
            _, *numbers, comment_bytes = _END.unpack_from(tail, found)
            if found + _END.size + comment_bytes != len(tail):
                raise _malformed(file.path, "has bytes behind its end")
            return file.size_bytes - tail_bytes + found, tuple(numbers)
    raise _malformed(file.path, "has no end of a zip directory")


def _find_end64(file: WeightFile, end: int) -> tuple[int, tuple[int, ...]] | None:
    """Where the 64-bit end of the directory begins, and its numbers; None where ``end`` is the only one."""
    locator_start = end - _END64_LOCATOR.size
    if locator_start < 0:
        return None
    signature, _, start, _ = _END64_LOCATOR.unpack(_read(file, locator_start, _END64_LOCATOR.size))
    if signature != b"PK\x06\x07":
        return None
    if start + _END64.size == locator_start:
        signature, _, _, _, *fields = _END64.unpack(_read(file, start, _END64.size))
        if signature == b"PK\x06\x06":
            return start, tuple(fields)
    raise _malformed(file.path, "has a malformed 64-bit end of its directory")


def _parse_directory(raw: bytes, count: int, path: str) -> Iterator[_Listed]:
    position = 0
    for _ in range(count):
        if position + _CENTRAL.size > len(raw):
            raise _malformed(path, "has a directory that ends too early")
        (signature, _, _, flags, method, _, _, crc, stored_bytes, size_bytes, name_bytes, extra_bytes, comment_bytes,
         disk, _, _, header_start) = _CENTRAL.unpack_from(raw, position)  # fmt: skip
        name_start = position + _CENTRAL.size
        extra_start = name_start + name_bytes
        position = extra_start + extra_bytes + comment_bytes
        if signature != b"PK\x01\x02" or position > len(raw):
            raise _malformed(path, "has a malformed directory")
        name = raw[name_start:extra_start]
        if flags & _ENCRYPTED:
            raise _malformed(path, f"has an encrypted entry {name!r}")
        if _IN_EXTRA in (stored_bytes, size_bytes, header_start):
            extra = raw[extra_start : extra_start + extra_bytes]
            size_bytes, stored_bytes, header_start = _large(extra, (size_bytes, stored_bytes, header_start), path)
        if disk:
            raise _malformed(path, "is one of several parts")
        try:
            decoded_name = name.decode("utf-8" if flags & _UTF8 else "cp437")
        except UnicodeDecodeError:
            raise _malformed(path, f"has an entry whose name is no text: {name[:80]!r}") from None
        yield _Listed(name, decoded_name, method, crc, stored_bytes, size_bytes, header_start)
    if position != len(raw):
        raise _malformed(path, "has more in its directory than it counts")


def _large(extra: bytes, numbers: tuple[int, ...], path: str) -> list[int]:
    """The numbers, with those that say so taken from the zip64 extra field."""
    position = 0
    while position + 4 <= len(extra):
        kind, nbytes = struct.unpack_from("<2H", extra, position)
        if kind == _ZIP64_EXTRA:
            values = iter(struct.unpack_from(f"<{min(nbytes, len(extra) - position - 4) // 8}Q", extra, position + 4))
            large = [next(values, None) if number == _IN_EXTRA else number for number in numbers]
            if all(number is not None for number in large):
                return [int(number or 0) for number in large]
        position += 4 + nbytes
    raise _malformed(path, "lacks the 64-bit size of an entry")


def _locate(file: WeightFile, entry: _Listed, limit: int) -> ZipEntry:
    """Find where the bytes of an entry begin, which its own header alone tells; they end before ``limit``."""
    shown = repr(entry.decoded_name[:200])
    if entry.header_start + _LOCAL.size > limit:
        raise _malformed(file.path, f"has an entry {shown} outside of its place")
    raw = _read(file, entry.header_start, min(_LOCAL.size + len(entry.name), limit - entry.header_start))
    signature, _, flags, method, _, _, _, _, _, name_bytes, extra_bytes = _LOCAL.unpack_from(raw)
    start = entry.header_start + _LOCAL.size + name_bytes + extra_bytes
    if signature != SIGNATURE or method != entry.method or flags & _ENCRYPTED or start > limit:
        raise _malformed(file.path, f"has a malformed header before its entry {shown}")
    if name_bytes != len(entry.name) or raw[_LOCAL.size :] != entry.name:
        raise _malformed(file.path, f"has another name before its entry {shown} than in its directory")
    stop = start + entry.stored_bytes
    if stop > limit:
        raise _malformed(
            file.path, f"has an entry {shown} that ends at byte {stop}, beyond byte {limit} where something else begins"
        )
    if entry.method == STORED and entry.stored_bytes != entry.size_bytes:
        raise _malformed(file.path, f"has an uncompressed entry {shown} of two sizes")
    return ZipEntry(entry.decoded_name, entry.method, entry.size_bytes, entry.crc, Extent(start, stop))


def _read(file: WeightFile, start: int, count: int) -> bytes:
    raw = bytearray(count)
    file.read(start, [memoryview(raw)])
    return bytes(raw)


def _malformed(path: str, problem: str) -> StoreFormatError:
    return StoreFormatError(f"zip file {path!r} {problem}. {_REPLACE}")
