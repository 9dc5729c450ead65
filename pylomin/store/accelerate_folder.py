"""Weights in a folder of accelerate's disk offload: one raw file each, described by ``index.json``."""

from __future__ import annotations

import os
from typing import Any

from pylomin.errors import StoreFormatError, StoreReadError
from pylomin.io.files import Extent, WeightFile
from pylomin.store.base import WeightInfo
from pylomin.store.dtypes import STORED_DTYPES, nbytes_of
from pylomin.store.extents import ExtentStore, StoredWeight
from pylomin.store.inside import path_inside
from pylomin.store.sharded import read_index
from pylomin.store.strict_json import shorten

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORED_DTYPES}
_MAX_DIMENSIONS = 64


class AccelerateFolderStore(ExtentStore):
    """The weights of a folder that accelerate's ``offload_state_dict`` or ``disk_offload`` wrote. Each file stays open.

    Args:
        index_path: ``{weight name: {"dtype": "float32", "shape": [2, 3]}}``; the weight is in ``<name>.dat`` beside it.

    Raises:
        StoreReadError: a file is missing or cannot be read.
        StoreFormatError: the index is malformed, or a file is not as long as it says.
    """

    def __init__(self, index_path: str | os.PathLike[str]) -> None:
        path = os.fspath(index_path)
        weights: dict[str, StoredWeight] = {}
        try:
            for name, described in read_index(path).items():
                weights[name] = _open_weight(name, described, path)
        except BaseException:
            for weight in weights.values():
                weight.file.close()
            raise
        super().__init__(path, weights, [weight.file for weight in weights.values()])


def is_index(index: dict[str, Any]) -> bool:
    """Is a JSON object such an index?"""
    return bool(index) and all(
        isinstance(value, dict) and {"dtype", "shape"} <= value.keys() for value in index.values()
    )


def _open_weight(name: str, described: object, index_path: str) -> StoredWeight:
    match described:
        case {"dtype": str(dtype_name), "shape": list(shape)} if dtype_name in _DTYPES and _is_shape(shape):
            dtype = _DTYPES[dtype_name]
        case _:
            raise StoreFormatError(
                f"offload index {index_path!r} describes weight {shorten(name)} as {shorten(described)}; expected "
                '{"dtype": "float32", "shape": [2, 3]}.'
            )
    path = path_inside(os.path.dirname(index_path) or ".", f"{name}.dat", f"offload index {index_path!r}")
    info = WeightInfo(dtype, tuple(shape), nbytes_of(dtype, shape))
    if not os.path.exists(path) and info.nbytes:
        raise StoreReadError(f"offload index {index_path!r} lists weight {shorten(name)}, but {path!r} does not exist.")
    file = WeightFile(path)
    if file.size_bytes != info.nbytes:
        file.close()
        raise StoreFormatError(
            f"{path!r} has {file.size_bytes} bytes; its index says {info.nbytes}, for {dtype} {shape}. The folder is "
            "damaged or mixed from two models; write it again."
        )
    return StoredWeight(info, file, Extent(0, info.nbytes))


def _is_shape(shape: list[Any]) -> bool:
    return len(shape) <= _MAX_DIMENSIONS and all(type(size) is int and 0 <= size < 1 << 63 for size in shape)
