"""Tensors as the bytes that files hold: contiguous, row-major, in host memory."""

from __future__ import annotations

import ctypes

import torch

from pylomin.errors import StoreFormatError
from pylomin.store.dtypes import nbytes_of


def contiguous_cpu(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """The tensor itself where it already is contiguous in host memory, otherwise a copy that is.

    Raises:
        StoreFormatError: naming the weight: it is sparse or quantized, or has no values in memory.
    """
    if tensor.layout != torch.strided or tensor.is_quantized:
        kind = "quantized" if tensor.is_quantized else f"of layout {tensor.layout}"
        raise StoreFormatError(
            f"weight {name!r} is {kind}; only dense tensors can be stored. Convert it with "
            f"{'dequantize' if tensor.is_quantized else 'to_dense'}() first."
        )
    dense = tensor.detach()
    if dense.device.type != "meta":
        # A conjugated or negated view is contiguous too, but its bytes are not its values.
        dense = dense.to("cpu").resolve_conj().resolve_neg().contiguous()
    if dense.data_ptr() == 0 and dense.numel() > 0:
        raise StoreFormatError(
            f"weight {name!r} ({type(tensor).__name__} on device {tensor.device}) has no values in "
            "memory. Materialize it first."
        )
    return dense


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor from :func:`contiguous_cpu`, not copied; the view keeps it alive."""
    nbytes = nbytes_of(tensor.dtype, tensor.shape)
    if nbytes == 0:
        return memoryview(bytearray())
    array = (ctypes.c_ubyte * nbytes).from_address(tensor.data_ptr())
    array.tensor = tensor  # type: ignore[attr-defined]  # the memory lives as long as the view
    return memoryview(array).cast("B")
