"""The header of the .npy format: bytes in, data out, without numpy and without evaluating anything.

Format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pylomin.errors import StoreFormatError
from pylomin.store.base import WeightInfo
from pylomin.store.dtypes import nbytes_of

MAGIC = b"\x93NUMPY"
MAX_HEADER_BYTES = 1 << 16  # 64 KiB; numpy itself reads 10,000 characters
_MAX_DIMENSIONS = 64
_MAX_TENSOR_BYTES = (1 << 63) - 1  # torch counts in int64
_LENGTH_BYTES = {1: 2, 2: 4, 3: 4}  # by major version

_TEXT = re.compile(
    r"\s*\{\s*'descr'\s*:\s*'(?P<order>[<>|=])(?P<kind>[a-zA-Z])(?P<size>\d{1,4})'\s*,"
    r"\s*'fortran_order'\s*:\s*(?P<fortran>True|False)\s*,"
    r"\s*'shape'\s*:\s*\(\s*(?P<shape>(?:\d{1,19}L?\s*,\s*)*(?:\d{1,19}L?)?)\s*\)\s*,?\s*\}\s*"
)
_DTYPES = {
    "b1": torch.bool, "i1": torch.int8, "i2": torch.int16, "i4": torch.int32, "i8": torch.int64, "u1": torch.uint8,
    "u2": torch.uint16, "u4": torch.uint32, "u8": torch.uint64, "f2": torch.float16, "f4": torch.float32,
    "f8": torch.float64, "c8": torch.complex64, "c16": torch.complex128,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class NpyHeader:
    """What stands before the values of an array."""

    info: WeightInfo
    stride: tuple[int, ...]  # in elements
    swapped: bool  # the bytes of each number lie in the other order than this machine's
    length_bytes: int  # of the header, all counted


def read_npy_header(take: Callable[[int], bytes], where: str) -> NpyHeader:
    """Parse a header.

    Args:
        take: returns as many of the following bytes as it is asked for.
        where: names the array in error messages.

    Raises:
        StoreFormatError: it is malformed, or torch has no such dtype.
    """
    magic = take(len(MAGIC))
    major, _ = take(2)
    if magic != MAGIC or major not in _LENGTH_BYTES:
        raise StoreFormatError(f"{where} does not begin as a .npy array does. {_REPLACE}")
    length = int.from_bytes(take(_LENGTH_BYTES[major]), "little")
    if length > MAX_HEADER_BYTES:
        raise StoreFormatError(f"{where} claims a header of {length} bytes; expected at most {MAX_HEADER_BYTES}.")
    text = take(length).decode("latin-1")
    match = _TEXT.fullmatch(text)
    if match is None:
        raise StoreFormatError(
            f"{where} has header {text[:200].strip()!r}; expected {{'descr': '<f4', 'fortran_order': False, 'shape': "
            "(2, 3), }: an array of plain numbers."
        )
    dtype = dtype_of(match["kind"] + match["size"], where)
    shape = tuple(int(size.strip().rstrip("L")) for size in match["shape"].split(",") if size.strip())
    nbytes = dtype.itemsize
    for size in shape:
        nbytes *= max(size, 1)
    if len(shape) > _MAX_DIMENSIONS or nbytes > _MAX_TENSOR_BYTES:
        raise StoreFormatError(f"{where} has shape {shape[:8]}..., which is too large for a tensor.")
    fortran = match["fortran"] == "True"
    return NpyHeader(
        WeightInfo(dtype, shape, nbytes_of(dtype, shape)),
        _strides(shape, fortran=fortran),
        is_swapped(match["order"]),
        len(MAGIC) + 2 + _LENGTH_BYTES[major] + length,
    )


def dtype_of(name: str, where: str) -> torch.dtype:
    """The torch dtype for numpy's ``"f4"``. Raises StoreFormatError."""
    if name not in _DTYPES:
        raise StoreFormatError(
            f"{where} has numpy dtype {name!r}, which torch has not; expected one of {', '.join(_DTYPES)}. Convert it "
            "with array.astype."
        )
    return _DTYPES[name]


def is_swapped(order: str) -> bool:
    """Does numpy's ``"<"`` or ``">"`` name the order of bytes that this machine does not have?"""
    return order == (">" if sys.byteorder == "little" else "<")


def _strides(shape: tuple[int, ...], *, fortran: bool) -> tuple[int, ...]:
    strides, step = [], 1
    for size in shape if fortran else reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(strides if fortran else reversed(strides))


_REPLACE = "The file is damaged or of another format; write it again with numpy.save."
