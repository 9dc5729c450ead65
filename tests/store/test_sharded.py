from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file

from pylomin.errors import StoreFormatError, StoreReadError
from pylomin.store.base import ReadRequest
from pylomin.store.safetensors import SafetensorsStore
from pylomin.store.sharded import ShardedStore

from .files import SAMPLE, open_descriptors, read_tensor, same_bits, write_shards
from .gguf_files import gguf_file

FIRST = {"x": torch.arange(3.0), "y": torch.arange(5.0)}
SHARDS = {"model-1.safetensors": FIRST, "model-2.safetensors": SAMPLE}


def rewrite(index: Path, weight_map: object) -> Path:
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


def test_one_read_over_several_shards(tmp_path):
    store = ShardedStore(write_shards(tmp_path, SHARDS))
    buffers = {name: bytearray(store.info(name).nbytes) for name in store}
    store.read([ReadRequest(name, 0, memoryview(buffer)) for name, buffer in buffers.items()])
    for name, tensor in (FIRST | SAMPLE).items():
        assert same_bits(torch.frombuffer(buffers[name], dtype=tensor.dtype), tensor.flatten())
        assert same_bits(read_tensor(store, name), tensor)


def test_describe_names_the_shard(tmp_path):
    store = ShardedStore(write_shards(tmp_path, SHARDS))
    assert store.describe("x") == str(tmp_path / "model-1.safetensors")
    assert store.describe("a") == str(tmp_path / "model-2.safetensors")


def test_order_is_by_shard_and_position(tmp_path):
    weight_map = dict.fromkeys(SAMPLE, "model-2.safetensors")
    weight_map |= dict.fromkeys(FIRST, "model-1.safetensors")
    store = ShardedStore(write_shards(tmp_path, SHARDS, weight_map=weight_map))
    first, second = store.shards
    assert list(store) == [*first, *second]


def test_metadata(tmp_path):
    index = write_shards(tmp_path, SHARDS)
    save_file(FIRST, tmp_path / "model-1.safetensors", {"format": "pt"})
    fields = json.loads(index.read_text())
    fields["metadata"] = {"total_size": 5, "note": "text"}
    index.write_text(json.dumps(fields))
    store = ShardedStore(index)
    assert store.metadata == {"note": "text"}
    assert [shard.metadata for shard in store.shards] == [{"format": "pt"}, {}]


def test_index_in_the_current_directory(tmp_path, monkeypatch):
    write_shards(tmp_path, SHARDS)
    monkeypatch.chdir(tmp_path)
    assert len(ShardedStore("model.safetensors.index.json")) == 4


def test_each_shard_is_opened_once(tmp_path, monkeypatch):
    opened = []
    init = SafetensorsStore.__init__

    def recording(self, file):
        opened.append(Path(file.path).name)
        init(self, file)

    monkeypatch.setattr(SafetensorsStore, "__init__", recording)
    weight_map = {
        "x": "model-1.safetensors",
        "y": "./model-1.safetensors",
        "a": "model-2.safetensors",
    }
    before = open_descriptors()
    store = ShardedStore(write_shards(tmp_path, SHARDS, weight_map=weight_map))
    assert sorted(opened) == ["model-1.safetensors", "model-2.safetensors"]
    assert open_descriptors() == before + 2
    assert same_bits(read_tensor(store, "y"), FIRST["y"])
    store.close()


