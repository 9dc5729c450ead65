"""Several threads in one model."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import pylomin

from .common import (
    PATIENCE_S,
    Stack,
    assert_nothing_held,
    faulty_stack,
    forward,
    group_bytes,
    inputs,
    only_residency,
    run_in_threads,
    undisturbed,
)


@pytest.fixture(params=[None, 1e-6], ids=["", "switching"])
def _switching(request: pytest.FixtureRequest) -> Iterator[None]:
    """Once as usual, and once with threads that take turns as often as they can."""
    before = sys.getswitchinterval()
    if request.param is not None:
        sys.setswitchinterval(request.param)
    yield
    sys.setswitchinterval(before)


def check_threads(model: nn.Module, plain: nn.Module, threads: int, rounds: int, *, same_input: bool) -> list[object]:
    """Each thread's outputs are those that it gets alone. Returns the BudgetErrors."""
    xs = [inputs(seed=0 if same_input else i) for i in range(threads)]
    memory_budget = only_residency(model).memory_budget
    expected = [undisturbed(plain, x, memory_budget) for x in xs]

    def use(i: int) -> Callable[[], None]:
        def forwards() -> None:
            for _ in range(rounds):
                assert torch.equal(forward(model, xs[i]), expected[i])

        return forwards

    outcomes = run_in_threads([use(i) for i in range(threads)])
    errors = [outcome for outcome in outcomes if outcome is not None]
    assert all(isinstance(error, pylomin.BudgetError) for error in errors), errors
    return errors


@pytest.mark.usefixtures("_switching")
@pytest.mark.parametrize("same_input", [True, False])
@pytest.mark.parametrize(("threads", "depth", "layers_in_budget"), [(4, 0, None), (8, 1, None), (4, 2, 9), (8, 1, 20)])
def test_threads_get_the_right_outputs(
    threads: int, depth: int, layers_in_budget: int | None, same_input: bool
) -> None:
    plain = Stack(4)
    model = pylomin.lazy_loading(copy.deepcopy(plain))
    if depth:
        pylomin.prefetch(model, depth=depth)
    if layers_in_budget is not None:
        only_residency(model).set_budget(layers_in_budget * group_bytes(model))
    errors = check_threads(model, plain, threads, 10, same_input=same_input)
    assert errors == []
    del errors
    assert_nothing_held(model, resident_bytes=(layers_in_budget or depth) * group_bytes(model))


@pytest.mark.usefixtures("_switching")
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("threads", [4, 8])
def test_the_smallest_budget_makes_threads_take_turns(threads: int, depth: int) -> None:
    """No thread keeps a layer while it waits for another one, so waiting is always enough."""
    plain = Stack(3)
    model = pylomin.lazy_loading(copy.deepcopy(plain))
    only_residency(model).set_budget(group_bytes(model))
    if depth:
        pylomin.prefetch(model, depth=depth)
    assert check_threads(model, plain, threads, 10, same_input=False) == []
    assert_nothing_held(model, resident_bytes=group_bytes(model))
    x = inputs()
    assert torch.equal(forward(model, x), undisturbed(plain, x, group_bytes(model)))


