from __future__ import annotations

import json

import pytest
import torch

import pylomin
from pylomin.errors import PassError, StoreFormatError, StoreReadError
from pylomin.io.files import WeightFile
from pylomin.store.sharded_loader import ShardedWeightsLoader

STATE = {
    "a.weight": torch.arange(6.0).view(2, 3),
    "a.bias": torch.ones(2),
    "b.weight": torch.ones(3, 2),
    "n": torch.tensor(3),
}


@pytest.fixture
def index(tmp_path):
    directory = tmp_path / "shards"
    directory.mkdir()
    files = {name: f"part-{number % 2}.bin" for number, name in enumerate(STATE)}
    for file in set(files.values()):
        torch.save({name: tensor for name, tensor in STATE.items() if files[name] == file}, directory / file)
    (tmp_path / "index.json").write_text(json.dumps({"layout": files, "weight_map": files}))
    return tmp_path / "index.json"


def test_what_is_asked_for(index):
    loader = ShardedWeightsLoader(index, index.parent / "shards", "layout", torch.device("cpu"))
    found = loader("a", ["a.bias", "a.weight", "a.absent"])
    assert found.keys() == {"a.bias", "a.weight"}
    assert all(torch.equal(tensor, STATE[name]) for name, tensor in found.items())


def test_nothing_else_is_read(index, monkeypatch):
    loader = ShardedWeightsLoader(index, index.parent / "shards")
    read, counted = WeightFile.read, []
    monkeypatch.setattr(
        WeightFile, "read", lambda self, start, to: (counted.append(sum(map(len, to))), read(self, start, to))[1]
    )
    loader("a", ["a.weight"])
    assert counted == [24]


def test_dtype(index):
    loader = ShardedWeightsLoader(index, index.parent / "shards", dtype=torch.bfloat16)
    assert {name: tensor.dtype for name, tensor in loader("", ["a.bias", "n"]).items()} == {
        "a.bias": torch.bfloat16,
        "n": torch.int64,
    }
    with pytest.raises(PassError, match=r"dtype is torch\.int8"):
        ShardedWeightsLoader(index, index.parent / "shards", dtype=torch.int8)


def test_closing(index):
    loader = ShardedWeightsLoader(index, index.parent / "shards")
    loader.close()
    with pytest.raises(StoreReadError, match="closed"):
        loader("a", ["a.bias"])


def test_shards_elsewhere(index):
    with pytest.raises(StoreReadError, match="do not exist"):
        ShardedWeightsLoader(index, index.parent)
    (index.parent / "other").mkdir()
    (index.parent / "other" / "part-0.bin").symlink_to(index.parent / "shards" / "part-0.bin")
    with pytest.raises(StoreFormatError, match="outside its directory"):
        ShardedWeightsLoader(index, index.parent / "other")


def test_as_the_function_of_load(index):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(3, 2), torch.nn.Linear(2, 3, bias=False)
            self.register_buffer("n", torch.tensor(0))

        def forward(self, x):
            return self.b(self.a(x)) * self.n

    expected = Model()
    expected.load_state_dict(STATE)
    x = torch.randn(4, 3)
    model = pylomin.load(Model, ShardedWeightsLoader(index, index.parent / "shards"))
    assert torch.equal(model(x), expected(x))
