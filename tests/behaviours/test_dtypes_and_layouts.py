"""Parameters of every dtype, shape and memory layout; those that cannot be offloaded are refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pylomin

from .common import assert_same, assert_same_parameters, check, compare, twins, values

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
COMPLEX = [torch.complex64, torch.complex128]
INTEGERS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
SMALL_FLOATS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
WIDE_UNSIGNED = [torch.uint16, torch.uint32, torch.uint64]


class Holder(nn.Module):
    """One parameter, which the forward casts and adds."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(torch.float64) if not self.weight.is_complex() else self.weight
        return x + weight


@pytest.mark.parametrize("dtype", [*FLOATS, *COMPLEX], ids=str)
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
def test_linear_of_dtype(dtype: torch.dtype) -> None:
    check(nn.Linear(4, 3).to(dtype), torch.randn(2, 4).to(dtype))


@pytest.mark.parametrize("dtype", [*FLOATS, *COMPLEX, *INTEGERS, *SMALL_FLOATS], ids=str)
def test_parameter_of_dtype(dtype: torch.dtype) -> None:
    lazy = check(Holder(torch.randint(0, 2, (3, 4)).to(dtype)), torch.randn(3, 4, dtype=torch.float64))
    assert lazy.weight.dtype == dtype


@pytest.mark.parametrize("dtype", WIDE_UNSIGNED, ids=str)
def test_parameter_of_wide_unsigned_dtype(dtype: torch.dtype) -> None:
    check(Holder(torch.arange(12).reshape(3, 4).to(dtype)), torch.randn(3, 4, dtype=torch.float64))


def test_float8_scaled_linear() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4).to(torch.float8_e4m3fn), requires_grad=False)
            self.scale = nn.Parameter(torch.rand(()))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)

    check(Scaled(), torch.randn(2, 4))


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 3)], ids=str)
def test_zero_size_parameter(shape: tuple[int, ...]) -> None:
    check(Holder(torch.empty(shape)), torch.randn(shape, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_linear_without_outputs_or_inputs() -> None:
    check(nn.Linear(4, 0), torch.randn(2, 4))
    check(nn.Linear(0, 3, bias=False), torch.randn(2, 0))


def test_scalar_parameter() -> None:
    lazy = check(Holder(torch.tensor(3.5)), torch.randn(2, dtype=torch.float64))
    assert lazy.weight.item() == 3.5
    assert lazy.weight.dim() == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(4, 3).t(),
        lambda: torch.randn(2, 3, 4).permute(2, 0, 1),
        lambda: torch.randn(3, 8)[:, ::2],
        lambda: torch.randn(3, 1).expand(3, 4),
        lambda: torch.randn(20)[5:17].view(3, 4),
        lambda: torch.randn(1, 3, 1, 4).transpose(1, 3),
        lambda: torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    ],
    ids=["transposed", "permuted", "strided", "expanded", "offset", "size one", "channels last"],
)
def test_parameter_that_is_not_contiguous(make: Callable[[], Tensor]) -> None:
    weight = make()
    plain, lazy = twins(Holder(weight))
    compare(plain, lazy, torch.randn(weight.shape, dtype=torch.float64))
    assert lazy.weight.shape == plain.weight.shape
    assert lazy.weight.stride() == plain.weight.stride()
    assert lazy.weight.is_contiguous() == plain.weight.is_contiguous()
    assert values(lazy.weight).stride() == plain.weight.stride()


@st.composite
def laid_out(draw: st.DrawFn) -> Tensor:
    """Any dimensions, zero and one among them, permuted, strided or expanded."""
    shape = draw(st.lists(st.sampled_from([0, 1, 1, 2, 3]), max_size=4))
    order = draw(st.permutations(range(len(shape))))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.complex64]))
    tensor = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape).to(dtype).permute(order)
    if tensor.dim() and draw(st.booleans()):
        tensor = tensor[::2] if draw(st.booleans()) else tensor[1:]
    if tensor.dim() and len(tensor) and draw(st.booleans()):
        tensor = tensor[:1].expand(2, *tensor.shape[1:])
    return tensor


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensor=laid_out(), storage=st.sampled_from(["disk", "cpu"]), half=st.booleans())
def test_any_layout(tensor: Tensor, storage: str, half: bool) -> None:
    plain, lazy = twins(Holder(tensor), storage=storage)
    if half:
        plain, lazy = plain.double(), lazy.double()
    assert_same(plain.weight, lazy.weight)
    assert lazy.weight.stride() == plain.weight.stride()
    x = torch.zeros(tensor.shape, dtype=torch.float64)
    assert_same(plain(x), lazy(x))
    for model in (plain, lazy):
        with torch.no_grad():
            model.weight.copy_(tensor + 1)
            model.weight.mul_(2)
    assert_same(plain.weight, lazy.weight)
    assert_same(plain(x), lazy(x))
    restored = pylomin.restore(lazy)
    assert_same(plain.weight, restored.weight)
    assert restored.weight.stride() == plain.weight.stride()


@pytest.mark.parametrize(
    "weight",
    [torch.ones(1, 3).t(), torch.empty(0, 3).t(), torch.empty(3, 0).t(), torch.ones(1, 1, 4).permute(2, 0, 1)],
    ids=["column", "no columns", "no rows", "two ones"],
)
def test_transposed_parameter_of_one_row_or_none(weight: Tensor) -> None:
    check(Holder(weight), torch.zeros(weight.shape, dtype=torch.float64))


