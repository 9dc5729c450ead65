"""The contract, for every backend."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file

from pylomin.store.accelerate_folder import AccelerateFolderStore
from pylomin.store.base import InMemoryStore, WeightInfo
from pylomin.store.callable import CallableStore
from pylomin.store.extents import ExtentStore, StoredWeight
from pylomin.store.gguf import GGUFStore
from pylomin.store.memory import MemoryStore
from pylomin.store.npy import NpyStore
from pylomin.store.npz import NpzStore
from pylomin.store.numpy_arrays import MemmapStore
from pylomin.store.renamed import RenamedStore, renamed
from pylomin.store.safetensors import SafetensorsStore
from pylomin.store.scratch import OverlayStore, ScratchDirectory
from pylomin.store.sharded import ShardedStore
from pylomin.store.torch_legacy import TorchLegacyStore
from pylomin.store.torch_zip import TorchZipStore
from pylomin.store.writer import WeightToWrite, write_safetensors

from .contract import StoreContract, sample_tensors
from .files import write_offload_folder, write_shards
from .gguf_files import NUMBERS, gguf_file

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


class TestShardsOfSeveralFormats(StoreContract):
    def make_store(self, tensors: Tensors, directory: Path) -> ShardedStore:
        names = list(tensors)
        shards = {f"model-{i}": {name: tensors[name] for name in names[i::3]} for i in range(3)}
        index = write_shards(directory, shards)
        torch.save(shards["model-1"], directory / "model-1")
        torch.save(shards["model-2"], directory / "model-2", _use_new_zipfile_serialization=False)
        return ShardedStore(index)


class TestTorchZipStore(StoreContract):
    def make_store(self, tensors: Tensors, directory: Path) -> TorchZipStore:
        torch.save(tensors, directory / "model.pt")
        return TorchZipStore(directory / "model.pt")


class TestTorchZipStoreOfViews(StoreContract):
    """No weight with more than one element is a contiguous run of bytes."""

    def make_store(self, tensors: Tensors, directory: Path) -> TorchZipStore:
        torch.save({name: scattered(tensor) for name, tensor in tensors.items()}, directory / "views.pt")
        return TorchZipStore(directory / "views.pt")

    def test_they_are_views(self, store, tensors):
        extents = [name for name in tensors if isinstance(store.weight(name), StoredWeight)]
        assert extents == ["scalar", "empty"]


class TestTorchLegacyStore(StoreContract):
    def make_store(self, tensors: Tensors, directory: Path) -> TorchLegacyStore:
        torch.save(tensors, directory / "model.pt", _use_new_zipfile_serialization=False)
        return TorchLegacyStore(directory / "model.pt")


def scattered(tensor: torch.Tensor) -> torch.Tensor:
    """A view with the same values, in reverse order of dimensions and with a gap after each element."""
    reverse = list(reversed(range(tensor.dim())))
    gaps = torch.stack((tensor, tensor), dim=-1).permute([*reverse, tensor.dim()]).contiguous()
    return gaps[..., 0].permute(reverse)


def as_numpy_has(tensors: Tensors) -> Tensors:
    unknown = {torch.bfloat16, torch.float8_e4m3fn}
    return {name: tensor.float() if tensor.dtype in unknown else tensor for name, tensor in tensors.items()}


def as_gguf_has(tensors: Tensors) -> Tensors:
    known = NUMBERS.keys()
    return {
        name: tensor if tensor.dtype in known else torch.view_as_real(tensor) if tensor.is_complex() else tensor.short()
        for name, tensor in tensors.items()
    }


class NumpyContract(StoreContract):
    @pytest.fixture
    def tensors(self) -> Tensors:
        return as_numpy_has(sample_tensors())


class TestNpzStore(NumpyContract):
    def make_store(self, tensors: Tensors, directory: Path) -> NpzStore:
        numpy.savez(directory / "model.npz", **{name: tensor.numpy() for name, tensor in tensors.items()})
        return NpzStore(directory / "model.npz")


class TestCompressedNpzStore(NumpyContract):
    def make_store(self, tensors: Tensors, directory: Path) -> NpzStore:
        numpy.savez_compressed(directory / "model.npz", **{name: tensor.numpy() for name, tensor in tensors.items()})
        return NpzStore(directory / "model.npz")


class TestNpyStore(NumpyContract):
    def make_store(self, tensors: Tensors, directory: Path) -> NpyStore:
        for name, tensor in tensors.items():
            numpy.save(directory / f"{name}.npy", numpy.array(tensor.numpy(), order="F"))
        return NpyStore(directory)


class TestMemmapStore(NumpyContract):
    def make_store(self, tensors: Tensors, directory: Path) -> MemmapStore:
        arrays = {}
        for name, tensor in tensors.items():
            # numpy maps neither what is empty nor a scalar as such.
            array = numpy.memmap(directory / f"{name}.raw", tensor.numpy().dtype, "w+", shape=(tensor.numel() + 5,))
            array[5:] = tensor.numpy().reshape(-1)
            arrays[name] = array[5:].reshape(tuple(tensor.shape))
        return MemmapStore(arrays)


class TestAccelerateFolderStore(StoreContract):
    @pytest.fixture
    def tensors(self) -> Tensors:
        return {k: t.to(torch.int16) if t.dtype is torch.float8_e4m3fn else t for k, t in sample_tensors().items()}

    def make_store(self, tensors: Tensors, directory: Path) -> AccelerateFolderStore:
        return AccelerateFolderStore(write_offload_folder(directory, tensors))


class TestGGUFStore(StoreContract):
    @pytest.fixture
    def tensors(self) -> Tensors:
        return as_gguf_has(sample_tensors())

    def make_store(self, tensors: Tensors, directory: Path) -> GGUFStore:
        (directory / "model.gguf").write_bytes(gguf_file(tensors))
        return GGUFStore(directory / "model.gguf")


class TestCallableStore(StoreContract):
    def make_store(self, tensors: Tensors, directory: Path) -> CallableStore:
        store = CallableStore(lambda module_name, names: {name: tensors[name] for name in names})
        store.expect({n: WeightInfo(t.dtype, tuple(t.shape), t.nbytes) for n, t in tensors.items()})
        return store


class TestRenamedExtents(StoreContract):
    def make_store(self, tensors: Tensors, directory: Path) -> ExtentStore:
        save_file({f"model.{name}": tensor for name, tensor in tensors.items()}, directory / "model.safetensors")
        store = renamed(SafetensorsStore(directory / "model.safetensors"), prefix="model.")
        assert isinstance(store, ExtentStore)
        return store


class TestRenamedStore(StoreContract):
    def make_store(self, tensors: Tensors, directory: Path) -> RenamedStore:
        functions = TestCallableStore().make_store({f"old.{name}": t for name, t in tensors.items()}, directory)
        store = renamed(functions, key_map=lambda name: name.removeprefix("old."))
        assert type(store) is RenamedStore
        return store


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
