"""A model that is gone leaves nothing: no thread, descriptor, file or byte."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import pylomin

from .common import (
    Stack,
    background_gate,
    ends,
    faulty_stack,
    forward,
    inputs,
    only_residency,
    open_descriptors,
    prefetch_threads,
    reads_ended,
    stack_pair,
)


@pytest.fixture
def _no_collector() -> Iterator[None]:
    """References alone must do it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("budget", [None, "4MiB", "100MiB"])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_a_deleted_model_leaves_nothing(scratch: Path, depth: int, budget: str | None) -> None:
    descriptors, threads = open_descriptors(), len(prefetch_threads())
    x, expected, model = stack_pair(3, memory_budget=budget)
    if depth:
        pylomin.prefetch(model, depth=depth)
    for _ in range(3):
        assert torch.equal(forward(model, x), expected)
    residency = weakref.ref(only_residency(model))
    pool = only_residency(model).pool
    assert len(list(scratch.iterdir())) == 1
    del model
    assert ends(lambda: residency() is None)
    assert ends(lambda: len(prefetch_threads()) == threads)
    assert ends(lambda: open_descriptors() == descriptors)
    assert list(scratch.iterdir()) == []
    assert pool.in_use_bytes() == 0


@pytest.mark.usefixtures("_no_collector")
def test_no_cycle_goes_through_residency() -> None:
    x, _, model = stack_pair(2, memory_budget="10MiB")
    forward(model, x)
    with torch.no_grad():
        model.layers[0].bias.add_(1)
    forward(model, x)
    weight = weakref.ref(model.layers[0].weight.weight)
    source = weakref.ref(model.layers[0].weight.weight.source)
    residency = weakref.ref(only_residency(model))
    del model
    assert (weight(), source(), residency()) == (None, None, None)


@pytest.mark.usefixtures("_no_collector")
def test_no_cycle_after_an_exception() -> None:
    x, _, model = stack_pair(2)
    with pytest.raises(RuntimeError):
        forward(model, x[:, :-1])
    residency = weakref.ref(only_residency(model))
    del model
    assert residency() is None


@pytest.mark.usefixtures("_no_collector")
def test_no_cycle_after_a_failed_read() -> None:
    x, _, model, store = faulty_stack(2)

    def fail(names: list[str]) -> None:
        raise pylomin.StoreReadError("no")

    store.before_read = fail
    for _ in range(2):
        with pytest.raises(pylomin.StoreReadError):
            forward(model, x)
    residency = weakref.ref(only_residency(model))
    del model
    assert residency() is None


@pytest.mark.usefixtures("_no_collector")
def test_copy_and_original_are_independent(scratch: Path) -> None:
    x, expected, model = stack_pair(2)
    twin = copy.deepcopy(model)
    residency = weakref.ref(only_residency(model))
    del model
    assert residency() is None
    assert torch.equal(forward(twin, x), expected)
    assert len(list(scratch.iterdir())) == 1
    del twin
    assert list(scratch.iterdir()) == []


def test_a_model_in_a_cycle_goes_with_the_collector(scratch: Path) -> None:
    model = Stack(2)
    model.myself = [model]  # type: ignore[assignment]
    pylomin.prefetch(pylomin.lazy_loading(model))
    forward(model, inputs())
    forward(model, inputs())
    residency = weakref.ref(only_residency(model))
    del model
    gc.collect()
    assert ends(lambda: residency() is None)
    assert ends(lambda: not prefetch_threads())
    assert list(scratch.iterdir()) == []


def test_weights_that_outlive_the_model_keep_working(scratch: Path) -> None:
    _, _, model = stack_pair(1)
    expected = model.layers[0].weight.detach().clone()
    weight = model.layers[0].weight
    del model
    gc.collect()
    assert torch.equal(weight.detach() + 0, expected)
    assert len(list(scratch.iterdir())) == 1
    del weight
    assert list(scratch.iterdir()) == []


def test_values_that_outlive_the_model_stay_right() -> None:
    model = pylomin.lazy_loading(nn.Linear(300, 300), memory_budget="10MiB")
    expected = model.weight.detach().clone()
    weight, residency = model.weight.weight, only_residency(model)
    with residency.hold([weight]):
        kept = [model.weight.detach()]
    pool = residency.pool
    del model, weight, residency
    gc.collect()
    other = pylomin.lazy_loading(nn.Linear(300, 300))
    forward(other, torch.ones(1, 300))
    assert torch.equal(kept[0], expected)
    assert pool.in_use_bytes() > 0
    kept.clear()
    assert pool.in_use_bytes() == 0


def test_deletion_while_a_background_read_runs() -> None:
    x, expected, model, store = faulty_stack(3)
    pylomin.prefetch(model)
    forward(model, x)
    forward(model, x)
    gate = background_gate(store, "layers.1.weight")
    done: list[bool] = []

    def use() -> None:
        done.append(torch.equal(forward(model, x), expected))  # noqa: F821  # deleted below, on purpose

    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    gate.wait_until_reached()
    gate.opened.set()
    thread.join(30)
    assert done == [True]
    assert reads_ended(only_residency(model))  # the first layer was read for the next forward

    again = background_gate(store, "layers.0.weight")
    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    thread.join(30)  # the first layer of the next forward is read while nobody runs
    assert done == [True, True]
    again.wait_until_reached()
    residency = weakref.ref(only_residency(model))
    pool = only_residency(model).pool
    del model, use, thread
    gc.collect()
    again.opened.set()
    assert ends(lambda: residency() is None)
    assert ends(lambda: not prefetch_threads())
    assert ends(lambda: pool.in_use_bytes() == 0)


def test_classes_made_for_dynamic_classes_are_collected() -> None:
    class Own(nn.Linear):
        pass

    model = pylomin.lazy_loading(Own(4, 4))
    forward(model, torch.ones(1, 4))
    original, lazy = weakref.ref(Own), weakref.ref(type(model))
    assert lazy() is not original()
    del model, Own
    gc.collect()
    assert lazy() is None
    assert original() is None


def test_restore_leaves_nothing(scratch: Path) -> None:
    descriptors = open_descriptors()
    x, expected, model = stack_pair(2, memory_budget="10MiB")
    pylomin.prefetch(model)
    forward(model, x)
    forward(model, x)
    pylomin.restore(model)
    gc.collect()
    assert torch.equal(forward(model, x), expected)
    assert ends(lambda: not prefetch_threads())
    assert list(scratch.iterdir()) == []
    assert open_descriptors() == descriptors
