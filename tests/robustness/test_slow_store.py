"""A store that waits and fails when told to: what a forward does while a read is under way."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

import pylomin
from pylomin.io import buffers

from .common import (
    FaultyStore,
    Gate,
    Stack,
    assert_nothing_held,
    background_gate,
    ends,
    faulty_stack,
    forward,
    group_bytes,
    in_prefetch_thread,
    inputs,
    only_residency,
    prefetch_threads,
    run_in_thread,
    settled,
    undisturbed,
    weights_of,
)


def started(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def prefetching_stack(layers: int = 3, **options: object) -> tuple[torch.Tensor, torch.Tensor, Stack, FaultyStore]:
    """With a known order, and nothing read ahead yet."""
    x, expected, model, store = faulty_stack(layers, **options)
    pylomin.prefetch(model)
    forward(model, x)
    forward(model, x)
    only_residency(model).set_depth(0)
    only_residency(model).set_depth(1)
    store.reads.clear()
    return x, expected, model, store


def test_a_forward_waits_for_a_background_read() -> None:
    """It does not read a second time."""
    x, expected, model, store = prefetching_stack()
    gate = background_gate(store, "layers.1.weight")
    outputs: list[torch.Tensor] = []
    thread = started(lambda: outputs.append(forward(model, x)))
    gate.wait_until_reached()
    weight = model.layers[1]._parameters["weight"].weight
    assert ends(lambda: weight.holds == 1), "the forward did not come to the layer that is read"
    gate.opened.set()
    thread.join(30)
    assert torch.equal(outputs[0], expected)
    assert settled(only_residency(model))
    names = [name for read in store.reads for name in read]
    assert names.count("layers.1.weight") == 1
    assert only_residency(model).stats().stall_s > 0


@pytest.mark.parametrize(
    "error",
    [
        pylomin.StoreReadError("the disk is gone"),
        OSError(5, "Input/output error"),
        RuntimeError("cannot"),
        MemoryError("none left"),
        ValueError("a store of the user's own"),
        KeyError("a store of the user's own"),
        ZeroDivisionError("a bug in a store"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_in_the_background_is_raised_in_the_forward(error: Exception) -> None:
    """Once; then the reason is gone, and so is the error."""
    x, expected, model, store = prefetching_stack()
    failures: list[list[str]] = []

    def fail(names: list[str]) -> None:
        if in_prefetch_thread() and "layers.1.weight" in names and not failures:
            failures.append(names)
            raise copy.copy(error)  # the parameter itself would keep the frames it passed, and so the model

    store.before_read = fail
    with pytest.raises(type(error)) as caught:
        run_in_thread(lambda: forward(model, x))
    assert str(error) in str(caught.value)
    assert failures
    del caught
    residency = only_residency(model)
    assert torch.equal(run_in_thread(lambda: forward(model, x)), expected), "the next forward"
    assert torch.equal(run_in_thread(lambda: forward(model, x)), expected)
    assert prefetch_threads(), "prefetch goes on"
    residency.set_depth(0)
    assert_nothing_held(model)
    assert all(weight.error is None for weight in weights_of(model))


def test_an_error_in_the_background_names_what_it_was() -> None:
    x, _, model, store = prefetching_stack()

    def fail(names: list[str]) -> None:
        if in_prefetch_thread():
            raise pylomin.StoreReadError(f"could not read weight {names[0]!r}: the disk is gone")

    store.before_read = fail
    with pytest.raises(pylomin.StoreReadError, match=r"layers\.1\.weight.*the disk is gone"):
        run_in_thread(lambda: forward(model, x))


@pytest.mark.parametrize(("tiles_in_budget", "ahead"), [(None, 2), (3, 2), (2, 1)])
def test_tiles_are_read_while_one_is_used(tiles_in_budget: int | None, ahead: int) -> None:
    """Two, so that the disk has work while the first of them is taken; as far as there is room."""
    model = nn.Sequential(nn.Linear(1024, 256, bias=False))
    plain = model[0].weight.detach().clone()
    store = FaultyStore({"0.weight": plain})
    tiles = [(first, first + (64 << 10)) for first in range(0, plain.numel(), 64 << 10)]  # 256 KiB each
    budget = None if tiles_in_budget is None else tiles_in_budget * (256 << 10)
    pylomin.prefetch(pylomin.lazy_loading(model, weights=store, memory_budget=budget))
    (weight,), residency = weights_of(model), only_residency(model)
    used: list[torch.Tensor] = []
    for values in residency.stream_runs(weight, tiles):
        used.append(values.clone())
        begun = min(len(used) + ahead, len(tiles))
        assert ends(partial(store.has_begun, begun)), "not read ahead"
        assert not ends(partial(store.has_begun, begun + 1), 0.05), "too much is read ahead"
        del values
    assert torch.equal(torch.cat(used).view_as(plain), plain)
    assert settled(residency)
    assert_nothing_held(model)


def test_every_background_read_fails() -> None:
    """Each forward raises, none hangs; when the disk is back, all is well."""
    x, expected, model, store = prefetching_stack(4)

    def fail(names: list[str]) -> None:
        if in_prefetch_thread():
            raise pylomin.StoreReadError("the disk is gone")

    store.before_read = fail
    for _ in range(4):
        with pytest.raises(pylomin.StoreReadError):
            run_in_thread(lambda: forward(model, x))
    store.before_read = lambda names: None
    only_residency(model).set_depth(0)
    outcomes = []
    for _ in range(5):  # what was read ahead in vain is still told, once for each read
        try:
            outcomes.append(torch.equal(run_in_thread(lambda: forward(model, x)), expected))
        except pylomin.StoreReadError:
            outcomes.append(False)
    assert outcomes[-1]
    assert outcomes.count(False) <= 1
    assert_nothing_held(model)


def test_an_error_that_nobody_needed_is_not_raised() -> None:
    """What failed in the background is written to before it is used: the new value is there."""
    x, _, model, store = prefetching_stack(3)

    def fail(names: list[str]) -> None:
        if in_prefetch_thread() and "layers.2.weight" in names:
            raise pylomin.StoreReadError("the disk is gone")

    store.before_read = fail
    with pytest.raises(pylomin.StoreReadError):
        run_in_thread(lambda: forward(model, x))
    store.before_read = lambda names: None
    with torch.no_grad():
        for parameter in model.layers[2].parameters():
            parameter.zero_()
    assert torch.equal(run_in_thread(lambda: forward(model, x)), torch.zeros_like(x))


def test_ending_prefetch_while_a_read_runs() -> None:
    """``set_depth(0)`` waits for the read, and nothing else."""
    threads = len(prefetch_threads())
    x, expected, model, store = prefetching_stack()
    gate = background_gate(store, "layers.1.weight")
    outputs: list[torch.Tensor] = []
    forward_thread = started(lambda: outputs.append(forward(model, x)))
    gate.wait_until_reached()
    ending = started(lambda: only_residency(model).set_depth(0))
    gate.opened.set()
    forward_thread.join(30)
    ending.join(30)
    assert not forward_thread.is_alive()
    assert not ending.is_alive()
    assert torch.equal(outputs[0], expected)
    assert ends(lambda: len(prefetch_threads()) <= threads)
    assert_nothing_held(model)


def test_changing_the_depth_while_reads_wait_in_line() -> None:
    """Those not begun are given up, and read when they are needed."""
    x, expected, model, store = faulty_stack(5)
    pylomin.prefetch(model, depth=3)
    forward(model, x)
    forward(model, x)
    residency = only_residency(model)
    residency.set_depth(0)
    residency.set_depth(3)
    gate = background_gate(store, "layers.1.weight")
    outputs: list[torch.Tensor] = []
    thread = started(lambda: outputs.append(forward(model, x)))
    gate.wait_until_reached()
    changing = started(lambda: residency.set_depth(1))
    assert ends(lambda: residency.depth == 1)
    gate.opened.set()
    thread.join(30)
    changing.join(30)
    assert not thread.is_alive()
    assert not changing.is_alive()
    assert torch.equal(outputs[0], expected)
    assert torch.equal(run_in_thread(lambda: forward(model, x)), expected)
    assert settled(residency)


def test_stats_and_budget_while_a_read_runs() -> None:
    """Nobody who asks has to wait for a disk."""
    x, expected, model, store = prefetching_stack()
    gate = background_gate(store, "layers.1.weight")
    outputs: list[torch.Tensor] = []
    thread = started(lambda: outputs.append(forward(model, x)))
    gate.wait_until_reached()
    run_in_thread(lambda: pylomin.stats(model), patience_s=5)
    run_in_thread(lambda: only_residency(model).set_budget(10 * group_bytes(model)), patience_s=5)
    gate.opened.set()
    thread.join(30)
    assert torch.equal(outputs[0], expected)


def test_a_write_while_the_weight_is_being_read() -> None:
    """It waits for the read, and is not lost."""
    x, expected, model, store = prefetching_stack()
    gate = background_gate(store, "layers.1.weight")
    outputs: list[torch.Tensor] = []
    forward_thread = started(lambda: outputs.append(forward(model, x)))
    gate.wait_until_reached()

    def write() -> None:
        with torch.no_grad():
            model.layers[1]._parameters["weight"].zero_()
            model.layers[1]._parameters["bias"].zero_()

    writing = started(write)
    gate.opened.set()
    forward_thread.join(30)
    writing.join(30)
    assert not forward_thread.is_alive()
    assert not writing.is_alive()
    reference = Stack(3)
    with torch.no_grad():
        reference.layers[1].weight.zero_()
        reference.layers[1].bias.zero_()
    assert torch.equal(run_in_thread(lambda: forward(model, x)), forward(reference, x))
    assert len(outputs) == 1
    assert expected.shape == outputs[0].shape


def test_a_foreground_read_that_waits_does_not_block_other_layers() -> None:
    """While one thread reads, another computes with what it holds already."""
    x, expected, model, store = faulty_stack(2)
    gate = Gate()
    reads_of_second = []

    def before_read(names: list[str]) -> None:
        if "layers.1.weight" in names and not reads_of_second:
            reads_of_second.append(names)
            gate.wait()

    store.before_read = before_read
    outputs: list[torch.Tensor] = []
    thread = started(lambda: outputs.append(forward(model, x)))
    gate.wait_until_reached()
    with torch.no_grad():
        run_in_thread(lambda: model.layers[0](x), patience_s=10)
    gate.opened.set()
    thread.join(30)
    assert torch.equal(outputs[0], expected)
    assert_nothing_held(model)


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("layers_in_budget", [1, 1.5, 2, 3, 5])
def test_the_budget_holds_at_every_moment(depth: int, layers_in_budget: float) -> None:
    x, _, model, _ = faulty_stack(5)
    residency = only_residency(model)
    residency.set_budget(int(layers_in_budget * group_bytes(model)))
    residency.set_depth(depth)
    expected = undisturbed(Stack(5), x, residency.memory_budget)
    pool, exceeded, alive, peak = residency.pool, [], [0], [0]

    def observe(delta_bytes: int) -> None:
        alive[0] += delta_bytes
        peak[0] = max(peak[0], alive[0])
        if pool.live_bytes + pool.free_bytes > (pool.limit_bytes or 0):
            exceeded.append((pool.live_bytes, pool.free_bytes))

    undo = buffers.observe(observe)
    try:
        for _ in range(6):
            assert torch.equal(run_in_thread(lambda: forward(model, x)), expected)
    finally:
        undo()
    assert exceeded == []
    assert peak[0] <= residency.memory_budget
    assert residency.stats().peak_bytes <= residency.memory_budget
    assert_nothing_held(model, resident_bytes=residency.memory_budget or 0)


def test_what_is_needed_now_goes_before_what_is_read_ahead() -> None:
    """A wrong prediction fills the budget; the layer that is used instead still gets its room."""
    x = inputs()
    plain = Stack(3)
    layers = list(plain.layers)
    expected = {i: forward(layers[i], x) for i in range(3)}
    store = FaultyStore({name: p.detach().clone() for name, p in plain.named_parameters()})
    model = pylomin.lazy_loading(plain, weights=store)
    residency = only_residency(model)
    residency.set_budget(2 * group_bytes(model))
    residency.set_depth(1)
    for i in (0, 1):
        forward(layers[i], x)
    gate = background_gate(store, "layers.1.weight")
    forward(layers[0], x)  # predicts layer 1
    gate.wait_until_reached()
    outputs: list[torch.Tensor] = []
    thread = started(lambda: outputs.append(forward(layers[2], x)))
    thread.join(0.2)
    gate.opened.set()
    thread.join(30)
    assert not thread.is_alive()
    assert torch.equal(outputs[0], expected[2])
    assert settled(residency)
    assert residency.pool.in_use_bytes() <= residency.memory_budget


def test_a_store_that_lies_about_nothing_is_asked_for_exact_bytes() -> None:
    """Requests name whole weights of this model, with destinations of the right size and alignment."""
    x, expected, model, store = faulty_stack(2)
    assert torch.equal(forward(model, x), expected)
    assert store.reads == [[f"layers.{i}.weight", f"layers.{i}.bias"] for i in range(2)]


def test_closing_the_store_is_told() -> None:
    x, expected, model, store = prefetching_stack()
    assert torch.equal(forward(model, x), expected)
    only_residency(model).set_depth(0)
    store.close()
    for _ in range(2):
        with pytest.raises(pylomin.PylominError, match="closed"):
            run_in_thread(lambda: forward(model, x))
    assert_nothing_held(model)


def test_a_store_that_calls_the_model() -> None:
    """A read that itself needs a layer: odd, but no deadlock as long as it is another layer."""
    x, expected, model, store = faulty_stack(2)
    busy = []

    def before_read(names: list[str]) -> None:
        if "layers.1.weight" in names and not busy:
            busy.append(1)
            with torch.no_grad():
                model.layers[0](x)

    store.before_read = before_read
    assert torch.equal(run_in_thread(lambda: forward(model, x)), expected)
    assert_nothing_held(model)


def test_background_reads_of_a_group_from_several_stores() -> None:
    """One layer whose weight and bias lie in different places is still one read ahead."""
    x = inputs()
    plain = Stack(2)
    expected = forward(plain, x)
    model = pylomin.lazy_loading(plain)
    with torch.no_grad():
        for layer in model.layers:
            layer.bias.add_(0)  # moves it to the overlay
    pylomin.prefetch(model)
    for _ in range(3):
        assert torch.equal(run_in_thread(lambda: forward(model, x)), expected)
    for _ in range(3):
        assert torch.equal(forward(model, x), expected)
    assert only_residency(model).stats().prefetched > 0
    only_residency(model).set_depth(0)
    assert_nothing_held(model)


def test_modules_that_share_a_weight_but_not_a_group() -> None:
    """Two layers with one weight and two biases; each combination can be resident, loading or offloaded."""
    torch.manual_seed(0)
    first, second = nn.Linear(264, 264), nn.Linear(264, 264)
    second.weight = first.weight
    x = inputs()
    plain = nn.Sequential(first, nn.Tanh(), second, nn.Tanh())
    for budget in (None, "300KiB", "1MiB"):
        model = nn.Sequential(nn.Linear(264, 264), nn.Tanh(), nn.Linear(264, 264), nn.Tanh())
        model[2].weight = model[0].weight
        model.load_state_dict(plain.state_dict())
        pylomin.prefetch(pylomin.lazy_loading(model, memory_budget=budget))
        expected = undisturbed(plain, x, only_residency(model).memory_budget)
        for _ in range(4):
            assert torch.equal(run_in_thread(lambda model=model: forward(model, x)), expected)
            assert torch.equal(forward(model, x), expected)
        only_residency(model).set_depth(0)
        assert_nothing_held(model, resident_bytes=1 << 20 if budget else 0)