def test_shards_of_several_formats(tmp_path):
    wide = torch.arange(6.0).view(2, 3)
    torch.save({"x": wide.t(), "y": wide}, tmp_path / "one.bin")
    torch.save({"z": wide}, tmp_path / "two.bin", _use_new_zipfile_serialization=False)
    numpy.savez_compressed(tmp_path / "three.npz", u=wide.numpy())
    (tmp_path / "four.gguf").write_bytes(gguf_file({"v": wide}))
    save_file({"w": wide}, tmp_path / "five.safetensors")
    files = {
        "x": "one.bin",
        "y": "one.bin",
        "z": "two.bin",
        "u": "three.npz",
        "v": "four.gguf",
        "w": "five.safetensors",
    }
    store = ShardedStore(rewrite(tmp_path / "mixed.index.json", files))
    assert set(store) == set(files)
    for name in files:
        assert same_bits(read_tensor(store, name), wide.t() if name == "x" else wide)
        assert store.describe(name) == str(tmp_path / files[name])
    assert store.location("y").extent.nbytes == 24
    with pytest.raises(StoreFormatError, match=r"weight 'x' of .*one\.bin' is no contiguous run of bytes"):
        store.location("x")


def test_another_key_and_directory(tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    torch.save(SAMPLE, shards / "part.bin")
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"layout": dict.fromkeys(SAMPLE, "part.bin")}))
    store = ShardedStore(index, weights_mapping_key="layout", directory=shards)
    assert same_bits(read_tensor(store, "a"), SAMPLE["a"])
    with pytest.raises(StoreReadError, match="do not exist"):
        ShardedStore(index, weights_mapping_key="layout")


def test_shards_outside_of_another_directory(tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    torch.save(SAMPLE, tmp_path / "part.bin")
    index = rewrite(tmp_path / "x.index.json", dict.fromkeys(SAMPLE, "part.bin"))
    (shards / "part.bin").symlink_to(tmp_path / "part.bin")
    with pytest.raises(StoreFormatError, match="outside its directory"):
        ShardedStore(index, directory=shards)


def test_weights_that_the_index_does_not_list(tmp_path):
    weight_map = {"x": "model-1.safetensors", "a": "model-2.safetensors"}
    store = ShardedStore(write_shards(tmp_path, SHARDS, weight_map=weight_map))
    assert set(store) == {"x", "a"}
    assert "y" not in store


def test_weight_listed_in_another_shard_than_it_also_is_in(tmp_path):
    """A name in two shards: the index says which one counts."""
    old = {"x": torch.zeros(3), "z": torch.zeros(1)}
    shards = {"model-1.safetensors": FIRST, "model-2.safetensors": old}
    weight_map = {"x": "model-1.safetensors", "z": "model-2.safetensors"}
    store = ShardedStore(write_shards(tmp_path, shards, weight_map=weight_map))
    assert same_bits(read_tensor(store, "x"), FIRST["x"])


class TestMalformedIndex:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "is not valid JSON"),
            ("[]", "expected an object"),
            ("{}", "weight_map None; expected an object"),
            ('{"weight_map": []}', r"weight_map \[\]; expected an object"),
            ('{"weight_map": {"a": 1}}', r"maps weight 'a' to 1; expected the name"),
            ('{"weight_map": {"a": ""}}', r"maps weight 'a' to ''; expected the name"),
            ('{"weight_map": {"a": "\\u0000.safetensors"}}', r"maps weight 'a' to"),
            ('{"weight_map": {"a": "other.index.json"}}', "maps weight 'a' to 'other.index.json'; expected the name"),
            ('{"weights": {}}', "Its keys are 'weights'; name another one with weights_mapping_key="),
            ('{"weight_map": {"a": "f", "a": "g"}}', "key 'a' appears twice"),
            ('{"weight_map": {}, "weight_map": {}}', "key 'weight_map' appears twice"),
            ("[" * 100_000, "nested too deeply"),
        ],
    )
    def test_text(self, tmp_path, text, message):
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(text)
        with pytest.raises(StoreFormatError, match=message) as caught:
            ShardedStore(index)
        assert str(index) in str(caught.value)

    def test_huge(self, tmp_path):
        index = tmp_path / "model.safetensors.index.json"
        with open(index, "wb") as file:
            file.truncate(1 << 40)  # sparse
        with pytest.raises(StoreFormatError, match="expected at most 100000000"):
            ShardedStore(index)

    def test_missing(self, tmp_path):
        with pytest.raises(StoreReadError, match="does not exist"):
            ShardedStore(tmp_path / "model.safetensors.index.json")


