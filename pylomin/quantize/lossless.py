"""Exact differences to a reference: XOR, bytes of equal weight together, zstd.

While a model trains, sign, exponent and leading bits of most weights stay, so the XOR of new and old is mostly zeros,
and the more so if the high bytes of all numbers stand together.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from pylomin.errors import MissingPackageError

BLOCK_BYTES = 1 << 20  # 1 MiB; each block can be decoded on its own
_LEVEL = 3


def compress(values: torch.Tensor, reference: torch.Tensor) -> bytes:
    """The difference of two vectors of bytes of equal length, whose numbers have ``itemsize`` bytes.

    Args:
        values: uint8 of shape ``(numbers, itemsize)``.
        reference: like ``values``.
    """
    planes = (values ^ reference).t().contiguous()
    compressed: bytes = _zstandard().ZstdCompressor(level=_LEVEL).compress(planes.numpy())
    return compressed


def restore(block: memoryview, values: torch.Tensor) -> bool:
    """Turn the reference into what was compressed, in place.

    Args:
        block: from :func:`compress`.
        values: the reference, uint8 of shape ``(numbers, itemsize)``.

    Returns:
        False if the block is damaged.
    """
    nbytes = math.prod(values.shape)
    try:
        if _zstandard().frame_content_size(block) != nbytes:  # checked before memory is allocated
            return False
        raw = _zstandard().ZstdDecompressor().decompress(block)
    except _zstandard().ZstdError:
        return False
    if len(raw) != nbytes:
        return False
    planes = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(values.shape[1], values.shape[0])
    values ^= planes.t()
    return True


def check_available() -> None:
    """Raises MissingPackageError unless zstandard can be imported."""
    _zstandard()


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise MissingPackageError(
            "lossless deltas are compressed with zstandard, which is not installed: pip install 'pylomin[zstd]'."
        ) from error
    return zstandard