def test_transposed_weight_in_linear() -> None:
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(torch.randn(4, 3).t())
    lazy = check(layer, torch.randn(2, 4))
    assert lazy.weight.stride() == (1, 3)


def test_transposed_table_in_embedding() -> None:
    table = nn.Embedding(6, 4)
    table.weight = nn.Parameter(torch.randn(4, 6).t())
    check(table, torch.tensor([[0, 5], [2, 2]]))


@pytest.mark.parametrize("when", ["before", "after"])
def test_channels_last(when: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3))
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    if when == "before":
        model = model.to(memory_format=torch.channels_last)
    plain, lazy = twins(model)
    if when == "after":
        plain, lazy = (m.to(memory_format=torch.channels_last) for m in (plain, lazy))
    compare(plain, lazy, x)
    assert lazy[0].weight.stride() == plain[0].weight.stride()
    assert lazy[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert lazy(x).stride() == plain(x).stride()


class Views(nn.Module):
    """Parameters that are views of one buffer, as flat optimizers make them."""

    def __init__(self) -> None:
        super().__init__()
        flat = torch.randn(28)
        self.left = nn.Parameter(flat[:12].view(3, 4))
        self.right = nn.Parameter(flat[8:20].view(3, 4))  # overlaps
        self.whole = nn.Parameter(flat)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.left.t() + x @ self.right.t() * self.whole.sum()


def test_parameters_that_share_a_storage() -> None:
    check(Views(), torch.randn(2, 4))


def test_views_with_the_same_geometry_are_one_weight() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.detach())
    lazy = check(model, torch.randn(2, 4))
    with torch.no_grad():
        lazy[0].weight.fill_(2.0)
    assert_same(torch.full((4, 4), 2.0), lazy[1].weight)


def test_parameters_of_one_model_with_mixed_dtypes() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4).double()
            self.b = nn.Linear(4, 4).bfloat16()
            self.c = nn.Parameter(torch.tensor([1, 2, 3, 4]), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x.double()) + self.b(x.bfloat16()) * self.c

    check(Mixed(), torch.randn(2, 4))


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:UserWarning")
def test_quantized_parameter_is_refused() -> None:
    class Quantized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            quantized = torch._empty_affine_quantized((2, 2), scale=0.1, zero_point=0, dtype=torch.qint8)
            self.weight = nn.Parameter(quantized, requires_grad=False)

    with pytest.raises(pylomin.PassError, match="parameter 'weight' is sparse or quantized; skip its module"):
        pylomin.lazy_loading(Quantized())


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_sparse_parameter_is_refused() -> None:
    class Sparse(nn.Module):
        def __init__(self, values: Tensor) -> None:
            super().__init__()
            self.plain = nn.Linear(2, 2)
            self.weight = nn.Parameter(values)

    for values_ in (torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr()):
        model = Sparse(values_)
        with pytest.raises(pylomin.PassError, match="parameter 'weight' is sparse or quantized; skip its module"):
            pylomin.lazy_loading(model)
        assert type(model.plain) is nn.Linear


def test_sparse_parameter_that_is_not_a_target_is_left_alone() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.weight = nn.Parameter(torch.eye(3).to_sparse())

        def forward(self, x: Tensor) -> Tensor:
            return torch.sparse.mm(self.weight, self.layer(x))

    model = Sparse()
    expected = model(torch.ones(3, 3)).detach()
    lazy = pylomin.lazy_loading(model, target_classes=[nn.Linear])
    assert_same(expected, lazy(torch.ones(3, 3)).detach())


def test_meta_parameter_is_refused_without_weights() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(pylomin.PassError, match=r"parameter '0\.weight' is on the meta device.*pass weights="):
        pylomin.lazy_loading(model)
    assert type(model[0]) is nn.Linear


def test_meta_parameters_with_weights() -> None:
    plain = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    lazy = pylomin.lazy_loading(model, weights=plain.state_dict())
    compare(plain.requires_grad_(False), lazy, torch.randn(2, 4))


def test_parameter_with_a_gradient_is_refused() -> None:
    model = nn.Linear(3, 3)
    model(torch.ones(1, 3)).sum().backward()
    with pytest.raises(pylomin.PassError, match=r"has a gradient, which would be lost; call model\.zero_grad"):
        pylomin.lazy_loading(model)
    model.zero_grad(set_to_none=True)
    check(model, torch.ones(1, 3))


def test_negative_zero_nan_and_infinity_survive() -> None:
    special = torch.tensor([-0.0, 0.0, float("nan"), float("inf"), float("-inf"), 1e-45, -1e-45])
    lazy = pylomin.lazy_loading(Holder(special.clone()))
    assert torch.equal(values(lazy.weight).view(torch.int32), special.view(torch.int32))


def test_conjugated_and_negated_parameter() -> None:
    values_ = torch.randn(3, dtype=torch.complex64)
    for weight in (values_.conj(), values_.conj().imag):
        plain, lazy = twins(Holder(weight))
        assert_same_parameters(plain, lazy)
        compare(plain, lazy, torch.randn(3, dtype=torch.float64))


class MyParameter(nn.Parameter):
    """A subclass with an attribute, without behaviour of its own."""


def test_parameter_subclass_and_its_attributes_come_back() -> None:
    model = nn.Linear(4, 3)
    model.weight = MyParameter(torch.randn(3, 4))
    model.weight.tag = "mine"
    lazy = check(model, torch.randn(2, 4))
    assert lazy.weight.tag == "mine"
    restored = pylomin.restore(lazy)
    assert restored.weight.tag == "mine"
    assert type(restored.weight) is MyParameter
