"""Weights in one ``.npz`` file of numpy."""

from __future__ import annotations

import os

from pylomin.errors import StoreFormatError
from pylomin.io.files import WeightFile, opened
from pylomin.store.cursor import Cursor, watch_extents
from pylomin.store.deflated import DeflatedWeight, Inflater
from pylomin.store.extents import EncodedWeight, ExtentStore, StoredWeight
from pylomin.store.npy import weight_at
from pylomin.store.npy_header import read_npy_header
from pylomin.store.zip_directory import DEFLATED, STORED, ZipEntry, read_zip_directory

SUFFIX = ".npy"


class NpzStore(ExtentStore):
    """The arrays of one ``.npz`` file: read in place (``numpy.savez``), or decompressed as they are read
    (``numpy.savez_compressed``; all before a row is decompressed with it).

    Args:
        path: the file; one that is open already is closed with this store.

    Raises:
        StoreReadError: the file is missing or cannot be read.
        StoreFormatError: it is no valid .npz file, or has what is no array of numbers.
    """  # noqa: D205

    def __init__(self, path: str | os.PathLike[str] | WeightFile) -> None:
        file = opened(path)
        try:
            directory = read_zip_directory(file)
            weights = {
                entry.name.removesuffix(SUFFIX): _weight(entry, file)
                for entry in directory.entries.values()
                if entry.name.endswith(SUFFIX)
            }
            if len(weights) < len(directory.entries):
                others = [name for name in directory.entries if not name.endswith(SUFFIX)]
                raise StoreFormatError(
                    f"{file.path!r} has entries that are no arrays: {others[:10]}. It is no .npz file."
                )
            watch_extents(file, [directory.extent])
        except BaseException:
            file.close()
            raise
        super().__init__(file.path, weights, [file])


def _weight(entry: ZipEntry, file: WeightFile) -> StoredWeight | EncodedWeight:
    where = f"array {entry.name[:200]!r} of {file.path!r}"
    if entry.method == STORED:
        return weight_at(Cursor(file, entry.extent.start, entry.extent.stop, where), where)
    if entry.method != DEFLATED:
        raise StoreFormatError(
            f"{where} is compressed by method {entry.method}; expected none or deflate ({DEFLATED})."
        )
    inflater = Inflater(file, entry)
    header = read_npy_header(inflater.take, where)
    if header.length_bytes + header.info.nbytes != entry.size_bytes:
        raise StoreFormatError(
            f"{where} has {entry.size_bytes} bytes; expected {header.length_bytes + header.info.nbytes} for "
            f"{header.info.dtype} {list(header.info.shape)}. The file is damaged; write it again."
        )
    return DeflatedWeight(header.info, file, entry, header.length_bytes, header.stride, header.swapped)
