"""Weights that are computed from a checkpoint's tensors whenever they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pylomin.errors import StoreReadError
from pylomin.pretrained.deferred import DeferredTensor
from pylomin.store.base import ReadRequest, WeightInfo
from pylomin.store.dtypes import nbytes_of
from pylomin.store.requests import check_request, weight_not_found
from pylomin.store.tensor_bytes import byte_view, contiguous_cpu

_WHERE = "a checkpoint, converted when it is read"


class ComputedStore:
    """A :class:`~pylomin.store.base.WeightStore` of tensors that are computed anew by each read.

    A read of some rows computes the whole weight, and has its inputs and the result in memory meanwhile.
    """

    def __init__(self, tensors: Mapping[str, DeferredTensor]) -> None:
        self._tensors = dict(tensors)
        self._is_closed = False

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def info(self, name: str) -> WeightInfo:
        """Metadata of one weight. Raises WeightNotFoundError."""
        if name not in self._tensors:
            raise weight_not_found(name, self._tensors, _WHERE)
        tensor = self._tensors[name]
        return WeightInfo(tensor.dtype, tuple(tensor.shape), nbytes_of(tensor.dtype, tensor.shape))

    def describe(self, name: str) -> str:
        """That it is a converted weight. Raises WeightNotFoundError."""
        self.info(name)
        return _WHERE

    def read(self, requests: Sequence[ReadRequest]) -> None:
        """Compute each weight that is asked for, one after the other, and copy the bytes.

        Raises:
            WeightNotFoundError: a weight is not in the store.
            StoreReadError: the tensors that it is computed from could not be read, or this store is closed.
        """
        if self._is_closed and requests:
            raise StoreReadError(f"weight {requests[0].name!r} was in a store of a checkpoint that is closed.")
        by_name: dict[str, list[ReadRequest]] = {}
        for request in requests:
            check_request(request, self.info(request.name), _WHERE)
            by_name.setdefault(request.name, []).append(request)
        for name, wanted in by_name.items():
            values = byte_view(contiguous_cpu(self._tensors[name].evaluate(), name))
            for request in wanted:
                stop = request.offset_bytes + len(request.destination)
                request.destination[:] = values[request.offset_bytes : stop]

    def close(self) -> None:
        """Read no more. The files belong to the stores of the tensors. Idempotent."""
        self._is_closed = True