class TestShardsThatDoNotFit:
    def test_missing_shards_are_all_named(self, tmp_path):
        weight_map = {"x": "model-1.safetensors", "p": "p.safetensors", "q": "q.safetensors"}
        index = write_shards(tmp_path, SHARDS, weight_map=weight_map)
        message = r"2 of 3 shards that do not exist: .*/p\.safetensors, .*/q\.safetensors\."
        with pytest.raises(StoreReadError, match=message):
            ShardedStore(index)

    def test_missing_weights_are_all_named(self, tmp_path):
        weight_map = dict.fromkeys(["x", "a", "p"], "model-1.safetensors")
        index = write_shards(tmp_path, SHARDS, weight_map=weight_map)
        message = r"2 weights .* not have: 'a' in 'model-1.safetensors', 'p' in 'model-1.safet"
        with pytest.raises(StoreFormatError, match=message):
            ShardedStore(index)

    def test_long_lists_are_cut(self, tmp_path):
        weight_map = {f"w{i}": "model-1.safetensors" for i in range(1000)}
        index = write_shards(tmp_path, SHARDS, weight_map=weight_map)
        with pytest.raises(StoreFormatError, match=r"lists 1000 weights .* and 950 more") as caught:
            ShardedStore(index)
        assert len(str(caught.value)) < 4000

    def test_broken_shard_closes_the_others(self, tmp_path):
        index = write_shards(tmp_path, SHARDS)
        (tmp_path / "model-2.safetensors").write_bytes(b"not a weight file")
        before = open_descriptors()
        with pytest.raises(StoreFormatError, match=r"model-2\.safetensors") as caught:
            ShardedStore(index)
        assert open_descriptors() == before
        assert caught.value is not None


class TestShardsOutsideTheDirectory:
    @pytest.fixture
    def outside(self, tmp_path: Path) -> Path:
        """A valid file that no index in ``tmp_path / "model"`` may reach."""
        (tmp_path / "secret").mkdir()
        (tmp_path / "model").mkdir()
        save_file(FIRST, tmp_path / "secret" / "s.safetensors")
        return tmp_path / "secret" / "s.safetensors"

    def refuse(self, directory: Path, file: str) -> None:
        index = rewrite(directory / "model.safetensors.index.json", {"x": file})
        before = open_descriptors()
        with pytest.raises(StoreFormatError, match=r"points to .*outside its directory"):
            ShardedStore(index)
        assert open_descriptors() == before

    def test_absolute(self, outside, tmp_path):
        self.refuse(tmp_path / "model", str(outside))

    def test_absolute_inside(self, tmp_path):
        save_file(FIRST, tmp_path / "s.safetensors")
        self.refuse(tmp_path, str(tmp_path / "s.safetensors"))

    def test_parent(self, outside, tmp_path):
        self.refuse(tmp_path / "model", "../secret/s.safetensors")

    def test_parent_and_back(self, tmp_path):
        (tmp_path / "model").mkdir()
        save_file(FIRST, tmp_path / "model" / "s.safetensors")
        self.refuse(tmp_path / "model", "../model/s.safetensors")

    def test_link(self, outside, tmp_path):
        (tmp_path / "model" / "s.safetensors").symlink_to(outside)
        self.refuse(tmp_path / "model", "s.safetensors")

    def test_linked_directory(self, outside, tmp_path):
        (tmp_path / "model" / "shards").symlink_to(outside.parent)
        self.refuse(tmp_path / "model", "shards/s.safetensors")

    def test_directory_with_the_same_beginning(self, outside, tmp_path):
        (tmp_path / "model-2").mkdir()
        save_file(FIRST, tmp_path / "model-2" / "s.safetensors")
        (tmp_path / "model" / "s.safetensors").symlink_to(tmp_path / "model-2" / "s.safetensors")
        self.refuse(tmp_path / "model", "s.safetensors")

    def test_link_within(self, tmp_path):
        save_file(FIRST, tmp_path / "s.safetensors")
        (tmp_path / "link.safetensors").symlink_to("s.safetensors")
        index = rewrite(tmp_path / "model.safetensors.index.json", {"x": "link.safetensors"})
        assert same_bits(read_tensor(ShardedStore(index), "x"), FIRST["x"])

    def test_folder_within(self, tmp_path):
        (tmp_path / "shards").mkdir()
        save_file(FIRST, tmp_path / "shards" / "s.safetensors")
        index = rewrite(tmp_path / "model.safetensors.index.json", {"x": "shards/s.safetensors"})
        assert same_bits(read_tensor(ShardedStore(index), "x"), FIRST["x"])


