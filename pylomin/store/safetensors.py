"""Weights in one ``.safetensors`` file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping

from pylomin.io.files import Read, WeightFile, opened
from pylomin.store.extents import ExtentStore, StoredWeight
from pylomin.store.header import PREFIX_BYTES, Header, parse_header, parse_header_length


class SafetensorsStore(ExtentStore):
    """The weights of one ``.safetensors`` file, read from where they lie; the header is read once.

    Args:
        path: the file; one that is open already is closed with this store. It is neither written to nor locked; see
            :class:`~pylomin.io.files.WeightFile` for what happens when it changes.

    Raises:
        StoreReadError: the file is missing or cannot be read.
        StoreFormatError: it is no valid safetensors file.
    """

    def __init__(self, path: str | os.PathLike[str] | WeightFile) -> None:
        file = opened(path)
        try:
            header = _read_header(file)
        except BaseException:
            file.close()
            raise
        self._metadata = header.metadata
        weights = {name: StoredWeight(entry.info, file, entry.extent) for name, entry in header.entries.items()}
        super().__init__(file.path, weights, [file])

    @property
    def metadata(self) -> Mapping[str, str]:
        """The strings under ``__metadata__`` in the header."""
        return self._metadata


def _read_header(file: WeightFile) -> Header:
    prefix = bytearray(min(PREFIX_BYTES, file.size_bytes))
    file.read(0, [memoryview(prefix)])
    length = parse_header_length(prefix, file.size_bytes, file.path)
    raw = bytearray(length)
    file.read(PREFIX_BYTES, [memoryview(raw)])
    file.set_validation(_same_header(prefix + raw))
    return parse_header(raw, file.size_bytes, file.path)


def _same_header(raw: bytes | bytearray) -> Callable[[Read], bool]:
    """The judge of a changed file: are its first bytes those of ``raw``? Keeps a digest only."""
    length, digest = len(raw), hashlib.sha256(raw).digest()

    def is_mended(read: Read) -> bool:
        found = bytearray(length)
        read(0, [memoryview(found)])
        return hashlib.sha256(found).digest() == digest

    return is_mended
