"""Arrays of numpy as weights. numpy itself is not imported: who has its arrays has it already."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from pylomin.errors import StoreFormatError
from pylomin.io.files import Extent, WeightFile
from pylomin.store.base import WeightInfo
from pylomin.store.dtypes import nbytes_of
from pylomin.store.extents import EncodedWeight, ExtentStore, StoredWeight
from pylomin.store.npy_header import dtype_of, is_swapped
from pylomin.store.strided import placed_weight, span_of


class MemmapStore(ExtentStore):
    """Arrays that ``numpy.memmap`` mapped from files, read from those files.

    Reading a mapping itself would make its pages count as this process's memory. What was written to a mapping is in
    the file's pages at once; flushing is not needed.

    Args:
        arrays: names to memmaps, or to views of them (``memmap[3:].T``), of which numpy itself leaves no memmap where
            they are empty.

    Raises:
        StoreReadError: a file is gone.
        StoreFormatError: torch has no such dtype.
    """

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        files: dict[str, WeightFile] = {}
        weights: dict[str, StoredWeight | EncodedWeight] = {}
        try:
            for name, array in arrays.items():
                if array.size:
                    path = os.fspath(array.filename)
                    if path not in files:
                        files[path] = WeightFile(path, watched=False)
                    weights[name] = _mapped_weight(array, files[path], f"array {name!r}")
            for name, array in arrays.items():
                if not array.size:
                    dtype, shape, *_ = _described(array, f"array {name!r}")
                    weights[name] = StoredWeight(WeightInfo(dtype, shape, 0), next(iter(files.values())), Extent(0, 0))
        except BaseException:
            for file in files.values():
                file.close()
            raise
        super().__init__(", ".join(files) or "memmaps", weights, files.values())


def is_array(value: object) -> bool:
    """Is ``value`` an array of numpy, or anything that shows itself as one?"""
    return not isinstance(value, torch.Tensor) and hasattr(type(value), "__array_interface__")


def are_mapped(values: Iterable[Any]) -> bool:
    """Are all ``values`` arrays of ``numpy.memmap`` whose files hold what is in them?"""
    arrays = list(values)
    full = [array for array in arrays if is_array(array) and array.size]
    return all(map(is_array, arrays)) and bool(full) and all(map(_is_mapped, full))


def _is_mapped(array: Any) -> bool:
    # A copy-on-write mapping may have values that its file does not. No tensor runs backwards.
    return getattr(array, "filename", None) is not None and array.mode != "c" and min(array.strides, default=0) >= 0


def as_tensor(array: Any, name: str) -> torch.Tensor:
    """A tensor over the memory of an array.

    Raises:
        StoreFormatError: torch has no such dtype.
    """
    dtype, shape, stride, swapped, address = _described(array, f"array {name!r}")
    if swapped or min(stride, default=0) < 0:
        return as_tensor(array.astype(array.dtype.newbyteorder("="), order="C", copy=True), name)
    count = span_of(shape, stride)
    if count == 0:
        return torch.empty(shape, dtype=dtype, device="cpu")
    memory = (ctypes.c_ubyte * (count * dtype.itemsize)).from_address(address)
    memory.array = array  # type: ignore[attr-defined]  # the memory lives as long as the tensor
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, stride)


def _mapped_weight(array: Any, file: WeightFile, where: str) -> StoredWeight | EncodedWeight:
    dtype, shape, stride, swapped, address = _described(array, where)
    info = WeightInfo(dtype, shape, nbytes_of(dtype, shape))
    whole = array
    while getattr(whole.base, "filename", None) is not None:
        whole = whole.base
    start = whole.offset + address - whole.__array_interface__["data"][0]
    if min(stride, default=0) < 0:
        raise StoreFormatError(
            f"{where} runs backwards through {file.path!r}. Copy it: numpy.ascontiguousarray(array)."
        )
    if start < 0 or start + span_of(shape, stride) * dtype.itemsize > file.size_bytes:
        raise StoreFormatError(f"{where} is mapped from {file.path!r}, which has become shorter.")
    return placed_weight(info, file, start, stride, swapped=swapped)


def _described(array: Any, where: str) -> tuple[torch.dtype, tuple[int, ...], tuple[int, ...], bool, int]:
    """Dtype, shape, stride in elements, whether bytes are swapped, and address."""
    interface = array.__array_interface__
    kind: str = interface["typestr"]
    dtype = dtype_of(kind[1:], where)
    shape = tuple(interface["shape"])
    if any(step % dtype.itemsize for step in array.strides):
        raise StoreFormatError(f"{where} has elements that do not lie on multiples of their size. Copy it first.")
    stride = tuple(step // dtype.itemsize for step in array.strides)
    return dtype, shape, stride, is_swapped(kind[0]), interface["data"][0]