class Nested(nn.Module):
    """Holds one weight over the whole forward of another module."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(264, 264))
        self.inner = nn.Linear(264, 264)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (residency,) = {p.weight.residency for p in self.parameters()} if self.is_offloaded else {None}
        if residency is None:
            return self.inner(x) @ self.scale
        with residency.hold([self._parameters["scale"].weight]):
            return self.inner(x) @ self.scale

    @property
    def is_offloaded(self) -> bool:
        return hasattr(self._parameters["scale"], "weight")


@pytest.mark.usefixtures("_switching")
def test_threads_that_hold_and_want_more_never_deadlock() -> None:
    """Each may hold what the other waits for: one of them gets a BudgetError, and the others go on."""
    plain = Nested()
    for _ in range(5):
        model = pylomin.lazy_loading(copy.deepcopy(plain))
        only_residency(model).set_budget(2 * group_bytes(model))
        check_threads(model, plain, 6, 5, same_input=False)
        x = inputs()
        assert torch.equal(forward(model, x), forward(plain, x))
        assert_nothing_held(model, resident_bytes=2 * group_bytes(model))


def test_threads_read_a_layer_once_between_them() -> None:
    """Who comes while a layer is being read waits for that read."""
    x, expected, model, store = faulty_stack(1)
    threads = 6
    residency = only_residency(model)

    def until_all_wait(names: list[str]) -> None:
        weight = model.layers[0]._parameters["weight"].weight
        deadline = threading.Event()
        for _ in range(int(PATIENCE_S / 0.005)):
            if weight.holds == threads:
                return
            deadline.wait(0.005)

    store.before_read = until_all_wait
    outputs = run_in_threads([lambda: forward(model, x)] * threads)
    assert all(torch.equal(output, expected) for output in outputs)
    assert len(store.reads) == 1
    assert (residency.stats().loads, residency.stats().hits) == (1, threads - 1)


def test_an_error_in_one_thread_is_that_threads_alone() -> None:
    plain = Stack(2)
    model = pylomin.lazy_loading(copy.deepcopy(plain))
    good, bad = inputs(), inputs()[:, :-1]
    expected = forward(plain, good)

    def fail() -> None:
        for _ in range(20):
            with pytest.raises(RuntimeError):
                forward(model, bad)

    def work() -> None:
        for _ in range(20):
            assert torch.equal(forward(model, good), expected)

    assert run_in_threads([fail, work, fail, work]) == [None] * 4
    assert_nothing_held(model)


def test_a_read_that_fails_wakes_those_who_wait_for_it() -> None:
    """They try for themselves; none of them hangs."""
    x, expected, model, store = faulty_stack(1)
    weight = model.layers[0]._parameters["weight"].weight
    failed = threading.Event()

    def fail_once_all_wait(names: list[str]) -> None:
        if failed.is_set():
            return
        pause = threading.Event()
        for _ in range(int(PATIENCE_S / 0.005)):
            if weight.holds == 4:
                break
            pause.wait(0.005)
        failed.set()
        raise pylomin.StoreReadError("the disk is gone")

    store.before_read = fail_once_all_wait
    outcomes = run_in_threads([lambda: forward(model, x)] * 4)
    errors = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    assert 1 <= len(errors) <= 4
    assert all(isinstance(error, pylomin.StoreReadError) for error in errors)
    assert all(torch.equal(o, expected) for o in outcomes if isinstance(o, torch.Tensor))
    outcomes.clear()
    errors.clear()
    assert torch.equal(forward(model, x), expected)
    assert_nothing_held(model)


def test_writes_and_forwards_at_the_same_time() -> None:
    """A forward sees a bias before or after a write, whole."""
    model = nn.Linear(264, 264)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    pylomin.prefetch(pylomin.lazy_loading(model))
    x = inputs()

    def write() -> None:
        for value in range(1, 40):
            with torch.no_grad():
                model._parameters["bias"].fill_(float(value))

    def read() -> None:
        last = 0.0
        for _ in range(60):
            output = forward(model, x)
            value = float(output[0, 0])
            assert torch.equal(output, torch.full_like(output, value))
            assert value >= last
            last = value

    assert run_in_threads([write, read, read]) == [None] * 3
    assert torch.equal(forward(model, x), torch.full((2, 264), 39.0))
    assert_nothing_held(model)


def test_settings_change_while_threads_run() -> None:
    plain = Stack(3)
    model = pylomin.lazy_loading(copy.deepcopy(plain))
    residency, layer_bytes = only_residency(model), group_bytes(model)
    x = inputs()
    expected = forward(plain, x)

    def use() -> None:
        for _ in range(40):
            assert torch.equal(forward(model, x), expected)

    def change() -> None:
        for i in range(40):
            residency.set_depth(i % 3)
            residency.set_budget((None, 5 * layer_bytes, 20 * layer_bytes)[i % 3])
            residency.stats()

    assert run_in_threads([use, use, change]) == [None] * 3
    residency.set_depth(0)
    residency.set_budget(None)
    assert torch.equal(forward(model, x), expected)


def test_copies_made_while_threads_run() -> None:
    plain = Stack(2)
    model = pylomin.prefetch(pylomin.lazy_loading(copy.deepcopy(plain), memory_budget="2MiB"))
    x = inputs()
    expected = forward(plain, x)

    def use() -> None:
        for _ in range(30):
            assert torch.equal(forward(model, x), expected)

    def duplicate() -> None:
        for _ in range(15):
            assert torch.equal(forward(copy.deepcopy(model), x), expected)

    assert run_in_threads([use, duplicate, duplicate]) == [None] * 3


def test_lookups_in_a_table_by_several_threads() -> None:
    plain = nn.Embedding(500, 64)
    model = pylomin.lazy_loading(copy.deepcopy(plain), memory_budget=100_000)

    def look_up(seed: int) -> Callable[[], None]:
        def run() -> None:
            generator = torch.Generator().manual_seed(seed)
            for _ in range(50):
                tokens = torch.randint(500, (4, 8), generator=generator)
                assert torch.equal(forward(model, tokens), forward(plain, tokens))

        return run

    assert run_in_threads([look_up(seed) for seed in range(4)]) == [None] * 4
    assert_nothing_held(model)


def test_lookup_beside_a_write_keeps_dtype_and_values() -> None:
    """A lookup that is reading while the table is written gives old rows or new rows, in the model's dtype."""
    from .common import FaultyStore, Gate

    table = torch.arange(64.0).view(16, 4)
    store = FaultyStore({"weight": table.to(torch.bfloat16)})
    model = pylomin.load(lambda: nn.Embedding(16, 4), store, dtype=torch.float32)
    tokens = torch.tensor([3, 5])
    gate = Gate()
    store.before_read = lambda names: gate.wait()
    outputs: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: outputs.append(forward(model, tokens)), daemon=True)
    thread.start()
    gate.wait_until_reached()
    with torch.no_grad():
        model.weight.copy_(table + 100)
    gate.opened.set()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    (output,) = outputs
    assert output.dtype == torch.float32
    assert torch.equal(output, table[tokens]) or torch.equal(output, table[tokens] + 100)
    assert torch.equal(forward(model, tokens), table[tokens] + 100)
