from __future__ import annotations

import gc

import pytest
import torch

from pylomin.residency.residency import Residency
from pylomin.residency.weight import Layout, ResidentParameter, Source, Weight, contiguous_stride, dense_layout
from pylomin.store.memory import MemoryStore

from .common import CPU, layout


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (4, 1, 5), (0, 3), (2, 0, 3), (1, 1)])
def test_contiguous_stride_is_torchs(shape: tuple[int, ...]) -> None:
    assert contiguous_stride(shape) == torch.empty(shape).stride()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4),
        torch.randn(3, 4).t(),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(2, 3, 4).permute(2, 0, 1),
        torch.randn(6, 6)[::2, ::3],
        torch.randn(3, 1).expand(3, 5),
        torch.tensor(1.0),
        torch.randn(0, 3),
    ],
    ids=["contiguous", "transposed", "channels last", "permuted", "sliced", "expanded", "scalar", "empty"],
)
def test_dense_layout_is_that_of_a_copy(tensor: torch.Tensor) -> None:
    expected = torch.empty_like(tensor)
    found = dense_layout(tensor)
    assert (found.shape, found.stride) == (tuple(expected.shape), expected.stride())
    copy = found.empty().copy_(tensor)
    assert torch.equal(copy, tensor)
    assert copy.untyped_storage().nbytes() == found.nbytes


def test_layout() -> None:
    plain = layout(torch.float16, 2, 3)
    assert (plain.numel, plain.nbytes, plain.is_contiguous) == (6, 12, True)
    assert not Layout(torch.float16, (2, 3), (1, 2), CPU).is_contiguous
    assert layout(torch.float32).numel == 1


def test_conversions() -> None:
    residency = Residency()
    source = Source(MemoryStore({"a": torch.ones(10)}), "a", layout(torch.float32, 10))
    weight = Weight("a", source, residency)
    assert weight.layout == source.layout
    assert (weight.nbytes, weight.peak_load_bytes) == (40, 40)
    assert weight.convert(weight.layout).layout == weight.layout
    half = weight.convert(layout(torch.float16, 10))
    assert (half.nbytes, half.peak_load_bytes) == (20, 60)
    assert half.source is source
    double = half.convert(layout(torch.float64, 10))
    assert double.conversions == (layout(torch.float16, 10), layout(torch.float64, 10))
    assert double.peak_load_bytes == 100
    assert half.index != weight.index


def test_keeps_order() -> None:
    residency = Residency()
    source = Source(MemoryStore({"a": torch.ones(2, 3)}), "a", layout(torch.float32, 2, 3))
    assert Weight("a", source, residency).keeps_order
    assert Weight("a", source, residency, (layout(torch.float16, 2, 3),)).keeps_order
    assert not Weight("a", source, residency, (Layout(torch.float16, (2, 3), (1, 2), CPU),)).keeps_order


def test_a_source_says_when_nobody_uses_it() -> None:
    unused: list[bool] = []
    source = Source(MemoryStore({}), "a", layout(torch.float32), on_unused=lambda: unused.append(True))
    weight = Weight("a", source, Residency())
    del source
    assert unused == []
    del weight
    gc.collect()
    assert unused == [True]


def test_writes_through_data_are_noticed() -> None:
    parameter = ResidentParameter(torch.zeros(3), requires_grad=False)
    version = parameter._version
    parameter.data.fill_(1)
    assert parameter._version > version
    version = parameter._version
    parameter.data = torch.full((3,), 2.0)
    assert parameter._version > version
    assert parameter.tolist() == [2.0, 2.0, 2.0]
