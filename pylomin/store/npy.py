"""Weights in ``.npy`` files of numpy: one of them, or all of a directory."""

from __future__ import annotations

import os
from collections.abc import Sequence

from pylomin.errors import StoreFormatError, StoreReadError
from pylomin.io.files import Extent, WeightFile, opened
from pylomin.store.cursor import Cursor, watch_extents
from pylomin.store.extents import EncodedWeight, ExtentStore, StoredWeight
from pylomin.store.inside import path_inside
from pylomin.store.npy_header import read_npy_header
from pylomin.store.strided import placed_weight

_SUFFIX = ".npy"


class NpyStore(ExtentStore):
    """The arrays of ``.npy`` files, read in place; each is named as its file is.

    Args:
        path: a file, or a directory whose ``.npy`` files are taken (not those of directories below it). Each file of a
            directory stays open. A file that is open already is closed with this store.

    Raises:
        StoreReadError: a file is missing or cannot be read.
        StoreFormatError: a file is no valid array of numbers, or is a link that leaves the directory.
    """

    def __init__(self, path: str | os.PathLike[str] | WeightFile) -> None:
        weights: dict[str, StoredWeight | EncodedWeight] = {}
        files: list[WeightFile] = []
        try:
            for array in [path] if isinstance(path, WeightFile) else _array_paths(os.fspath(path)):
                file = opened(array)
                files.append(file)
                cursor = Cursor(file, 0, file.size_bytes, "the header")
                weights[os.path.basename(file.path).removesuffix(_SUFFIX)] = weight_at(cursor, f"{file.path!r}")
                watch_extents(file, [Extent(0, cursor.position)])
        except BaseException:
            for file in files:
                file.close()
            raise
        super().__init__(path.path if isinstance(path, WeightFile) else os.fspath(path), weights, files)


def weight_at(cursor: Cursor, where: str) -> StoredWeight | EncodedWeight:
    """The array whose header is at ``cursor``, and which ends where the cursor does; the header is passed.

    Raises:
        StoreFormatError: it is malformed, or of another length.
    """
    header = read_npy_header(cursor.take, where)
    if header.info.nbytes != cursor.left_bytes:
        raise StoreFormatError(
            f"{where} has {cursor.left_bytes} bytes of values; expected {header.info.nbytes} for {header.info.dtype} "
            f"{list(header.info.shape)}. The file is damaged or truncated; write it again."
        )
    return placed_weight(header.info, cursor.file, cursor.position, header.stride, swapped=header.swapped)


def _array_paths(path: str) -> Sequence[str]:
    if not os.path.isdir(path):
        return [path]
    try:
        names = sorted(name for name in os.listdir(path) if name.endswith(_SUFFIX))
    except OSError as error:
        raise StoreReadError(f"cannot list directory {path!r}: {error.strerror}.") from error
    return [path_inside(path, name, f"directory {path!r}") for name in names]
