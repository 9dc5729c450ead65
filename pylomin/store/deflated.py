"""Compressed arrays, decompressed as they are read."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pylomin.errors import StoreFormatError
from pylomin.io.files import WeightFile
from pylomin.store.base import WeightInfo
from pylomin.store.strided import MOVED_AS, in_native_order, is_row_major
from pylomin.store.tensor_bytes import byte_view
from pylomin.store.zip_directory import ZipEntry

_INPUT_BYTES = 1 << 16  # 64 KiB
_OUTPUT_BYTES = 1 << 18  # 256 KiB: no more is decompressed at a time, whatever the ratio


class Inflater:
    """The bytes of a deflated entry, from the first one on. Never more than asked for is decompressed.

    Whoever reads to the end is told if their checksum is not the one in the directory.
    """

    def __init__(self, file: WeightFile, entry: ZipEntry) -> None:
        self._file = file
        self._left_bytes = entry.size_bytes
        self._expected_crc = entry.crc
        self._crc = 0
        self._chunks = _chunks(file, entry)
        self._decompressor = zlib.decompressobj(-zlib.MAX_WBITS)

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes. Raises StoreFormatError where they are not there."""
        pieces = []
        while count:
            piece = self._some(min(count, _OUTPUT_BYTES))
            count -= len(piece)
            pieces.append(piece)
        return b"".join(pieces)

    def fill(self, destination: memoryview) -> None:
        """Fill ``destination`` with the next bytes."""
        done = 0
        while done < len(destination):
            piece = self._some(min(len(destination) - done, _OUTPUT_BYTES))
            destination[done : done + len(piece)] = piece
            done += len(piece)

    def skip(self, count: int) -> None:
        """Pass ``count`` bytes."""
        while count:
            count -= len(self._some(min(count, _OUTPUT_BYTES)))

    def _some(self, limit: int) -> bytes:
        """1 to ``limit`` of the next bytes."""
        limit = min(limit, self._left_bytes)
        while limit:
            chunk = self._decompressor.unconsumed_tail or next(self._chunks, b"")
            try:
                piece = self._decompressor.decompress(chunk, limit)
            except zlib.error as error:
                raise self._malformed(str(error)) from error
            if piece:
                self._left_bytes -= len(piece)
                self._crc = zlib.crc32(piece, self._crc)
                if self._left_bytes == 0 and self._crc != self._expected_crc:
                    raise self._malformed("its checksum is another one")
                return piece
            if not chunk or self._decompressor.eof:
                break
        raise self._malformed("it ends too early")

    def _malformed(self, problem: str) -> StoreFormatError:
        return StoreFormatError(
            f"compressed data of {self._file.path!r} is damaged: {problem}. Download or write the file again."
        )


@dataclass(frozen=True, slots=True)
class DeflatedWeight:
    """An array that an entry of a zip file holds compressed."""

    info: WeightInfo
    file: WeightFile
    entry: ZipEntry
    skipped_bytes: int  # uncompressed, before the first element
    stride: tuple[int, ...]  # in elements
    swapped: bool

    def read_into(self, offset_bytes: int, destination: memoryview) -> None:
        """Fill ``destination`` with row-major bytes. All that lies before them is decompressed too."""
        inflater = Inflater(self.file, self.entry)
        inflater.skip(self.skipped_bytes)
        if not self.swapped and is_row_major(self.info.shape, self.stride):
            inflater.skip(offset_bytes)
            inflater.fill(destination)
            return
        itemsize = self.info.dtype.itemsize
        raw = torch.empty(self.info.nbytes // itemsize, dtype=MOVED_AS[itemsize], device="cpu")
        inflater.fill(byte_view(raw))
        if self.swapped:
            raw = in_native_order(raw, self.info.dtype)
        values = raw.as_strided(self.info.shape, self.stride).contiguous()
        destination[:] = byte_view(values)[offset_bytes : offset_bytes + len(destination)]


def _chunks(file: WeightFile, entry: ZipEntry) -> Iterator[bytes]:
    extent = entry.extent
    for start in range(extent.start, extent.stop, _INPUT_BYTES):
        chunk = bytearray(min(_INPUT_BYTES, extent.stop - start))
        file.read(start, [memoryview(chunk)])
        yield bytes(chunk)
