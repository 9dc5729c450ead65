"""Weights in one ``.gguf`` file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A header with named values (the tokenizer among
them; skipped here), then name, dimensions, type and offset of every tensor, then their data.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pylomin.errors import StoreFormatError
from pylomin.io.files import Extent, WeightFile, opened
from pylomin.store.base import WeightInfo
from pylomin.store.cursor import Cursor, watch_extents
from pylomin.store.dtypes import nbytes_of
from pylomin.store.extents import EncodedWeight, ExtentStore, StoredWeight
from pylomin.store.gguf_blocks import BLOCK_TYPES, QuantisedWeight

MAGIC = b"GGUF"

_VERSIONS = (2, 3)
_MAX_HEADER_BYTES = 1 << 26  # 64 MiB: a tokenizer of 250,000 tokens takes 10
_MAX_NAME_BYTES = 1 << 16
_MAX_TENSORS = 100_000
_MAX_DIMENSIONS = 8  # the format allows 4
_MAX_TENSOR_BYTES = (1 << 63) - 1  # torch counts in int64
_MAX_ALIGNMENT_BYTES = 1 << 24
_MAX_NESTING = 4  # of arrays in values
_ALIGNMENT_KEY = b"general.alignment"

# Of values in the header: bytes by type.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_UINT32, _STRING, _ARRAY = 4, 8, 9

# Of tensors, by number.
_TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
_PLAIN = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Listed:
    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int  # in the data section

    @property
    def stored_bytes(self) -> int:
        if self.type_name in _PLAIN:
            return nbytes_of(_PLAIN[self.type_name], self.shape)
        block = BLOCK_TYPES[self.type_name]
        return math.prod(self.shape) // block.elements * block.nbytes


class GGUFStore(ExtentStore):
    """The weights of one ``.gguf`` file, under the names that the file gives them (``blk.0.attn_q.weight``).

    Plain types are read in place. Q4_0, Q8_0, Q4_K and Q6_K become float32 as they are read, block by block. Shapes
    are torch's: the last dimension is the one whose elements follow each other.

    Args:
        path: the file; one that is open already is closed with this store.

    Raises:
        StoreReadError: the file is missing or cannot be read.
        StoreFormatError: it is no valid GGUF file of version 2 or 3, or has a weight of another type.
    """

    def __init__(self, path: str | os.PathLike[str] | WeightFile) -> None:
        file = opened(path)
        try:
            cursor = Cursor(file, 0, _MAX_HEADER_BYTES, "the GGUF header")
            listed, alignment = _read_header(cursor)
            data_start = -(-cursor.position // alignment) * alignment
            weights = dict(_place(listed, data_start, file))
            watch_extents(file, [Extent(0, cursor.position)])
        except BaseException:
            file.close()
            raise
        super().__init__(file.path, weights, [file])


def _read_header(cursor: Cursor) -> tuple[list[_Listed], int]:
    """The tensors as listed, and the alignment of the data section; the cursor is left behind the header."""
    if cursor.take(len(MAGIC)) != MAGIC:
        raise cursor.error("does not begin with GGUF")
    version = cursor.u32()
    if version not in _VERSIONS:
        raise cursor.error(f"is of version {version}; expected {' or '.join(map(str, _VERSIONS))}, little-endian")
    tensor_count, value_count = cursor.u64(), cursor.u64()
    if tensor_count > _MAX_TENSORS:
        raise cursor.error(f"claims {tensor_count} weights; expected at most {_MAX_TENSORS}")
    alignment = 32
    for _ in range(value_count):  # each takes bytes of the file, so that a huge count ends soon
        key = _text(cursor)
        kind = cursor.u32()
        if key == _ALIGNMENT_KEY and kind == _UINT32:
            alignment = cursor.u32()
        else:
            _skip_value(cursor, kind)
    if not (0 < alignment <= _MAX_ALIGNMENT_BYTES and alignment & (alignment - 1) == 0):
        raise cursor.error(f"has alignment {alignment}; expected a power of two")
    listed: dict[str, _Listed] = {}
    for _ in range(tensor_count):
        tensor = _read_tensor(cursor)
        if tensor.name in listed:
            raise cursor.error(f"has two weights named {tensor.name!r}")
        if tensor.offset % alignment:
            raise cursor.error(f"places weight {tensor.name!r} at {tensor.offset}, which is no multiple of {alignment}")
        listed[tensor.name] = tensor
    return list(listed.values()), alignment


def _text(cursor: Cursor) -> bytes:
    length = cursor.u64()
    if length > _MAX_NAME_BYTES:
        raise cursor.error(f"claims a name of {length} bytes")
    return cursor.take(length)


def _skip_value(cursor: Cursor, kind: int, nesting: int = 0) -> None:
    if kind in _SIZES:
        cursor.skip(_SIZES[kind])
    elif kind == _STRING:
        cursor.skip(cursor.u64())
    elif kind == _ARRAY and nesting < _MAX_NESTING:
        kind, count = cursor.u32(), cursor.u64()
        if kind in _SIZES:
            cursor.skip(_SIZES[kind] * count)
            return
        for _ in range(count):
            _skip_value(cursor, kind, nesting + 1)
    else:
        raise cursor.error(f"has a value of type {kind}, which the format has not, or arrays in arrays")


def _read_tensor(cursor: Cursor) -> _Listed:
    name = _text(cursor).decode("utf-8", "replace")
    dimensions = cursor.u32()
    if dimensions > _MAX_DIMENSIONS:
        raise cursor.error(f"has weight {name[:200]!r} of {dimensions} dimensions")
    shape = tuple(cursor.u64() for _ in range(dimensions))[::-1]
    number, offset = cursor.u32(), cursor.u64()
    type_name = _TYPE_NAMES.get(number, f"number {number}")
    block = BLOCK_TYPES.get(type_name)
    if type_name not in _PLAIN and block is None:
        raise StoreFormatError(
            f"weight {name[:200]!r} of {cursor.file.path!r} is of type {type_name}; expected one of "
            f"{', '.join([*_PLAIN, *BLOCK_TYPES])}. Convert the file with llama-quantize."
        )
    nbytes = torch.float64.itemsize
    for size in shape:
        nbytes *= max(size, 1)
    if nbytes > _MAX_TENSOR_BYTES or (block is not None and (not shape or shape[-1] % block.elements)):
        raise cursor.error(f"has weight {name[:200]!r} of shape {list(shape)}, not possible with type {type_name}")
    return _Listed(name, shape, type_name, offset)


def _place(
    listed: list[_Listed], data_start: int, file: WeightFile
) -> Iterator[tuple[str, StoredWeight | EncodedWeight]]:
    """In file order. Weights lie in the file, and no two share bytes."""
    listed = sorted(listed, key=lambda tensor: (tensor.offset, tensor.stored_bytes))
    for tensor, following in itertools.zip_longest(listed, listed[1:]):
        limit = file.size_bytes if following is None else data_start + following.offset
        start = data_start + tensor.offset
        extent = Extent(start, start + tensor.stored_bytes)
        if extent.stop > min(limit, file.size_bytes):
            raise StoreFormatError(
                f"weight {tensor.name[:200]!r} of {file.path!r} ends at byte {extent.stop}, beyond byte "
                f"{min(limit, file.size_bytes)} where the next one begins or the file ends. The file is damaged or "
                "truncated; download it again."
            )
        dtype = _PLAIN.get(tensor.type_name, torch.float32)
        info = WeightInfo(dtype, tensor.shape, nbytes_of(dtype, tensor.shape))
        if tensor.type_name in _PLAIN:
            yield tensor.name, StoredWeight(info, file, extent)
        else:
            yield tensor.name, QuantisedWeight(info, file, start, BLOCK_TYPES[tensor.type_name])
