from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from pylomin.errors import StoreFormatError, StoreReadError, WeightNotFoundError
from pylomin.store.base import InMemoryStore
from pylomin.store.extents import ExtentStore
from pylomin.store.memory import MemoryStore
from pylomin.store.renamed import renamed
from pylomin.store.safetensors import SafetensorsStore
from pylomin.store.torch_zip import TorchZipStore

from .files import read_tensor

TENSORS = {"bert.a": torch.arange(3.0), "bert.b": torch.ones(2), "cls.a": torch.zeros(1)}


def test_nothing_to_do():
    store = MemoryStore(TENSORS)
    assert renamed(store) is store


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"prefix": "bert."}, {"a": "bert.a", "b": "bert.b"}),
        ({"prefix": ""}, {name: name for name in TENSORS}),
        ({"key_map": {"bert.a": "x"}}, {"x": "bert.a", "bert.b": "bert.b", "cls.a": "cls.a"}),
        (
            {"key_map": {"bert.a": "bert.b", "bert.b": "bert.a"}},
            {"bert.b": "bert.a", "bert.a": "bert.b", "cls.a": "cls.a"},
        ),
        ({"key_map": lambda name: "model." + name}, {f"model.{name}": name for name in TENSORS}),
        ({"key_map": lambda name: None if "cls" in name else name[5:]}, {"a": "bert.a", "b": "bert.b"}),
        ({"prefix": "bert.", "key_map": {"a": "c"}}, {"c": "bert.a", "b": "bert.b"}),
    ],
)
def test_names(arguments, expected, tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    for store in (MemoryStore(TENSORS), SafetensorsStore(tmp_path / "x.safetensors")):
        view = renamed(store, **arguments)
        assert set(view) == set(expected)
        for new, old in expected.items():
            assert torch.equal(read_tensor(view, new), TENSORS[old])


def test_extents_stay_visible(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    store = SafetensorsStore(tmp_path / "x.safetensors")
    view = renamed(store, prefix="bert.")
    assert isinstance(view, ExtentStore)
    assert view.location("a") == store.location("bert.a")
    torch.save({"t": torch.ones(2, 3).t()}, tmp_path / "x.pt")
    assert torch.equal(
        read_tensor(renamed(TorchZipStore(tmp_path / "x.pt"), key_map={"t": "u"}), "u"), torch.ones(3, 2)
    )


def test_memory_stays_memory():
    view = renamed(MemoryStore(TENSORS), prefix="bert.")
    assert isinstance(view, InMemoryStore)
    assert view.tensor("a").data_ptr() == TENSORS["bert.a"].data_ptr()
    assert view.describe("a") == "memory, as 'bert.a'"


def test_closing(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    for store in (MemoryStore(TENSORS), SafetensorsStore(tmp_path / "x.safetensors")):
        renamed(store, prefix="bert.").close()
        with pytest.raises(StoreReadError, match="closed"):
            read_tensor(store, "bert.a")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prefix": "bart."}, WeightNotFoundError, r"begins with prefix 'bart\.'; there are 'bert\.a'"),
        (
            {"key_map": {"bert.c": "x"}},
            WeightNotFoundError,
            r"weight 'bert\.c' is not in the store, and key_map renames",
        ),
        ({"key_map": {"bert.a": "bert.b"}}, StoreFormatError, r"'bert\.a' and 'bert\.b' would both be named 'bert\.b'"),
        ({"key_map": lambda name: "x"}, StoreFormatError, "would both be named 'x'"),
        ({"key_map": lambda name: 3}, StoreFormatError, r"key_map gives 3 for weight 'bert\.a'"),
    ],
)
def test_faults(arguments, error, message):
    with pytest.raises(error, match=message):
        renamed(MemoryStore(TENSORS), **arguments)
