"""The contract, for every backend."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from safetensors.torch import save_file

from pylomin.store.base import InMemoryStore
from pylomin.store.memory import MemoryStore
from pylomin.store.safetensors import SafetensorsStore
from pylomin.store.scratch import OverlayStore, ScratchDirectory
from pylomin.store.sharded import ShardedStore
from pylomin.store.writer import WeightToWrite, write_safetensors

from .contract import StoreContract
from .files import write_shards

Tensors = dict[str, torch.Tensor]


class TestSafetensorsStore(StoreContract):
    def make_store(self, tensors: Tensors, directory: Path) -> SafetensorsStore:
        save_file(tensors, directory / "model.safetensors")
        return SafetensorsStore(directory / "model.safetensors")

    def test_order(self, store):
        extents = [store.location(name).extent for name in store]
        assert all(a.stop == b.start for a, b in itertools.pairwise(extents))


class TestOwnFile(StoreContract):
    """A file that this package wrote; its weights lie in the order given, hence not aligned."""

    def make_store(self, tensors: Tensors, directory: Path) -> SafetensorsStore:
        weights = [
            WeightToWrite(name, tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: tensor)
            for name, tensor in tensors.items()
        ]
        write_safetensors(directory / "own.safetensors", weights, overwrite=True)
        return SafetensorsStore(directory / "own.safetensors")

    def test_order(self, store, tensors):
        assert list(store) == list(tensors)


class TestShardedStore(StoreContract):
    def make_store(self, tensors: Tensors, directory: Path) -> ShardedStore:
        names = list(tensors)
        shards = {f"model-{i + 1}-of-3.safetensors": {name: tensors[name] for name in names[i::3]} for i in range(3)}
        return ShardedStore(write_shards(directory, shards))


class TestMemoryStore(StoreContract):
    def make_store(self, tensors: Tensors, directory: Path) -> MemoryStore:
        return MemoryStore(tensors)

    def test_is_in_memory(self, store, tensors):
        assert isinstance(store, InMemoryStore)
        assert store.tensor("counts").data_ptr() == tensors["counts"].data_ptr()


class TestOverlayStore(StoreContract):
    def make_store(self, tensors: Tensors, directory: Path) -> OverlayStore:
        store = OverlayStore(ScratchDirectory(directory))
        for name, tensor in tensors.items():
            store.write(name, tensor)
        return store

    def test_order(self, store, tensors):
        assert [n for n in store if n != "empty"] == [n for n in tensors if n != "empty"]
