"""The dtypes that safetensors has names for, and the torch dtypes that hold them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F4": "float4_e2m1fn_x2",
}

# safetensors counts 4-bit numbers in the last dimension; one torch element holds two of them.
_NUMBERS_PER_ELEMENT = {"F4": 2}

# Older torch versions lack the latest of these.
TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, torch_name) for name, torch_name in _TORCH_NAMES.items() if hasattr(torch, torch_name)
}
STORED_DTYPES: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def nbytes_of(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Bytes of a dense tensor."""
    return math.prod(shape) * dtype.itemsize


def to_torch_shape(stored_dtype: str, shape: Sequence[int]) -> tuple[int, ...] | None:
    """The shape of the torch tensor for a shape in a header; None where torch cannot hold it."""
    numbers = _NUMBERS_PER_ELEMENT.get(stored_dtype, 1)
    if numbers == 1:
        return tuple(shape)
    if not shape or shape[-1] % numbers:
        return None
    return (*shape[:-1], shape[-1] // numbers)


def to_stored_shape(stored_dtype: str, shape: Sequence[int]) -> tuple[int, ...] | None:
    """The inverse of :func:`to_torch_shape`; None for a packed dtype without dimensions."""
    numbers = _NUMBERS_PER_ELEMENT.get(stored_dtype, 1)
    if numbers == 1:
        return tuple(shape)
    return (*shape[:-1], shape[-1] * numbers) if shape else None
