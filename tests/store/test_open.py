from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pylomin.errors import StoreFormatError, StoreReadError
from pylomin.store.memory import MemoryStore
from pylomin.store.open import open_store
from pylomin.store.safetensors import SafetensorsStore
from pylomin.store.scratch import OverlayStore, ScratchDirectory
from pylomin.store.sharded import ShardedStore

from .files import SAMPLE, write_shards

SHARDS = {"model-1.safetensors": {"x": torch.ones(1)}, "model-2.safetensors": SAMPLE}


class TestFiles:
    @pytest.mark.parametrize("kind", [str, Path])
    def test_safetensors(self, tmp_path, kind):
        save_file(SAMPLE, tmp_path / "model.safetensors")
        store = open_store(kind(tmp_path / "model.safetensors"))
        assert type(store) is SafetensorsStore

    def test_index(self, tmp_path):
        assert type(open_store(write_shards(tmp_path, SHARDS))) is ShardedStore

    def test_index_of_another_name(self, tmp_path):
        index = write_shards(tmp_path, SHARDS).rename(tmp_path / "mine.index.json")
        assert type(open_store(index)) is ShardedStore

    def test_index_of_another_format(self, tmp_path):
        index = tmp_path / "pytorch_model.bin.index.json"
        index.write_text('{"weight_map": {"x": "pytorch_model-1.bin"}}')
        with pytest.raises(StoreFormatError, match=r"expected the name of a \.safetensors file"):
            open_store(index)

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.gguf", "model"])
    def test_other_formats(self, tmp_path, name):
        (tmp_path / name).write_bytes(b"data")
        with pytest.raises(StoreFormatError, match=r"is not of a supported format") as caught:
            open_store(tmp_path / name)
        message = str(caught.value)
        assert "*.safetensors" in message
        assert f"save_file(torch.load('{tmp_path / name}', weights_only=True)" in message

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

    def test_without_weights(self, tmp_path):
        (tmp_path / "pytorch_model.bin").touch()
        (tmp_path / "config.json").touch()
        message = r"no weights in a supported format; found: 'config\.json', 'pytorch_model\.bin'"
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

    def test_mapping_of_something_else(self):
        with pytest.raises(StoreFormatError, match="weight 'a' is a int"):
            open_store({"a": 1})

    @pytest.mark.parametrize("kind", ["memory", "overlay"])
    def test_store(self, kind, tmp_path):
        store = MemoryStore({}) if kind == "memory" else OverlayStore(ScratchDirectory(tmp_path))
        assert open_store(store) is store

    @pytest.mark.parametrize("source", [None, 3, b"model.safetensors", [], torch.nn.Linear(1, 1)])
    def test_anything_else(self, source):
        with pytest.raises(StoreFormatError, match=r"cannot open a .* as weights. Supported: "):
            open_store(source)