class TestHubCache:
    """``<repo>/snapshots/<revision>/`` holds links into ``<repo>/blobs/``."""

    @pytest.fixture(params=["", "transformer"])
    def snapshot(self, tmp_path: Path, request) -> Path:
        repo = tmp_path / "models--owner--name"
        snapshot = repo / "snapshots" / "0123abcd" / request.param
        blobs = repo / "blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        save_file(FIRST, blobs / "aaaa")
        (blobs / "bbbb").write_text(json.dumps({"weight_map": {"x": "m.safetensors"}}))
        up = "../" * (3 if request.param else 2)
        (snapshot / "m.safetensors").symlink_to(f"{up}blobs/aaaa")
        (snapshot / "m.safetensors.index.json").symlink_to(f"{up}blobs/bbbb")
        return snapshot

    def test_links_into_blobs(self, snapshot):
        store = ShardedStore(snapshot / "m.safetensors.index.json")
        assert same_bits(read_tensor(store, "x"), FIRST["x"])
        assert store.describe("x") == str(snapshot / "m.safetensors")

    def test_links_below_blobs(self, snapshot, tmp_path):
        deeper = tmp_path / "models--owner--name" / "blobs" / "deeper"
        deeper.mkdir()
        save_file(FIRST, deeper / "aaaa")
        self.relink(snapshot, deeper / "aaaa")

    def test_links_elsewhere(self, snapshot, tmp_path):
        save_file(FIRST, tmp_path / "models--owner--name" / "aaaa")
        self.relink(snapshot, tmp_path / "models--owner--name" / "aaaa")

    def test_links_into_blobs_of_another_model(self, snapshot, tmp_path):
        other = tmp_path / "models--other--name" / "blobs"
        other.mkdir(parents=True)
        save_file(FIRST, other / "aaaa")
        self.relink(snapshot, other / "aaaa")

    def test_linked_blobs(self, snapshot, tmp_path):
        blobs = tmp_path / "models--owner--name" / "blobs"
        blobs.rename(tmp_path / "elsewhere")
        blobs.symlink_to(tmp_path / "elsewhere")
        self.relink(snapshot, blobs / "aaaa")

    def test_blobs_of_another_layout(self, tmp_path):
        model, blobs = tmp_path / "model", tmp_path / "blobs"
        model.mkdir()
        blobs.mkdir()
        save_file(FIRST, blobs / "aaaa")
        rewrite(model / "m.safetensors.index.json", {"x": "m.safetensors"})
        (model / "m.safetensors").touch()
        self.relink(model, blobs / "aaaa")

    def test_interrupted_download(self, snapshot, tmp_path):
        (tmp_path / "models--owner--name" / "blobs" / "aaaa").unlink()
        with pytest.raises(StoreReadError, match=r"1 of 1 shards that do not exist: .*m\.safeten"):
            ShardedStore(snapshot / "m.safetensors.index.json")

    def relink(self, snapshot: Path, target: Path) -> None:
        (snapshot / "m.safetensors").unlink()
        (snapshot / "m.safetensors").symlink_to(target)
        with pytest.raises(StoreFormatError, match="outside its directory"):
            ShardedStore(snapshot / "m.safetensors.index.json")
