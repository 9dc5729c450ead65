"""What libraries find that ask a weight for its storage, mostly to see which weights are tied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pylomin.residency.weight import Weight


class OffloadedStorage:
    """Stands for ``torch.UntypedStorage``: an address that only this weight has, and its size.

    Where the values are in memory already, the address is theirs; otherwise it is a number that no storage has.
    Anything but identity and size loads the values.
    """

    __slots__ = ("__weakref__", "_load", "_weight")

    def __init__(self, weight: Weight, load: Callable[[], torch.Tensor]) -> None:
        self._weight = weight
        self._load = load

    def data_ptr(self) -> int:
        storage = self._weight.shared() if self._weight.shared is not None else None
        # User-space addresses are below 2**57; these are above, one for each weight object.
        return storage.data_ptr() if storage is not None else (1 << 62) + id(self._weight)

    def nbytes(self) -> int:
        return self._weight.nbytes

    def size(self) -> int:
        return self._weight.nbytes

    def __len__(self) -> int:
        return self._weight.nbytes

    def _fix_weakref(self) -> None:
        """Torch calls it on a storage that it keeps a weak reference to, as ``torch.export`` does."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._load().untyped_storage(), name)
