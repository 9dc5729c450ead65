"""``ShardedWeightsLoader``: shards as the function that loaders of other libraries take."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from pylomin.errors import PassError
from pylomin.store.base import ReadRequest
from pylomin.store.sharded import WEIGHT_MAP, ShardedStore
from pylomin.store.tensor_bytes import byte_view


class ShardedWeightsLoader:
    """Returns the weights of a module from shards; reads those that it is asked for and no others.

    For :func:`pylomin.load`, which also takes the index file itself, and for other code that wants a function
    ``(module_name, weight_names) -> {name: tensor}``.

    Args:
        index_file_path: JSON with the name of the shard of each weight.
        weights_dir: where the shards are, of any format that :func:`pylomin.open_store` takes.
        weights_mapping_key: where in the JSON the names are.
        device: of the tensors that are returned.
        dtype: of the floating-point tensors that are returned. Default: as stored.

    Raises:
        StoreReadError: the index or a shard is missing or cannot be read.
        StoreFormatError: the index or a shard is malformed, or lies outside of ``weights_dir``.
        PassError: ``dtype`` is no floating-point dtype.
    """

    def __init__(
        self,
        index_file_path: str | os.PathLike[str],
        weights_dir: str | os.PathLike[str],
        weights_mapping_key: str = WEIGHT_MAP,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        if dtype is not None and not dtype.is_floating_point:
            raise PassError(f"dtype is {dtype}; expected a floating-point dtype.")
        self._store = ShardedStore(index_file_path, weights_mapping_key=weights_mapping_key, directory=weights_dir)
        self._device = torch.device(device)
        self._dtype = dtype

    def __call__(self, module_name: str, weight_names: Sequence[str]) -> dict[str, torch.Tensor]:
        """The weights of ``weight_names`` that the index lists; ``module_name`` does not matter."""
        tensors = {name: self._empty(name) for name in weight_names if name in self._store}
        self._store.read([ReadRequest(name, 0, byte_view(tensor)) for name, tensor in tensors.items()])
        return {name: self._converted(tensor) for name, tensor in tensors.items()}

    def close(self) -> None:
        """Close the shards. Idempotent."""
        self._store.close()

    def _empty(self, name: str) -> torch.Tensor:
        info = self._store.info(name)
        return torch.empty(info.shape, dtype=info.dtype, device="cpu")

    def _converted(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device, self._dtype if tensor.is_floating_point() else None)
