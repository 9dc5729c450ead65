from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pylomin.errors import StoreChangedError, StoreFormatError, StoreReadError
from pylomin.io.files import WeightFile
from pylomin.store.base import ReadRequest
from pylomin.store.dtypes import STORED_DTYPES
from pylomin.store.safetensors import SafetensorsStore

from .files import (
    SAMPLE,
    entry,
    open_descriptors,
    raw_file,
    read_bytes,
    read_tensor,
    same_bits,
    touch_later,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(SAMPLE, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path / "model.safetensors"


@pytest.fixture
def reads(monkeypatch) -> list[tuple[int, list[int]]]:
    """Every read of a weight file: its offset and the sizes of its buffers."""
    calls = []
    read = WeightFile.read

    def recording(self, offset_bytes, buffers):
        calls.append((offset_bytes, [len(buffer) for buffer in buffers]))
        read(self, offset_bytes, buffers)

    monkeypatch.setattr(WeightFile, "read", recording)
    return calls


def test_metadata(path, tmp_path):
    assert SafetensorsStore(path).metadata == {"format": "pt"}
    save_file({}, tmp_path / "empty.safetensors")
    store = SafetensorsStore(tmp_path / "empty.safetensors")
    assert (store.metadata, list(store)) == ({}, [])


def test_describe(path):
    store = SafetensorsStore(path)
    assert store.describe("a") == str(path)
    assert store.path == str(path)


@pytest.mark.parametrize("dtype", STORED_DTYPES, ids=str)
def test_every_dtype_as_the_library_writes_it(tmp_path, dtype):
    tensor = torch.arange(64, dtype=torch.uint8).view(2, 32).view(dtype)
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    assert same_bits(read_tensor(SafetensorsStore(tmp_path / "model.safetensors"), "w"), tensor)


class TestCoalescing:
    def store(self, tmp_path: Path, sizes: dict[str, int]) -> SafetensorsStore:
        path = tmp_path / "model.safetensors"
        header, offset = {}, 0
        for name, size in sizes.items():
            header[name] = entry(shape=[size], offsets=[offset, offset + size])
            offset += size
        path.write_bytes(raw_file(header, os.urandom(offset)))
        return SafetensorsStore(path)

    def read(self, store: SafetensorsStore, names: list[str]) -> None:
        buffers = [bytearray(store.info(name).nbytes) for name in names]
        store.read([ReadRequest(name, 0, memoryview(b)) for name, b in zip(names, buffers, strict=True)])
        raw = Path(store.path).read_bytes()
        for name, buffer in zip(names, buffers, strict=True):
            extent = store.location(name).extent
            assert buffer == raw[extent.start : extent.stop]

    def test_adjacent_weights_are_one_read(self, tmp_path, reads):
        store = self.store(tmp_path, {"a": 10, "b": 20, "c": 30})
        reads.clear()
        self.read(store, ["c", "a", "b"])
        assert reads == [(store.location("a").extent.start, [10, 20, 30])]

    def test_small_gap_is_read_over(self, tmp_path, reads):
        store = self.store(tmp_path, {"a": 10, "gap": 1 << 16, "b": 20})
        reads.clear()
        self.read(store, ["a", "b"])
        assert reads == [(store.location("a").extent.start, [10, 1 << 16, 20])]

    def test_large_gap_is_not(self, tmp_path, reads):
        store = self.store(tmp_path, {"a": 10, "gap": (1 << 16) + 1, "b": 20})
        reads.clear()
        self.read(store, ["b", "a"])
        assert [sizes for _, sizes in reads] == [[10], [20]]


class TestErrors:
    def test_missing(self, tmp_path):
        with pytest.raises(StoreReadError, match="does not exist"):
            SafetensorsStore(tmp_path / "absent.safetensors")

    def test_not_safetensors(self, tmp_path):
        torch.save(SAMPLE, tmp_path / "model.safetensors")
        with pytest.raises(StoreFormatError, match="is not a safetensors file, or is truncated"):
            SafetensorsStore(tmp_path / "model.safetensors")

    def test_empty_file(self, tmp_path):
        (tmp_path / "model.safetensors").touch()
        with pytest.raises(StoreFormatError, match="holds 0 bytes"):
            SafetensorsStore(tmp_path / "model.safetensors")

    def test_incomplete_download(self, path):
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(StoreFormatError, match=r"weight 'a' .*it ends at byte .*truncated"):
            SafetensorsStore(path)

    def test_failing_open_keeps_no_descriptor(self, tmp_path):
        (tmp_path / "model.safetensors").write_bytes(raw_file({"a": {}}))
        before = open_descriptors()
        for _ in range(5):
            with pytest.raises(StoreFormatError) as caught:
                SafetensorsStore(tmp_path / "model.safetensors")
            assert open_descriptors() == before
            assert caught.value is not None

    def test_read_errors_name_the_weights(self, path):
        store = SafetensorsStore(path)
        os.truncate(path, 100)
        with pytest.raises(StoreChangedError, match=rf"weight 'a': weight file '{path}' was chang"):
            read_bytes(store, "a")
        buffers = [bytearray(store.info(name).nbytes) for name in ("a", "b")]
        with pytest.raises(StoreChangedError, match=r"could not read weight 'b', 'a': "):
            store.read([ReadRequest(name, 0, memoryview(b)) for name, b in zip(("a", "b"), buffers, strict=True)])


class TestChangedFile:
    def test_mended(self, path):
        store = SafetensorsStore(path)
        raw = path.read_bytes()
        os.truncate(path, 100)
        with pytest.raises(StoreChangedError):
            read_bytes(store, "a")
        path.write_bytes(raw)
        touch_later(path)
        assert same_bits(read_tensor(store, "a"), SAMPLE["a"])

    def test_new_values_in_place(self, path):
        store = SafetensorsStore(path)
        values = {name: tensor + 1 for name, tensor in SAMPLE.items()}
        save_file(values, path.with_suffix(".new"), {"format": "pt"})
        path.write_bytes(path.with_suffix(".new").read_bytes())
        touch_later(path)
        with pytest.raises(StoreChangedError, match="the next read accepts the new content"):
            read_bytes(store, "a")
        assert same_bits(read_tensor(store, "a"), values["a"])

    def test_other_header_of_the_same_size(self, path):
        store = SafetensorsStore(path)
        path.write_bytes(path.read_bytes().replace(b'"a"', b'"c"'))
        touch_later(path)
        for _ in range(3):
            with pytest.raises(StoreChangedError, match="open it again"):
                read_bytes(store, "a")

    def test_replaced_by_rename(self, path):
        store = SafetensorsStore(path)
        save_file({"a": torch.zeros(1)}, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)
        assert same_bits(read_tensor(store, "a"), SAMPLE["a"])

    def test_deleted(self, path):
        store = SafetensorsStore(path)
        path.unlink()
        assert same_bits(read_tensor(store, "a"), SAMPLE["a"])
