"""Products with an offloaded weight give what torch gives, with a tile of the weight in memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pylomin
from pylomin.lazy.tensor import OffloadedTensor
from pylomin.residency import contents
from pylomin.residency.places import Places

OUT, IN, ROWS = 53, 37, 7
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "grad": torch.enable_grad,
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def tiled(weight: Tensor, rows: int = ROWS) -> OffloadedTensor:
    """A parameter with these values that is used ``rows`` rows at a time."""
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    module.weight = nn.Parameter(weight.clone(), requires_grad=False)
    module = pylomin.chunked_linear(module, target_modules=[module], chunk_size=rows)
    parameter = module._parameters["weight"]
    assert isinstance(parameter, OffloadedTensor)
    return parameter


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Equal but for rounding; of the same kind in all other respects."""
    assert actual.dtype == expected.dtype
    assert actual.stride() == expected.stride()
    # One unit in the last place of a sum of numbers near 1.
    eps = 2 * torch.finfo(expected.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=4 * eps, atol=16 * eps)


B = 3  # batch
PRODUCTS: dict[str, Callable[[Tensor, Callable[..., Tensor]], Tensor]] = {
    "linear": lambda w, x: F.linear(x(5, IN), w),
    "linear bias": lambda w, x: F.linear(x(5, IN), w, x(OUT)),
    "linear 1-D": lambda w, x: F.linear(x(IN), w, x(OUT)),
    "linear 1-D no bias": lambda w, x: F.linear(x(IN), w),
    "linear 3-D": lambda w, x: F.linear(x(B, 5, IN), w, x(OUT)),
    "linear 4-D": lambda w, x: F.linear(x(2, B, 5, IN), w, x(OUT)),
    "linear of no rows": lambda w, x: F.linear(x(0, IN), w, x(OUT)),
    "linear of strided rows": lambda w, x: F.linear(x(5, 2 * IN)[:, ::2], w, x(OUT)),
    "linear of a transposed batch": lambda w, x: F.linear(x(5, B, IN).transpose(0, 1), w, x(OUT)),
    "linear of an expanded row": lambda w, x: F.linear(x(IN).expand(5, IN), w, x(OUT)),
    "x @ w.t()": lambda w, x: x(5, IN) @ w.t(),
    "x @ w.mT, batch": lambda w, x: x(B, 5, IN) @ w.mT,
    "x @ w": lambda w, x: x(5, OUT) @ w,
    "x @ w, 1-D": lambda w, x: x(OUT) @ w,
    "x @ w, batch": lambda w, x: x(5, B, OUT).transpose(0, 1) @ w,
    "w @ x": lambda w, x: w @ x(IN, 5),
    "w @ x, 1-D": lambda w, x: w @ x(IN),
    "w @ x, batch": lambda w, x: w @ x(B, IN, 5),
    "w.t() @ x": lambda w, x: w.t() @ x(OUT, 5),
    "w.t() @ x, batch": lambda w, x: w.t() @ x(B, OUT, 5),
    "w.t() @ x, 1-D": lambda w, x: w.t() @ x(OUT),
    "addmm": lambda w, x: torch.addmm(x(5, OUT), x(5, IN), w.t(), beta=0.5, alpha=2),
    "addmm over rows": lambda w, x: torch.addmm(x(IN), x(5, OUT), w, beta=0.5, alpha=2),
    "addmm, column": lambda w, x: torch.addmm(x(5, 1), x(5, IN), w.t()),
    "addmm, beta 0": lambda w, x: torch.addmm(x(IN) * float("nan"), x(5, OUT), w, beta=0),
    "addmm from the left": lambda w, x: torch.addmm(x(OUT, 5), w, x(IN, 5), alpha=2),
    "addmv": lambda w, x: torch.addmv(x(OUT), w, x(IN), beta=2, alpha=0.5),
    "baddbmm": lambda w, x: torch.baddbmm(x(B, 5, OUT), x(B, 5, IN), w.t().expand(B, IN, OUT), beta=2),
    "baddbmm over rows": lambda w, x: torch.baddbmm(x(B, 5, IN), x(B, 5, OUT), w.expand(B, OUT, IN), alpha=2),
    "rows of w": lambda w, x: F.linear(x(5, IN), w[10:40]),
    "columns of w": lambda w, x: F.linear(x(5, IN - 9), w[:, 4:-5]),
    "einsum": lambda w, x: torch.einsum("bi,oi->bo", x(5, IN), w),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str, mode: str) -> None:
    for dtype in DTYPES if mode == "no_grad" else DTYPES[:1]:
        plain = random(OUT, IN).to(dtype) / IN**0.5
        weight = tiled(plain)

        def operand(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return random(*shape).to(dtype)

        with MODES[mode]():
            actual = PRODUCTS[name](weight, operand)
            expected = PRODUCTS[name](plain, operand)
        assert_near(actual, expected)
        assert actual.is_inference() == expected.is_inference()
        stats = weight.weight.residency.stats()
        row_bytes = IN * dtype.itemsize
        tile_bytes = -(-ROWS * row_bytes // 64) * 64
        assert stats.bytes_read <= OUT * row_bytes
        assert stats.peak_bytes <= tile_bytes
        assert stats.resident_bytes == 0


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 20),
    size=st.integers(1, 20),
    rows=st.integers(1, 25),
    batch=st.lists(st.integers(0, 4), max_size=3),
    transposed=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(out: int, size: int, rows: int, batch: list[int], transposed: bool, dtype: torch.dtype) -> None:
    """Small integers are summed without rounding, so that a tile left out or read twice shows."""
    generator = torch.Generator().manual_seed(out)
    plain = torch.randint(-3, 4, (out, size), generator=generator).to(dtype)
    x = torch.randint(-2, 3, (*batch, out if transposed else size), generator=generator).to(dtype)
    weight = tiled(plain, rows)
    with torch.no_grad():
        expected, actual = (x @ (w if transposed else w.t()) for w in (plain, weight))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["linear", "linear 1-D", "linear 3-D", "x @ w", "w @ x", "w @ x, batch", "baddbmm"])
