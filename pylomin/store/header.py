"""The safetensors header: bytes in, data out. Nothing here opens a file.

Format: the header's length in 8 bytes, little-endian; a JSON object ``{name: {"dtype", "shape",
"data_offsets"}}`` with an optional ``"__metadata__"`` of strings; the data section, which the
weights cover without holes or overlaps. See https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from pylomin.errors import StoreFormatError
from pylomin.io.files import Extent
from pylomin.store.base import WeightInfo
from pylomin.store.dtypes import (
    STORED_DTYPES,
    TORCH_DTYPES,
    nbytes_of,
    to_stored_shape,
    to_torch_shape,
)
from pylomin.store.strict_json import parse_object, shorten

PREFIX_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # as in safetensors
DATA_ALIGNMENT_BYTES = 4096  # what O_DIRECT reads need at most
_MAX_DIMENSIONS = 64  # torch's operators take no more
_MAX_TENSOR_BYTES = (1 << 63) - 1  # torch counts in int64
_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_REPLACE = "The file is damaged or truncated; download or convert it again."


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """One weight of a header."""

    info: WeightInfo
    extent: Extent  # in absolute file offsets


@dataclass(frozen=True, slots=True)
class Header:
    """A valid header."""

    entries: Mapping[str, HeaderEntry]  # in file order
    metadata: Mapping[str, str]
    data_start: int  # file offset in bytes at which the data section starts


def parse_header_length(prefix: bytes | bytearray, file_size_bytes: int, path: str) -> int:
    """Bytes of JSON that follow the first 8 bytes of a file.

    Raises:
        StoreFormatError: the length cannot be that of a safetensors header in a file of that size.
    """
    if len(prefix) < PREFIX_BYTES:
        raise StoreFormatError(
            f"{path!r} holds {file_size_bytes} bytes; a safetensors file has at least {PREFIX_BYTES + 2}. {_REPLACE}"
        )
    length = int.from_bytes(prefix[:PREFIX_BYTES], "little")
    limit = min(MAX_HEADER_BYTES, file_size_bytes - PREFIX_BYTES)
    if not 2 <= length <= limit:
        raise StoreFormatError(
            f"{path!r} claims a safetensors header of {length} bytes; expected 2 to {limit} in a "
            f"file of {file_size_bytes} bytes. The file is not a safetensors file, or is truncated."
        )
    return length


def parse_header(header: bytes | bytearray, file_size_bytes: int, path: str) -> Header:
    """Check the JSON of a header (without its 8-byte length) against itself and the file's size.

    Raises:
        StoreFormatError: naming the path, the weight, what was expected and what was found.
    """
    fields = parse_object(header, f"the safetensors header of {path!r}")
    metadata = _parse_metadata(fields.pop(_METADATA, {}), path)
    data_start = PREFIX_BYTES + len(header)
    entries = [(name, _Parser(path, name, data_start, file_size_bytes).entry(value)) for name, value in fields.items()]
    entries.sort(key=lambda item: (item[1].extent.start, item[1].extent.stop))
    _check_coverage(entries, data_start, file_size_bytes, path)
    return Header(dict(entries), metadata, data_start)


def build_header(
    weights: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """All that comes before the data in a file of ``(name, dtype, shape)`` weights, in file order.

    Padded with spaces so that the data section starts on a multiple of 4096 bytes.

    Raises:
        StoreFormatError: safetensors has no name for a dtype, or the names are not unique.
    """
    fields: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in weights:
        stored_dtype = STORED_DTYPES.get(dtype)
        stored_shape = to_stored_shape(stored_dtype, shape) if stored_dtype else None
        if stored_shape is None:
            raise StoreFormatError(
                f"weight {name!r} has dtype {dtype} and shape {tuple(shape)}, which safetensors "
                f"cannot hold. Convert it first; possible are {', '.join(map(str, STORED_DTYPES))}."
            )
        if name in fields or name == _METADATA:
            raise StoreFormatError(
                f"weight name {name!r} is reserved or given twice; a safetensors file needs "
                "unique names. Rename the weight."
            )
        stop = offset + nbytes_of(dtype, shape)
        fields[name] = {
            "dtype": stored_dtype,
            "shape": stored_shape,
            "data_offsets": (offset, stop),
        }
        offset = stop
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
    try:
        header = text.encode()
    except UnicodeEncodeError as error:
        raise StoreFormatError(f"a weight name or metadata is not valid text: {error}") from error
    header += b" " * (-(PREFIX_BYTES + len(header)) % DATA_ALIGNMENT_BYTES)
    if len(header) > MAX_HEADER_BYTES:
        raise StoreFormatError(
            f"the header would take {len(header)} bytes; safetensors allows {MAX_HEADER_BYTES}. "
            "Spread the weights over several files, or shorten the metadata."
        )
    return len(header).to_bytes(PREFIX_BYTES, "little") + header


@dataclass(frozen=True, slots=True)
class _Parser:
    """Checks one entry; holds what its error messages name."""

    path: str
    name: str
    data_start: int
    file_size_bytes: int

    def entry(self, value: object) -> HeaderEntry:
        if not isinstance(value, dict) or value.keys() != _FIELDS:
            self._fail(f"its entry is {shorten(value)}; expected exactly {sorted(_FIELDS)}")
        dtype = self._dtype(value["dtype"])
        stored_shape = self._integers(value["shape"], "shape")
        shape = to_torch_shape(value["dtype"], stored_shape)
        if shape is None:
            self._fail(f"shape {stored_shape} is not possible with dtype {value['dtype']}")
        self._check_representable(shape, dtype)
        offsets = self._integers(value["data_offsets"], "data_offsets")
        if len(offsets) != 2 or offsets[0] > offsets[1]:
            self._fail(f"data_offsets are {shorten(offsets)}; expected [begin, end], begin <= end")
        begin, end = offsets
        nbytes = nbytes_of(dtype, shape)
        if end - begin != nbytes:
            self._fail(
                f"data_offsets {offsets} hold {end - begin} bytes; expected {nbytes} for dtype "
                f"{value['dtype']} and shape {stored_shape}"
            )
        extent = Extent(self.data_start + begin, self.data_start + end)
        if extent.stop > self.file_size_bytes:
            self._fail(f"it ends at byte {extent.stop}, the file at {self.file_size_bytes}")
        return HeaderEntry(WeightInfo(dtype, shape, nbytes), extent)

    def _dtype(self, name: object) -> torch.dtype:
        if not isinstance(name, str) or name not in TORCH_DTYPES:
            self._fail(
                f"dtype {shorten(name)} is not one that torch {torch.__version__} can hold; "
                f"expected one of {', '.join(TORCH_DTYPES)}"
            )
        return TORCH_DTYPES[name]

    def _integers(self, values: object, field: str) -> list[int]:
        # type() and not isinstance(): True is an int too.
        if not isinstance(values, list) or not all(type(v) is int and v >= 0 for v in values):
            self._fail(f"{field} is {shorten(values)}; expected a list of non-negative integers")
        return values

    def _check_representable(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if len(shape) > _MAX_DIMENSIONS:
            self._fail(f"it has {len(shape)} dimensions; torch takes {_MAX_DIMENSIONS}")
        nbytes = dtype.itemsize
        for size in shape:
            # An empty dimension does not excuse the others: torch computes strides over them.
            nbytes *= max(size, 1)
        if nbytes > _MAX_TENSOR_BYTES:
            self._fail(f"shape {shorten(list(shape))} is too large for a tensor")

    def _fail(self, problem: str) -> NoReturn:
        raise StoreFormatError(f"weight {shorten(self.name)} of {self.path!r}: {problem}. {_REPLACE}")


def _parse_metadata(value: object, path: str) -> dict[str, str]:
    if isinstance(value, dict) and all(isinstance(text, str) for text in value.values()):
        return value
    raise StoreFormatError(f"{_METADATA} of {path!r} is {shorten(value)}; expected an object of strings. {_REPLACE}")


def _check_coverage(entries: list[tuple[str, HeaderEntry]], data_start: int, file_size_bytes: int, path: str) -> None:
    """The weights follow each other from the start of the data section to the end of the file."""
    position = data_start
    for name, entry in entries:
        start = entry.extent.start
        if start != position:
            problem = "overlaps the one before it" if start < position else "leaves a hole before it"
            raise StoreFormatError(
                f"weight {shorten(name)} of {path!r} {problem}: it starts at byte {start}; "
                f"expected {position}. {_REPLACE}"
            )
        position = entry.extent.stop
    if position != file_size_bytes:
        raise StoreFormatError(
            f"the weights of {path!r} end at byte {position}, the file at {file_size_bytes}: "
            f"{file_size_bytes - position} bytes belong to no weight. {_REPLACE}"
        )
