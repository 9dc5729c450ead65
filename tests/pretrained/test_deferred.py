"""Tensors that have not been read: what torch makes of them is what it makes of the values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pylomin.errors import StoreReadError, WeightNotFoundError
from pylomin.pretrained.computed import ComputedStore
from pylomin.pretrained.deferred import Computed, DeferredTensor, Stored
from pylomin.store.base import ReadRequest
from pylomin.store.memory import MemoryStore
from pylomin.store.virtual import VirtualStore
from tests.store.contract import StoreContract

aten = torch.ops.aten


class Watched(MemoryStore):
    """Remembers how many bytes were read."""

    nbytes = 0

    def read(self, requests: Sequence[ReadRequest]) -> None:
        self.nbytes += sum(len(request.destination) for request in requests)
        super().read(requests)


def deferred(*tensors: Tensor) -> tuple[Watched, list[DeferredTensor]]:
    store = Watched({str(index): tensor for index, tensor in enumerate(tensors)})
    return store, [DeferredTensor.of(store, name) for name in store]


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def steps_of(tensor: Tensor) -> list[int]:
    """Strides of the dimensions that have a next element; torch is not of one mind about the others."""
    sizes = zip(tensor.size(), tensor.stride(), strict=True)
    return [step for size, step in sizes if size > 1] if tensor.numel() else []


def assert_equal(actual: Any, expected: Tensor) -> None:
    assert type(actual) is DeferredTensor
    assert (actual.shape, steps_of(actual), actual.dtype) == (expected.shape, steps_of(expected), expected.dtype)
    values = actual.evaluate()
    assert type(values) is Tensor
    assert (values.shape, values.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(bits(values), bits(expected))


IN_PLACE: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("whole", lambda t: t[...]),
    ("view", lambda t: t.view(2, -1)),
    ("reshape", lambda t: t.reshape(-1).unsqueeze(0).squeeze(0)),
    ("rows", lambda t: t[1:3]),
    ("row", lambda t: t[2]),
    ("chunk", lambda t: torch.chunk(t, 3)[1].contiguous()),
    ("split", lambda t: torch.split(t, [1, 3, 2])[2]),
    ("unbind", lambda t: t.view(3, 2, 4).unbind()[1]),
    ("rows of a row", lambda t: t.view(3, 2, 4)[1][1:]),
    ("cast", lambda t: t.to(torch.bfloat16)[1:]),
    ("cast of a view", lambda t: t[1:].to(dtype=torch.bfloat16, device="cpu").clone()),
    ("stack", lambda t: torch.stack([t, t])),
    ("concatenation", lambda t: torch.cat([t[:2], t[3:]])),
    ("columns", lambda t: torch.cat([t, t[:, :].to(t.dtype)], dim=-1)),
    ("cast concatenation", lambda t: torch.cat([t.to(torch.float16), t.to(torch.float16)], 1)),
    ("stack of stacks", lambda t: torch.cat([torch.stack([t, t]), torch.stack([t, t])], dim=1)),
]
COMPUTED: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("transposed", lambda t: t.t()),
    ("transposed and copied", lambda t: t.t().contiguous()),
    ("permuted", lambda t: t.view(3, 2, 4).transpose(0, 1).reshape(6, 4)),
    ("cast twice", lambda t: t.to(torch.float16).to(torch.float32)),
    ("cast to integers", lambda t: t.to(torch.int32)),
    ("scaled", lambda t: t * 2 + 1),
    ("concatenation of two dtypes", lambda t: torch.cat([t, t.to(torch.float64)])),
    ("concatenation of a cast", lambda t: torch.cat([t.to(torch.float64), (t * 1).to(torch.float64)])),
    ("with a tensor in memory", lambda t: torch.cat([t, torch.ones(1, 4)])),
    ("bits", lambda t: t.view(torch.int32)),
    ("second output", lambda t: torch.sort(t, dim=1)[0]),
    ("stretched", lambda t: t[:, None].expand(6, 2, 4)),
]


@pytest.mark.parametrize(("name", "function"), IN_PLACE, ids=[name for name, _ in IN_PLACE])
def test_stays_bytes_of_a_store(name: str, function: Callable[[Tensor], Tensor]) -> None:
    assert bytes_read_of(function) == function(torch.empty(6, 4)).numel() * 4


def bytes_read_of(function: Callable[[Tensor], Tensor]) -> int:
    """For the result, which stays bytes of a store until then."""
    values = torch.randn(6, 4)
    store, (tensor,) = deferred(values)
    result = function(tensor)
    assert store.nbytes == 0
    assert isinstance(result, DeferredTensor)
    assert isinstance(result.origin, Stored)
    assert_equal(result, function(values))
    return store.nbytes


def columns_of_a_chunk(t: Tensor) -> Tensor:
    return torch.chunk(t, 2, dim=1)[1].contiguous()


def test_columns_stay_bytes_of_a_store() -> None:
    """What lies between them may be read, too."""
    assert 6 * 2 * 4 <= bytes_read_of(columns_of_a_chunk) <= 6 * 4 * 4


@pytest.mark.parametrize(("name", "function"), COMPUTED, ids=[name for name, _ in COMPUTED])
def test_is_computed_when_it_is_read(name: str, function: Callable[[Tensor], Tensor]) -> None:
    values = torch.randn(6, 4)
    store, (tensor,) = deferred(values)
    result = function(tensor)
    assert store.nbytes == 0
    assert isinstance(result, DeferredTensor)
    assert isinstance(result.origin, Computed)
    assert_equal(result, function(values))


STEPS = [*(function for _, function in IN_PLACE + COMPUTED), columns_of_a_chunk]


@given(st.lists(st.sampled_from(STEPS), max_size=5), st.booleans())
@example([lambda t: t[:0], lambda t: t[1:]], False)
@example([lambda t: t[6:], lambda t: t.view(2, 0)], False)
@settings(max_examples=150, deadline=None)
def test_any_chain(steps: list[Callable[[Tensor], Tensor]], inference: bool) -> None:
    expected = torch.arange(24.0).view(6, 4) / 7
    store, (actual,) = deferred(expected)
    with torch.inference_mode(inference):
        for step in steps:
            try:
                following = step(expected)
            except (RuntimeError, ValueError, IndexError):
                break
            expected, actual = following, step(actual)  # type: ignore[assignment]
        assert store.nbytes == 0
        assert_equal(actual[...], expected[...])


def test_what_needs_values_reads_them() -> None:
    values = torch.randn(6, 4)
    store, (tensor, same, other) = deferred(values, values.clone(), values + 1)
    assert torch.equal(tensor, same)
    assert not torch.equal(tensor, other)
    assert store.nbytes == 4 * values.nbytes
    assert tensor.sum().item() == values.sum().item()
    assert tensor.is_floating_point()
    assert "DeferredTensor(size=(6, 4)" in repr(tensor)


def test_factories_and_random_numbers_are_made_once() -> None:
    store, (tensor,) = deferred(torch.randn(6, 4))
    for made in (torch.zeros_like(tensor), tensor.new_ones(3), torch.rand_like(tensor), torch.empty_like(tensor)):
        assert type(made) is Tensor
        assert made.device.type == "cpu"
    assert store.nbytes == 0
    drawn = torch.bernoulli(tensor * 0 + 0.5)
    assert type(drawn) is Tensor
    assert torch.equal(drawn, drawn.clone())


def test_parameters() -> None:
    values = torch.randn(6, 4)
    _, (tensor,) = deferred(values)
    module = nn.Linear(4, 6, bias=False)
    module.weight = nn.Parameter(tensor)
    assert isinstance(module.weight, nn.Parameter)
    assert module.weight.requires_grad
    assert module.get_parameter("weight") is module.weight
    assert_equal(module.weight.detach(), values)


def test_writes_reach_the_tensor_and_its_views() -> None:
    values = torch.randn(6, 4)
    store, (tensor,) = deferred(values)
    row, column, half = tensor[2], tensor[:, 1], tensor[3:].view(2, 6)[1]
    parameter = nn.Parameter(tensor)
    with torch.no_grad():
        assert parameter[2].zero_() is not None
        half.fill_(5)
        column.add_(1)
    values[2] = 0
    values[3:].view(2, 6)[1] = 5
    values[:, 1] += 1
    for actual, expected in ((tensor, values), (parameter, values), (row, values[2]), (column, values[:, 1])):
        assert torch.equal(actual.evaluate(), expected)
    assert torch.equal(tensor * 2, values * 2)
    assert store.nbytes == values.nbytes, "it is read once and then stays"


def test_a_write_to_what_is_computed_stays_there() -> None:
    values = torch.randn(6, 4)
    _, (tensor,) = deferred(values)
    product = tensor * 2
    product.zero_()
    assert torch.equal(product, torch.zeros(6, 4))
    assert torch.equal(tensor.evaluate(), values)


def test_joining_names_its_parts() -> None:
    _, tensors = deferred(torch.ones(2), torch.ones(2), torch.ones(2))
    joined = torch.stack(tensors)  # type: ignore[arg-type]
    assert isinstance(joined, DeferredTensor)
    assert isinstance(joined.origin, Stored)
    assert isinstance(joined.origin.part.store, VirtualStore)
    assert joined.origin.part.name == "0 and 2 more"


class TestComputedStore(StoreContract):
    def make_store(self, tensors: dict[str, Tensor], directory: Path) -> ComputedStore:
        base = MemoryStore(tensors)
        copies = {
            name: DeferredTensor(Computed(aten.clone.default, (DeferredTensor.of(base, name),), {}, 0), tensor)
            for name, tensor in tensors.items()
        }
        return ComputedStore(copies)

    def test_one_computation_serves_all_requests_of_a_call(self) -> None:
        base, (tensor,) = deferred(torch.arange(6.0))
        store = ComputedStore({"w": tensor * 2})  # type: ignore[dict-item]
        first, last = bytearray(4), bytearray(4)
        store.read([ReadRequest("w", 20, memoryview(last)), ReadRequest("w", 0, memoryview(first))])
        assert torch.frombuffer(first + last, dtype=torch.float32).tolist() == [0, 10]
        assert base.nbytes == 24

    def test_errors_pass(self) -> None:
        base, (tensor,) = deferred(torch.arange(6.0))
        store = ComputedStore({"w": tensor * 2})  # type: ignore[dict-item]
        with pytest.raises(WeightNotFoundError):
            store.info("v")
        base.close()
        with pytest.raises(StoreReadError, match="memory store that is closed"):
            store.read([ReadRequest("w", 0, memoryview(bytearray(4)))])
