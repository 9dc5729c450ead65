from __future__ import annotations

import warnings

import pytest
import torch

from pylomin.errors import StoreFormatError, StoreReadError
from pylomin.store.memory import MemoryStore

from .files import read_bytes, read_tensor, same_bits


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).view(3, 4).t(),
        torch.arange(12.0)[::3],
        torch.arange(12.0).view(3, 4)[:, 1:3],
        torch.tensor(2.0).expand(3, 2),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.randn(4, dtype=torch.complex64).conj(),
        torch.randn(4, dtype=torch.complex64).conj().imag,  # a negated view
        torch.arange(12.0)[4:],
    ],
)
def test_bytes_are_row_major(tensor):
    store = MemoryStore({"w": tensor})
    expected = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
    assert same_bits(read_tensor(store, "w"), expected)
    assert same_bits(store.tensor("w"), expected)


def test_contiguous_tensors_are_not_copied():
    tensor = torch.arange(10.0)
    store = MemoryStore({"w": tensor, "part": tensor[2:5]})
    assert store.tensor("w").data_ptr() == tensor.data_ptr()
    assert store.tensor("part").data_ptr() == tensor[2:].data_ptr()


def test_one_tensor_under_two_names():
    tensor = torch.arange(12.0).view(3, 4).t()
    store = MemoryStore({"a": tensor, "b": tensor})
    assert store.tensor("a") is store.tensor("b")


def test_parameters_lose_their_gradient():
    store = MemoryStore(torch.nn.Linear(2, 3).state_dict(keep_vars=True))
    assert not store.tensor("weight").requires_grad


def test_any_dtype():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # complex32 is called experimental
        tensors = {"a": torch.ones(2, dtype=torch.complex128), "b": torch.ones(2).to(torch.chalf)}
        store = MemoryStore(tensors)
    assert all(same_bits(read_tensor(store, name), tensors[name]) for name in tensors)


def test_order_is_that_of_the_mapping():
    assert list(MemoryStore({"b": torch.ones(1), "a": torch.ones(1)})) == ["b", "a"]


def test_describe():
    assert MemoryStore({"a": torch.ones(1)}).describe("a") == "memory"


@pytest.mark.parametrize("value", [None, 3.0, [1.0], "text"])
def test_not_a_tensor(value):
    with pytest.raises(StoreFormatError, match=r"weight 'a' is a .*; expected a torch\.Tensor"):
        MemoryStore({"a": value})


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.empty(3, device="meta"), r"weight 'a' \(Tensor on device meta\) has no values"),
        (torch.eye(3).to_sparse(), r"weight 'a' is of layout torch\.sparse_coo"),
    ],
)
def test_without_dense_values(tensor, message):
    with pytest.raises(StoreFormatError, match=message):
        MemoryStore({"a": tensor})


def test_quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls quantized tensors deprecated
        tensor = torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8)
        with pytest.raises(StoreFormatError, match=r"weight 'a' is quantized.*dequantize\(\)"):
            MemoryStore({"a": tensor})


def test_wrapper_without_storage():
    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls):
            return torch.Tensor._make_wrapper_subclass(cls, (2, 2))

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            return args[0]

    with pytest.raises(StoreFormatError, match=r"weight 'a' \(Wrapper on device cpu\) has no val"):
        MemoryStore({"a": Wrapper()})


def test_tensor_after_close():
    store = MemoryStore({"a": torch.ones(1)})
    store.close()
    with pytest.raises(StoreReadError, match="weight 'a' was in a memory store that is closed"):
        store.tensor("a")
    with pytest.raises(StoreReadError, match="closed"):
        read_bytes(store, "a")
