from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pylomin.errors import StoreFormatError, WeightMismatchError, WeightNotFoundError
from pylomin.store.base import ReadRequest, WeightInfo
from pylomin.store.callable import CallableStore

from .files import read_bytes, read_tensor, same_bits

TENSORS = {
    "a.weight": torch.arange(6.0).view(2, 3),
    "a.bias": torch.ones(2),
    "a.b.weight": torch.arange(4.0),
    "scale": torch.tensor(2.0),
}


class Weights:
    """Returns what it is asked for and ``extra``; keeps the questions."""

    def __init__(self, tensors=TENSORS, extra=()):
        self.tensors, self.extra, self.asked = tensors, extra, []

    def __call__(self, module_name, names):
        self.asked.append((module_name, list(names)))
        return {name: self.tensors[name] for name in {*names, *self.extra} if name in self.tensors}


def store_of(function, tensors=TENSORS, *, cast=False, **arguments):
    store = CallableStore(function, **arguments)
    store.expect({n: WeightInfo(t.dtype, tuple(t.shape), t.nbytes) for n, t in tensors.items()}, cast=cast)
    return store


def read(store, *names):
    buffers = [bytearray(store.info(name).nbytes) for name in names]
    store.read([ReadRequest(name, 0, memoryview(b)) for name, b in zip(names, buffers, strict=True)])


def test_it_is_asked_once_for_each_module():
    weights = Weights()
    store = store_of(weights)
    assert weights.asked == []
    read(store, "a.weight", "scale", "a.bias", "a.b.weight")
    assert weights.asked == [("a", ["a.weight", "a.bias"]), ("", ["scale"]), ("a.b", ["a.b.weight"])]


def test_values_of_any_kind():
    tensors = {
        "a.weight": torch.arange(6.0).view(3, 2).t(),
        "a.bias": torch.nn.Parameter(torch.ones(2)),
        "c": torch.ones(0),
    }
    store = store_of(Weights(tensors), tensors)
    assert all(same_bits(read_tensor(store, name), tensor.detach()) for name, tensor in tensors.items())


def test_rows():
    store = store_of(Weights())
    assert read_bytes(store, "a.weight", 12, 24) == read_bytes(store, "a.weight")[12:]


def test_nothing_is_known_before_it_is_said():
    store = CallableStore(Weights())
    assert list(store) == []
    with pytest.raises(WeightNotFoundError, match=r"weight 'a\.weight' is not in what Weights returns"):
        store.info("a.weight")


# -- more than was asked for ------------------------------------------------------------------------------------------


def test_extras_are_used_once():
    weights = Weights(extra=TENSORS)
    store = store_of(weights)
    read(store, "a.weight")
    for name in ("a.bias", "a.b.weight", "scale"):
        assert same_bits(read_tensor(store, name), TENSORS[name])
    assert len(weights.asked) == 1
    read(store, "a.bias")
    assert weights.asked[1:] == [("a", ["a.bias"])]


def test_extras_of_other_names_are_not_kept():
    other = torch.ones(3)
    kept = weakref.ref(other)
    store = store_of(Weights(TENSORS | {"other": other}, extra=["other"]))
    read(store, "scale")
    del other
    store._function.tensors = TENSORS
    gc.collect()
    assert kept() is None


def test_extras_are_bounded():
    tensors = {str(i): torch.ones(256) for i in range(10)}  # 1 KiB each
    weights = Weights(tensors, extra=tensors)
    store = store_of(weights, tensors, extras_bytes=3000)
    read(store, "0")
    assert sum(t.nbytes for t in store._extras.values()) <= 3000
    assert len(store._extras) == 2
    large = store_of(Weights(tensors, extra=tensors), tensors, extras_bytes=1000)
    read(large, "0")
    assert large._extras == {}


def test_extras_do_not_keep_what_they_are_views_of():
    base = torch.arange(1000.0)
    kept = weakref.ref(base.untyped_storage())
    tensors = {"x": torch.ones(1), "y": base[3:5]}
    weights = Weights(tensors, extra=tensors)
    store = store_of(weights, tensors)
    read(store, "x")
    del base, tensors["y"]
    gc.collect()
    assert kept() is None
    assert read_tensor(store, "y").tolist() == [3, 4]


# -- faults -----------------------------------------------------------------------------------------------------------


def test_missing():
    store = store_of(Weights({"a.weight": TENSORS["a.weight"]}))
    message = r"for module 'a' lacks 'a\.bias'; it has 'a\.weight'\. Return full names"
    with pytest.raises(WeightNotFoundError, match=message):
        read(store, "a.weight", "a.bias")
    with pytest.raises(WeightNotFoundError, match="for module '' lacks 'scale'; it has nothing"):
        read(store, "scale")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            torch.ones(3, 2),
            r"weight 'a\.weight' in .*: found torch\.float32 \[3, 2\], expected torch\.float32 \[2, 3\]",
        ),
        (torch.ones(2, 3).half(), r"found torch\.float16 \[2, 3\], expected torch\.float32 \[2, 3\].*dtype="),
        ([1], r"is a list, not a tensor"),
    ],
)
def test_mismatches(tensor, message):
    store = store_of(Weights(TENSORS | {"a.weight": tensor}))
    with pytest.raises(WeightMismatchError, match=message):
        read(store, "a.weight")
    extra = store_of(Weights(TENSORS | {"a.weight": tensor}, extra=["a.weight"]))
    with pytest.raises(WeightMismatchError, match=message):
        read(extra, "scale")


def test_casts_where_it_may():
    store = store_of(Weights(TENSORS | {"a.bias": torch.ones(2).bfloat16()}), cast=True)
    assert same_bits(read_tensor(store, "a.bias"), torch.ones(2))
    integers = store_of(Weights(TENSORS | {"a.bias": torch.ones(2).int()}), cast=True)
    with pytest.raises(WeightMismatchError):
        read(integers, "a.bias")


def test_what_is_no_mapping():
    store = store_of(lambda module_name, names: [torch.ones(2)])
    with pytest.raises(WeightMismatchError, match="for 'a' is a list, not a mapping"):
        read(store, "a.bias")


def test_a_tensor_without_values():
    store = store_of(Weights(TENSORS | {"scale": torch.tensor(1.0, device="meta")}))
    with pytest.raises(StoreFormatError, match="has no values in memory"):
        read(store, "scale")


def test_its_own_errors_pass():
    def fail(module_name, names):
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        read(store_of(fail), "scale")


def test_one_call_at_a_time():
    busy = threading.Lock()

    def slow(module_name, names):
        assert busy.acquire(blocking=False)
        try:
            return {name: TENSORS[name] for name in names}
        finally:
            busy.release()

    store = store_of(slow)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: read(store, name), list(TENSORS) * 20))
