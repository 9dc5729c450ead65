from __future__ import annotations

import json
import os
import zipfile
from functools import partial
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file

from pylomin.errors import StoreFormatError, StoreReadError
from pylomin.save import save_store
from pylomin.store.callable import CallableStore
from pylomin.store.gguf import GGUFStore
from pylomin.store.memory import MemoryStore
from pylomin.store.npz import NpzStore
from pylomin.store.open import open_store
from pylomin.store.safetensors import SafetensorsStore
from pylomin.store.scratch import OverlayStore, ScratchDirectory
from pylomin.store.sharded import ShardedStore
from pylomin.store.torch_legacy import TorchLegacyStore
from pylomin.store.torch_zip import TorchZipStore

from .files import SAMPLE, read_tensor, same_bits, write_shards
from .gguf_files import gguf_file

SHARDS = {"model-1.safetensors": {"x": torch.ones(1)}, "model-2.safetensors": SAMPLE}


def write_npy(path):
    with open(path, "wb") as file:
        numpy.save(file, SAMPLE["b"].numpy())


def write_npz(path):
    with open(path, "wb") as file:
        numpy.savez(file, **{name: tensor.numpy() for name, tensor in SAMPLE.items()})


# By suffix: how to write SAMPLE, and what opens it.
FORMATS = {
    "safetensors": (lambda path: save_file(SAMPLE, path), SafetensorsStore),
    "pt": (lambda path: torch.save(SAMPLE, path), TorchZipStore),
    "pth": (partial(torch.save, SAMPLE, _use_new_zipfile_serialization=False), TorchLegacyStore),
    "gguf": (lambda path: path.write_bytes(gguf_file(SAMPLE)), GGUFStore),
    "npz": (write_npz, NpzStore),
}


class TestFiles:
    @pytest.mark.parametrize("kind", [str, Path])
    def test_safetensors(self, tmp_path, kind):
        save_file(SAMPLE, tmp_path / "model.safetensors")
        store = open_store(kind(tmp_path / "model.safetensors"))
        assert type(store) is SafetensorsStore

    @pytest.mark.parametrize("name", ["model.safetensors", "model"])
    @pytest.mark.parametrize("header_bytes", [0x80, 0x0180])
    def test_length_of_a_header_that_begins_like_a_pickle(self, tmp_path, name, header_bytes):
        header = b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.ljust(header_bytes)
        (tmp_path / name).write_bytes(header_bytes.to_bytes(8, "little") + header + b"\1")
        assert type(open_store(tmp_path / name)) is SafetensorsStore

    def test_index(self, tmp_path):
        assert type(open_store(write_shards(tmp_path, SHARDS))) is ShardedStore

    def test_index_of_another_name(self, tmp_path):
        index = write_shards(tmp_path, SHARDS).rename(tmp_path / "mine.index.json")
        assert type(open_store(index)) is ShardedStore

    @pytest.mark.parametrize("quantize", [None, "int8"])
    @pytest.mark.parametrize("has_index", [True, False])
    def test_a_shard_by_itself(self, tmp_path, quantize, has_index):
        """A file that is named is what is opened, whatever belongs to it."""
        tensors = {f"{i}.weight": torch.randn(64, 64) for i in range(4)}
        index = save_store(tensors, tmp_path / "model.safetensors", quantize=quantize, max_shard_size="16KiB")
        expected = {name: read_tensor(open_store(index), name) for name in tensors}
        shards = sorted(tmp_path.glob("model-0*-of-0*.safetensors"))
        assert len(shards) > 1
        if not has_index:
            index.unlink()
        for shard, other in zip(shards, [*shards[1:], shards[0]], strict=True):
            hidden = other.rename(tmp_path / "elsewhere")
            store = open_store(shard)
            assert list(store)
            for name in store:
                assert same_bits(read_tensor(store, name), expected.pop(name))
                assert store.describe(name).startswith(str(shard))
            hidden.rename(other)
        assert not expected

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.gguf", "model", "model.zip"])
    @pytest.mark.parametrize("content", [b"", b"data", b"version https://git-lfs.github.com/spec/v1"])
    def test_other_formats(self, tmp_path, name, content):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(StoreFormatError, match=r"is not of a supported format: it begins with") as caught:
            open_store(tmp_path / name)
        assert "Supported: *.safetensors, files of torch.save (*.pt," in str(caught.value)

    @pytest.mark.parametrize("kind", FORMATS)
    def test_the_content_counts_and_not_the_name(self, tmp_path, kind):
        write, cls = FORMATS[kind]
        write(tmp_path / "model.safetensors")
        store = open_store(tmp_path / "model.safetensors")
        assert type(store) is cls
        assert all(same_bits(read_tensor(store, name), SAMPLE[name]) for name in store)
        assert len(store) >= 1

    def test_a_zip_file_of_something_else(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "weights.zip", "w") as file:
            file.writestr("model.safetensors", b"")
        with pytest.raises(StoreFormatError, match=r"holds neither .* found: \['model\.safetensors'\]"):
            open_store(tmp_path / "weights.zip")

    @pytest.mark.parametrize("name", ["model.safetensors", "model.bin", "bert-base-uncased"])
    def test_missing(self, tmp_path, name):
        with pytest.raises(StoreReadError, match=rf"'{tmp_path / name}' does not exist"):
            open_store(tmp_path / name)