def test_gradients_to_the_input(name: str) -> None:
    plain = random(OUT, IN).double() / IN**0.5
    weight = tiled(plain)
    gradients = []
    for w in (plain, weight):
        leaves: list[Tensor] = []

        def leaf(*shape: int, leaves: list[Tensor] = leaves) -> Tensor:
            leaves.append(random(*shape).double().requires_grad_())
            return leaves[-1]

        PRODUCTS[name](w, leaf).square().sum().backward()
        gradients.append([x.grad for x in leaves])
    for left, right in zip(*gradients, strict=True):
        assert left is not None
        torch.testing.assert_close(right, left)
    assert weight.weight.residency.stats().peak_bytes <= ROWS * IN * 8 + 64


def test_gradcheck() -> None:
    weight = tiled(random(OUT, IN).double())
    x = random(2, IN).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: F.linear(x, weight), (x,))  # type: ignore[no-untyped-call]


def test_write_between_forward_and_backward_is_an_error() -> None:
    weight = tiled(random(OUT, IN))
    x = random(5, IN).requires_grad_()
    out = F.linear(x, weight).sum()
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_function_transforms() -> None:
    plain = random(OUT, IN).double()
    weight = tiled(plain)
    x = random(5, IN).double()
    for compute in (
        lambda w: torch.func.vmap(lambda row: F.linear(row, w))(x),
        lambda w: torch.func.grad(lambda x: F.linear(x, w).square().sum())(x),
        lambda w: torch.func.jacrev(lambda row: F.linear(row, w))(x[0]),
        lambda w: torch.func.jvp(lambda x: F.linear(x, w), (x,), (x,))[1],
    ):
        torch.testing.assert_close(compute(weight), compute(plain))


@pytest.mark.parametrize("name", ["linear", "x @ w", "w @ x, 1-D", "w @ x, batch", "baddbmm"])
def test_wrong_shapes_and_dtypes_say_what_torch_says(name: str) -> None:
    plain = random(OUT, IN)
    weight = tiled(plain)
    for cut, dtype in ((1, torch.float32), (0, torch.float64)):

        def operand(*shape: int, cut: int = cut, dtype: torch.dtype = dtype) -> Tensor:
            return random(*(size - cut if size in (IN, OUT) else size for size in shape)).to(dtype)

        errors = []
        for w in (plain, weight):
            with pytest.raises(RuntimeError) as raised:
                PRODUCTS[name](w, operand)
            errors.append(str(raised.value))
        assert errors[0] == errors[1]
    assert weight.weight.residency.stats().bytes_read == 0


def test_converted_weight_is_converted_by_tiles() -> None:
    plain = random(OUT, IN)
    for convert in (torch.Tensor.double, torch.Tensor.bfloat16):
        weight = tiled(plain)
        converted = convert(weight)
        assert_near(F.linear(convert(random(5, IN)), converted), F.linear(convert(random(5, IN)), convert(plain)))
        row_bytes = IN * (4 + converted.dtype.itemsize)
        assert weight.weight.residency.stats().peak_bytes <= ROWS * row_bytes + 64


def test_weight_that_is_not_row_major() -> None:
    plain = random(IN, OUT).t()
    weight = tiled(plain)
    assert weight.stride() == plain.stride()
    assert_near(F.linear(random(5, IN), weight), F.linear(random(5, IN), plain))
    assert weight.weight.residency.stats().peak_bytes <= ROWS * OUT * 4 + 64


def test_two_offloaded_operands() -> None:
    plain, other = random(OUT, IN), random(IN, OUT)
    torch.testing.assert_close(tiled(plain) @ tiled(other), plain @ other)


def test_write_takes_effect() -> None:
    plain = random(OUT, IN)
    weight = tiled(plain)
    x = random(5, IN)
    for w in (plain, weight):
        with torch.no_grad():
            w[3:20] *= 2
    assert_near(F.linear(x, weight), F.linear(x, plain))


def test_too_large_weight_is_read_into_private_memory() -> None:
    module = nn.Linear(64, 512)
    plain = module.weight.detach().clone()
    lazy = pylomin.lazy_loading(module, memory_budget=32 << 10)
    weight = lazy._parameters["weight"]
    assert isinstance(weight, OffloadedTensor)
    assert torch.equal(weight.materialize(), plain)
    assert pylomin.stats(lazy).peak_bytes <= 32 << 10


def test_where_tiles_come_to_lie_is_decided_once_and_again_after_a_write(monkeypatch: pytest.MonkeyPatch) -> None:
    made = 0

    class Counted(Places):
        def __init__(self, *args: Any, **settings: Any) -> None:
            nonlocal made
            made += 1
            super().__init__(*args, **settings)

    monkeypatch.setattr(contents, "Places", Counted)
    plain, x = random(64, 512), random(3, 512)
    weight = tiled(plain, rows=32)  # tiles of 64 KiB
    assert_near(F.linear(x, weight), F.linear(x, plain))
    known = made
    assert_near(F.linear(x, weight), F.linear(x, plain))
    assert made == known > 0
    for w in (plain, weight):
        with torch.no_grad():
            w *= 2
    assert_near(F.linear(x, weight), F.linear(x, plain))
    assert made > known
