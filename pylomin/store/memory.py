"""Weights in host memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence

import torch

from pylomin.errors import StoreFormatError, StoreReadError
from pylomin.store.base import ReadRequest, WeightInfo
from pylomin.store.dtypes import nbytes_of
from pylomin.store.requests import check_request, weight_not_found
from pylomin.store.tensor_bytes import contiguous_cpu

_WHERE = "memory"


class MemoryStore:
    """A :class:`~pylomin.store.base.WeightStore` over tensors in host memory.

    Contiguous tensors on the CPU are kept by reference, not copied; others are copied once. A
    tensor that stands under several names stays one tensor.

    Args:
        weights: names to tensors, of any dtype.

    Raises:
        StoreFormatError: a value is not a dense tensor with values in memory.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        kept: dict[int, torch.Tensor] = {}
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in weights.items():
            if not isinstance(tensor, torch.Tensor):
                raise StoreFormatError(f"weight {name!r} is a {type(tensor).__name__}; expected a torch.Tensor.")
            if id(tensor) not in kept:
                kept[id(tensor)] = contiguous_cpu(tensor, name)
            tensors[name] = kept[id(tensor)]
        self._tensors: dict[str, torch.Tensor] | None = tensors
        self._infos = {
            name: WeightInfo(t.dtype, tuple(t.shape), nbytes_of(t.dtype, t.shape)) for name, t in tensors.items()
        }

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def info(self, name: str) -> WeightInfo:
        """Metadata of one weight. Raises WeightNotFoundError."""
        try:
            return self._infos[name]
        except KeyError:
            raise weight_not_found(name, self._infos, _WHERE) from None

    def describe(self, name: str) -> str:
        """``'memory'``. Raises WeightNotFoundError."""
        self.info(name)
        return _WHERE

    def tensor(self, name: str) -> torch.Tensor:
        """The stored tensor itself, not a copy.

        Raises:
            WeightNotFoundError: the weight is not in the store.
            StoreReadError: the store is closed.
        """
        self.info(name)
        tensors = self._tensors
        if tensors is None:
            raise StoreReadError(f"weight {name!r} was in a memory store that is closed.")
        return tensors[name]

    def read(self, requests: Sequence[ReadRequest]) -> None:
        """Copy bytes to every destination. The GIL is released while bytes are copied.

        Raises:
            WeightNotFoundError: a weight is not in the store.
            StoreReadError: bytes outside a weight were asked for, or the store is closed.
        """
        for request in requests:
            check_request(request, self.info(request.name), _WHERE)
        for request in requests:
            tensor = self.tensor(request.name)
            nbytes = len(request.destination)
            if nbytes:
                # memoryview's own copy would hold the GIL.
                destination = (ctypes.c_ubyte * nbytes).from_buffer(request.destination)
                ctypes.memmove(destination, tensor.data_ptr() + request.offset_bytes, nbytes)

    def close(self) -> None:
        """Drop the tensors. Idempotent."""
        self._tensors = None