class TestDirectory:
    def test_with_one_file(self, tmp_path):
        save_file(SAMPLE, tmp_path / "weights.safetensors")
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
        store = open_store(tmp_path)
        assert type(store) is SafetensorsStore
        assert store.describe("a") == str(tmp_path / "weights.safetensors")

    def test_with_an_index(self, tmp_path):
        write_shards(tmp_path, SHARDS)
        assert type(open_store(str(tmp_path))) is ShardedStore

    def test_with_two_indexes(self, tmp_path):
        index = write_shards(tmp_path, SHARDS)
        (tmp_path / "model.fp16.safetensors.index.json").write_text(index.read_text())
        message = r"2 \*\.safetensors\.index\.json files: 'model\.fp16\..*', 'model\.saf.*path of"
        with pytest.raises(StoreFormatError, match=message):
            open_store(tmp_path)

    def test_with_several_files_and_no_index(self, tmp_path):
        write_shards(tmp_path, SHARDS).unlink()
        message = r"2 \*\.safetensors files: 'model-1\.safetensors', 'model-2\.safetensors'"
        with pytest.raises(StoreFormatError, match=message):
            open_store(tmp_path)

    def test_with_what_training_leaves(self, tmp_path):
        for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt"):
            torch.save(SAMPLE, tmp_path / name)
        assert open_store(tmp_path).describe("a") == str(tmp_path / "pytorch_model.bin")

    @pytest.mark.parametrize("kind", FORMATS)
    def test_with_one_file_of_each_format(self, tmp_path, kind):
        write, cls = FORMATS[kind]
        write(tmp_path / f"weights.{kind}")
        assert type(open_store(tmp_path)) is cls

    def test_with_shards_of_torch(self, tmp_path):
        torch.save(SAMPLE, tmp_path / "pytorch_model-00001-of-00001.bin")
        index = {"weight_map": dict.fromkeys(SAMPLE, "pytorch_model-00001-of-00001.bin")}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        store = open_store(tmp_path)
        assert type(store) is ShardedStore
        assert same_bits(read_tensor(store, "a"), SAMPLE["a"])

    def test_with_arrays(self, tmp_path):
        for name, tensor in SAMPLE.items():
            numpy.save(tmp_path / f"{name}.npy", tensor.numpy())
        store = open_store(tmp_path)
        assert set(store) == set(SAMPLE)
        assert same_bits(read_tensor(store, "a"), SAMPLE["a"])

    def test_without_weights(self, tmp_path):
        (tmp_path / "model.onnx").touch()
        (tmp_path / "config.json").touch()
        message = r"no weights in a supported format; found: 'config\.json', 'model\.onnx'"
        with pytest.raises(StoreFormatError, match=message):
            open_store(tmp_path)

    def test_empty(self, tmp_path):
        with pytest.raises(StoreFormatError, match="found: nothing"):
            open_store(tmp_path)

    def test_with_many_other_files(self, tmp_path):
        for i in range(30):
            (tmp_path / f"{i:02}.txt").touch()
        with pytest.raises(StoreFormatError, match=r"'19\.txt' and 10 more"):
            open_store(tmp_path)

    def test_that_cannot_be_listed(self, tmp_path, monkeypatch):
        def refuse(path):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(os, "listdir", refuse)
        with pytest.raises(StoreReadError, match=r"cannot list directory .*Permission denied"):
            open_store(tmp_path)


class TestObjects:
    def test_mapping(self):
        store = open_store(torch.nn.Linear(2, 3).state_dict())
        assert type(store) is MemoryStore
        assert list(store) == ["weight", "bias"]

    def test_arrays_and_tensors(self):
        store = open_store({"a": numpy.arange(3.0), "b": torch.ones(2)})
        assert type(store) is MemoryStore
        assert store.tensor("a").tolist() == [0, 1, 2]

    def test_function(self):
        assert type(open_store(lambda module_name, names: {})) is CallableStore

    def test_mapping_of_something_else(self):
        with pytest.raises(StoreFormatError, match="weight 'a' is a int"):
            open_store({"a": 1})

    @pytest.mark.parametrize("kind", ["memory", "overlay"])
    def test_store(self, kind, tmp_path):
        store = MemoryStore({}) if kind == "memory" else OverlayStore(ScratchDirectory(tmp_path))
        assert open_store(store) is store

    @pytest.mark.parametrize("source", [None, 3, b"model.safetensors", [], torch.nn.Linear(1, 1), torch.nn.Linear])
    def test_anything_else(self, source):
        with pytest.raises(StoreFormatError, match=r"cannot open a .* as weights. Supported: "):
            open_store(source)
