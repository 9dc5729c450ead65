"""A forward that raises lets its weights go, and the next one is right."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import pylomin
from pylomin.io.buffers import Pages
from pylomin.lazy.tensor import OffloadedTensor

from .common import (
    Stack,
    assert_nothing_held,
    forward,
    group_bytes,
    inputs,
    only_residency,
    stack_pair,
    undisturbed,
)


class Touchy(nn.Module):
    """A leaf of the user's own that raises where the input says so."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(264, 264, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor, when: str = "") -> torch.Tensor:
        if when == "before":
            raise ArithmeticError("before")
        out = x @ self.weight
        if when == "after":
            raise ArithmeticError("after")
        return out


@pytest.mark.parametrize("budget", [None, "1MiB"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_in_a_leaf(when: str, budget: str | None) -> None:
    model = Touchy()
    x = inputs()
    expected = forward(model, x)
    pylomin.lazy_loading(model, memory_budget=budget)
    for _ in range(3):
        with pytest.raises(ArithmeticError, match=when):
            model(x, when)
        assert_nothing_held(model, resident_bytes=1 << 20 if budget else 0)
        assert torch.equal(forward(model, x), expected)


@pytest.mark.parametrize("when", ["before", "after"])
def test_while_the_exception_is_alive(when: str) -> None:
    """Its traceback keeps the frames; those that hold weights are pylomin's own, and give them up."""
    model = pylomin.lazy_loading(Touchy())
    with pytest.raises(ArithmeticError) as caught:
        model(inputs(), when)
    assert_nothing_held(model)
    assert caught.value.__traceback__ is not None


def test_wrong_shape() -> None:
    x, _, model = stack_pair(3, memory_budget=300_000)
    expected = undisturbed(Stack(3), x, 300_000)
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
        forward(model, x[:, :-3])
    assert_nothing_held(model, resident_bytes=300_000)
    assert torch.equal(forward(model, x), expected)
    assert caught.value.__traceback__ is not None


def test_wrong_shape_where_an_operation_loads() -> None:
    """Not in a lazy module, but at the operation that uses the weight."""
    model = pylomin.lazy_loading(nn.Linear(264, 264))
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
        nn.functional.linear(inputs()[:, :-1], model.weight)
    assert_nothing_held(model)
    assert caught.value.__traceback__ is not None


def test_many_exceptions_kept_alive_fit_in_a_budget() -> None:
    x, _, model = stack_pair(2)
    only_residency(model).set_budget(group_bytes(model))
    expected = undisturbed(Stack(2), x, group_bytes(model))
    kept = []
    for _ in range(10):
        try:
            forward(model, x[:, :-1])
        except RuntimeError as error:
            kept.append(error)
        try:
            nn.functional.linear(x[:, :-1], model.layers[1].weight)
        except RuntimeError as error:
            kept.append(error)
    assert torch.equal(forward(model, x), expected)
    assert len(kept) == 20


def test_of_a_write_that_fails() -> None:
    model = pylomin.lazy_loading(nn.Linear(264, 264))
    before = model.weight.detach().clone()
    with pytest.raises(RuntimeError) as caught, torch.no_grad():
        model.weight.copy_(torch.ones(7))
    assert_nothing_held(model)
    assert torch.equal(model.weight.detach().clone(), before)
    assert caught.value.__traceback__ is not None


def test_in_a_hook() -> None:
    x, expected, model = stack_pair(3)

    def fail(*_: object) -> None:
        raise LookupError("hook")

    for register in ("register_forward_hook", "register_forward_pre_hook"):
        for depth in (0, 1):
            if depth:
                pylomin.prefetch(model)
            handle = getattr(model.layers[1], register)(fail)
            with pytest.raises(LookupError, match="hook"):
                forward(model, x)
            handle.remove()
            assert torch.equal(forward(model, x), expected)
    only_residency(model).set_depth(0)
    assert_nothing_held(model)


def test_in_a_hook_on_backward() -> None:
    x, _, model = stack_pair(2)
    point = x.clone().requires_grad_()

    def fail(*_: object) -> None:
        raise LookupError("backward")

    handle = model.layers[0].register_full_backward_hook(fail)
    with pytest.raises(LookupError, match="backward"):
        model(point).sum().backward()
    handle.remove()
    assert_nothing_held(model)
    model(point).sum().backward()
    assert point.grad is not None
    assert_nothing_held(model)


def test_in_a_module_below() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((264,), 2.0))
            self.inner = Touchy()

        def forward(self, x: torch.Tensor, when: str = "") -> torch.Tensor:
            return self.inner(x * self.scale, when) * self.scale

    model = Outer()
    x = inputs()
    expected = forward(model, x)
    pylomin.prefetch(pylomin.lazy_loading(model, memory_budget="2MiB"))
    for when in ("before", "after"):
        with pytest.raises(ArithmeticError):
            model(x, when)
        assert torch.equal(forward(model, x), expected)
    assert_nothing_held(model, resident_bytes=2 << 20)


def test_in_a_module_that_calls_itself() -> None:
    class Recursive(nn.Linear):
        def forward(self, x: torch.Tensor, depth: int = 5) -> torch.Tensor:
            if depth == 0:
                raise ArithmeticError("bottom")
            return self(super().forward(x), depth - 1)

    model = pylomin.lazy_loading(Recursive(264, 264))
    with pytest.raises(ArithmeticError):
        model(inputs())
    assert_nothing_held(model)


def test_in_a_generator_that_is_dropped_half_way() -> None:
    """A hold that is never left lets go when it is dropped."""
    model = pylomin.lazy_loading(nn.Linear(8, 8))
    weight, residency = model.weight.weight, only_residency(model)

    def steps():  # type: ignore[no-untyped-def]
        with residency.hold([weight]):
            yield 1
            yield 2

    running = steps()
    assert next(running) == 1
    assert weight.holds == 1
    del running
    assert_nothing_held(model)


def test_recursion_error() -> None:
    class Endless(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self(x)

    model = pylomin.lazy_loading(Endless(8, 8))
    limit = sys.getrecursionlimit()
    for extra in range(0, 40, 3):
        sys.setrecursionlimit(limit + extra)
        try:
            with pytest.raises(RecursionError):
                model(torch.ones(1, 8))
        finally:
            sys.setrecursionlimit(limit)
        assert_nothing_held(model)


def test_out_of_memory_in_an_operation() -> None:
    x, expected, model = stack_pair(2)

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    handle = model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        forward(model, x)
    handle.remove()
    assert torch.equal(forward(model, x), expected)
    assert_nothing_held(model)


def test_no_memory_for_a_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system refuses memory: the error passes, and nothing is half loaded."""
    x, expected, model = stack_pair(2)
    with monkeypatch.context() as patch:

        def refuse(*_: object, **__: object) -> Pages:
            raise OSError(12, "Cannot allocate memory")

        patch.setattr("pylomin.io.buffers.Pages", refuse)
        with pytest.raises((MemoryError, OSError)):
            forward(model, x)
    assert_nothing_held(model)
    assert torch.equal(forward(model, x), expected)
    assert_nothing_held(model)


def test_no_memory_for_a_buffer_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read ahead is a favour; it must not fail the layer that runs."""
    x, expected, model = stack_pair(2)
    pylomin.prefetch(model)
    residency = only_residency(model)
    residency.set_reading_mode("buffered")
    forward(model, x)
    forward(model, x)
    residency.set_depth(0)
    residency.pool.trim()
    real, calls = Pages, []

    def refuse_the_second(*arguments: int, **flags: int) -> Pages:
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(12, "Cannot allocate memory")
        return real(*arguments, **flags)

    with monkeypatch.context() as patch:
        patch.setattr("pylomin.io.buffers.Pages", refuse_the_second)
        residency.set_depth(1)
        try:
            output = forward(model, x)
        except OSError:
            output = None
    assert len(calls) >= 2
    assert_nothing_held(model, resident_bytes=group_bytes(model))
    assert torch.equal(forward(model, x), expected)
    assert output is None or torch.equal(output, expected)


def test_a_failed_pass_leaves_the_model_as_it_was() -> None:
    model = Stack(2)
    x = inputs()
    expected = forward(model, x)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(pylomin.BudgetError):
        pylomin.lazy_loading(model, memory_budget=1000)
    with pytest.raises(pylomin.WeightNotFoundError):
        pylomin.lazy_loading(model, weights={"other": torch.ones(1)})
    with pytest.raises(pylomin.WeightMismatchError):
        pylomin.lazy_loading(model, weights={n: torch.ones(1) for n, _ in model.named_parameters()})
    assert [type(module) for module in model.modules()] == classes
    assert not any(isinstance(parameter, OffloadedTensor) for parameter in model.parameters())
    assert torch.equal(forward(model, x), expected)


def test_a_failed_pass_does_not_use_up_a_wish_for_prefetch() -> None:
    model = Stack(2)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    pylomin.prefetch(model, depth=2)
    with pytest.raises(pylomin.WeightNotFoundError):
        pylomin.lazy_loading(model, weights={"other": torch.ones(1)})
    pylomin.lazy_loading(model, weights=weights)
    assert only_residency(model).depth == 2


def test_a_failed_pass_keeps_the_budget() -> None:
    model = Stack(2)
    pylomin.lazy_loading(model, target_modules=[model.layers[0]], memory_budget="2MiB")
    with pytest.raises(pylomin.WeightNotFoundError):
        pylomin.lazy_loading(model, weights={"other": torch.ones(1)}, memory_budget="3MiB")
    assert only_residency(model).memory_budget == 2 << 20
