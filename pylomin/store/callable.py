"""Weights that a function of the user's returns when it is asked."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch

from pylomin.errors import StoreReadError, WeightMismatchError, WeightNotFoundError
from pylomin.store.base import ReadRequest, WeightInfo
from pylomin.store.dtypes import nbytes_of
from pylomin.store.requests import check_request, weight_not_found
from pylomin.store.tensor_bytes import contiguous_cpu

WeightsFunction = Callable[[str, list[str]], Mapping[str, torch.Tensor]]
_DEFAULT_EXTRAS_BYTES = 1 << 26  # 64 MiB


class CallableStore:
    """A :class:`~pylomin.store.base.WeightStore` over ``function(module_name, weight_names) -> {name: tensor}``.

    The function is asked when weights are needed, once for each module: for the module's name in the model and the
    full names of the weights (``"encoder.0"``, ``["encoder.0.weight", "encoder.0.bias"]``). What it returns beyond
    them is kept until it is needed, up to a limit of memory, oldest out first; then it is used without a call, once.
    A ``memory_budget`` does not count these, nor what the function returns while it is copied.

    The function cannot be asked what there is. So the store has no weights until :meth:`expect` says which;
    :func:`pylomin.load` does that, from the model.

    Args:
        function: called from any thread, but never twice at the same time.
        extras_bytes: most memory for what was returned and not asked for.
    """

    def __init__(self, function: WeightsFunction, *, extras_bytes: int = _DEFAULT_EXTRAS_BYTES) -> None:
        self._function: WeightsFunction | None = function
        self._where = f"what {getattr(function, '__qualname__', type(function).__name__)} returns"
        self._extras_limit = extras_bytes
        self._extras: dict[str, torch.Tensor] = {}  # oldest first
        self._infos: dict[str, WeightInfo] = {}
        self._castable = False
        self._lock = threading.Lock()

    def expect(self, infos: Mapping[str, WeightInfo], *, cast: bool = False) -> None:
        """Say which weights the store has from now on.

        Args:
            infos: full name to dtype and shape.
            cast: True to convert a floating-point tensor of another floating-point dtype; False to raise.
        """
        self._infos = dict(infos)
        self._castable = cast

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def info(self, name: str) -> WeightInfo:
        """What is expected of one weight. Raises WeightNotFoundError."""
        try:
            return self._infos[name]
        except KeyError:
            raise weight_not_found(name, self._infos, self._where) from None

    def describe(self, name: str) -> str:
        """Names the function. Raises WeightNotFoundError."""
        self.info(name)
        return self._where

    def read(self, requests: Sequence[ReadRequest]) -> None:
        """Ask for the weights, and copy their bytes to every destination.

        What the function raises passes through.

        Raises:
            WeightNotFoundError: naming the weights that the function did not return.
            WeightMismatchError: naming a weight that it returned with another dtype or shape.
            StoreReadError: bytes outside a weight were asked for, or the store is closed.
        """
        for request in requests:
            check_request(request, self.info(request.name), self._where)
        tensors = self._get(dict.fromkeys(request.name for request in requests))
        for request in requests:
            nbytes = len(request.destination)
            if nbytes:
                # memoryview's own copy would hold the GIL.
                destination = (ctypes.c_ubyte * nbytes).from_buffer(request.destination)
                ctypes.memmove(destination, tensors[request.name].data_ptr() + request.offset_bytes, nbytes)

    def close(self) -> None:
        """Drop the function and what it returned. Idempotent."""
        self._function = None
        self._extras = {}

    def _get(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        with self._lock:
            function = self._function
            if function is None:
                raise StoreReadError(f"{self._where} is no longer asked: its store is closed.")
            found: dict[str, torch.Tensor] = {}
            asked: dict[str, list[str]] = {}
            for name in names:
                extra = self._extras.pop(name, None)
                if extra is not None:
                    found[name] = extra
                else:
                    asked.setdefault(name.rpartition(".")[0], []).append(name)
            for module_name, wanted in asked.items():
                returned = function(module_name, list(wanted))
                self._check_complete(module_name, wanted, returned)
                for name, tensor in returned.items():
                    if name in wanted:
                        found[name] = self._as_expected(name, tensor)
                    elif name in self._infos:
                        self._keep(name, tensor)
            return found

    def _check_complete(self, module_name: str, wanted: list[str], returned: object) -> None:
        if not isinstance(returned, Mapping):
            raise WeightMismatchError(
                f"{self._where} for {module_name!r} is a {type(returned).__name__}, not a mapping."
            )
        missing = [name for name in wanted if name not in returned]
        if missing:
            raise WeightNotFoundError(
                f"{self._where} for module {module_name!r} lacks {', '.join(map(repr, missing))}; it has "
                f"{', '.join(map(repr, list(returned)[:10])) or 'nothing'}. Return full names: 'encoder.0.weight'."
            )

    def _as_expected(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        info = self._infos[name]
        if not isinstance(tensor, torch.Tensor):
            raise WeightMismatchError(f"weight {name!r} in {self._where} is a {type(tensor).__name__}, not a tensor.")
        castable = self._castable and tensor.is_floating_point() and info.dtype.is_floating_point
        if tuple(tensor.shape) != info.shape or (tensor.dtype != info.dtype and not castable):
            raise WeightMismatchError(
                f"weight {name!r} in {self._where}: found {tensor.dtype} {list(tensor.shape)}, expected {info.dtype} "
                f"{list(info.shape)}. Where only dtypes differ, use pylomin.load(..., dtype=...)."
            )
        return contiguous_cpu(tensor.detach().to(info.dtype), name)

    def _keep(self, name: str, tensor: torch.Tensor) -> None:
        """Keep what was not asked for, within the limit. It is checked now, for it may never be asked for again."""
        if self._infos[name].nbytes > self._extras_limit:
            return
        extra = self._as_expected(name, tensor)
        if extra.untyped_storage().nbytes() > nbytes_of(extra.dtype, extra.shape):
            extra = extra.clone()  # a view would keep all of what it is a view of
        self._extras.pop(name, None)
        self._extras[name] = extra
        while sum(kept.nbytes for kept in self._extras.values()) > self._extras_limit:
            self._extras.pop(next(iter(self._extras)))
