"""A forked process uses the model, and leaves the parent's files, locks and threads alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import pylomin
from tests.forks import CHILD_S, in_child

from .common import (
    Stack,
    assert_nothing_held,
    background_gate,
    faulty_stack,
    forward,
    group_bytes,
    inputs,
    is_right,
    only_residency,
    stack_pair,
    undisturbed,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def scratch_files(scratch: Path) -> list[str]:
    return sorted(str(path.relative_to(scratch)) for path in scratch.rglob("*") if path.is_file())


@pytest.mark.parametrize(("depth", "budget"), [(0, None), (1, None), (0, "500KiB"), (1, "2MiB")])
def test_forward_in_parent_and_child(scratch: Path, depth: int, budget: str | None) -> None:
    x, expected, model = stack_pair(3, memory_budget=budget)
    if depth:
        pylomin.prefetch(model, depth=depth)
    forward(model, x)
    files = scratch_files(scratch)

    def use() -> bool:
        return all(is_right(model, forward(model, x), expected) for _ in range(3))

    assert in_child(use)
    assert use()
    assert in_child(use)
    assert scratch_files(scratch) == files
    assert use()


def test_writes_in_the_child_stay_there(scratch: Path) -> None:
    x, expected, model = stack_pair(2)
    with torch.no_grad():
        model.layers[0].bias.add_(1)
    changed = forward(model, x)
    assert not torch.equal(changed, expected)
    files = {name: (scratch / name).read_bytes() for name in scratch_files(scratch)}

    def write() -> tuple[bool, bool]:
        before = torch.equal(forward(model, x), changed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        return before, bool((forward(model, x) == 0).all())

    assert in_child(write) == (True, True)
    assert {name: (scratch / name).read_bytes() for name in files} == files
    assert torch.equal(forward(model, x), changed)


def test_writes_in_the_parent_stay_there() -> None:
    x, expected, model = stack_pair(2)
    with torch.no_grad():
        model.layers[0].bias.add_(1)
    changed = forward(model, x)
    reading, writing = os.pipe()

    pid_reading, pid_writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(CHILD_S)
        try:
            os.close(writing)
            os.close(pid_reading)
            os.read(reading, 1)
            os.write(pid_writing, b"1" if torch.equal(forward(model, x), changed) else b"0")
        finally:
            os._exit(0)
    for round_ in range(20):
        with torch.no_grad():
            model.layers[0].bias.fill_(float(round_))
            model.layers[1].bias.fill_(float(round_))
    os.close(writing)
    os.close(pid_writing)
    answer = os.read(pid_reading, 1)
    os.waitpid(pid, 0)
    os.close(reading)
    os.close(pid_reading)
    assert answer == b"1"
    assert float(model.layers[0].bias.detach()[0]) == 19.0
    assert not torch.equal(forward(model, x), expected)


def test_the_child_does_not_remove_the_parents_files(scratch: Path) -> None:
    x, expected, model = stack_pair(2)
    with torch.no_grad():
        model.layers[0].bias.add_(0)
    files = scratch_files(scratch)

    def drop() -> None:
        nonlocal model
        model = None  # type: ignore[assignment]

    in_child(drop)
    assert scratch_files(scratch) == files
    assert torch.equal(forward(model, x), expected)


@pytest.mark.parametrize("layers_in_budget", [None, 2])
def test_fork_while_a_background_read_runs(layers_in_budget: int | None) -> None:
    """The child has no such thread, and must not wait for it, nor count its memory."""
    x, expected, model, store = faulty_stack(4)
    if layers_in_budget is not None:
        only_residency(model).set_budget(layers_in_budget * group_bytes(model))
    pylomin.prefetch(model)
    forward(model, x)
    forward(model, x)
    only_residency(model).set_depth(0)
    gate = background_gate(store, "layers.1.weight")
    only_residency(model).set_depth(1)
    outputs: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: outputs.append(forward(model, x)), daemon=True)
    forked: list[Any] = []
    after_first = model.layers[0].register_forward_hook(lambda *_: gate.wait_until_reached())

    def use() -> bool:
        after_first.remove()
        gate.opened.set()
        return all(torch.equal(forward(model, x), expected) for _ in range(2))

    thread.start()
    gate.wait_until_reached()
    try:
        forked.append(in_child(use))
    finally:
        gate.opened.set()
        thread.join(30)
    assert forked == [True]
    assert not thread.is_alive()
    assert torch.equal(outputs[0], expected)
    after_first.remove()
    assert torch.equal(forward(model, x), expected)


@pytest.mark.parametrize("layers_in_budget", [None, 1, 2])
def test_fork_from_another_thread_while_a_forward_holds(layers_in_budget: int | None) -> None:
    """The thread that holds a layer does not exist in the child, so nothing may wait for it there."""
    x, _, model = stack_pair(3)
    if layers_in_budget is not None:
        only_residency(model).set_budget(layers_in_budget * group_bytes(model))
    expected = undisturbed(Stack(3), x, only_residency(model).memory_budget)
    inside, go_on = threading.Event(), threading.Event()
    original = nn.functional.linear
    main = threading.current_thread()

    def use() -> bool:
        return all(torch.equal(forward(model, x), expected) for _ in range(2))

    def stopping_linear(*arguments: Any) -> torch.Tensor:
        if threading.current_thread() is not main and not inside.is_set():
            inside.set()
            assert go_on.wait(30)
        return original(*arguments)

    nn.functional.linear = stopping_linear
    outputs: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: outputs.append(forward(model, x)), daemon=True)
    try:
        thread.start()
        assert inside.wait(30)
        outcome = in_child(use)
    finally:
        nn.functional.linear = original
        go_on.set()
        thread.join(30)
    assert outcome
    assert torch.equal(outputs[0], expected)
    assert use()


@pytest.mark.parametrize("layers_in_budget", [None, 1, 2])
def test_fork_inside_a_forward(layers_in_budget: int | None) -> None:
    """The thread that forks goes on in both processes, with what it holds."""
    x, _, model = stack_pair(3)
    if layers_in_budget is not None:
        only_residency(model).set_budget(layers_in_budget * group_bytes(model))
    expected = undisturbed(Stack(3), x, only_residency(model).memory_budget)
    residency = only_residency(model)
    weight = model.layers[0]._parameters["weight"].weight

    def in_the_middle() -> tuple[bool, bool]:
        with residency.hold([weight]):
            holds = in_child(lambda: weight.holds)
        assert holds == 1
        return torch.equal(forward(model, x), expected), torch.equal(forward(model, x), expected)

    assert in_the_middle() == (True, True)

    results: list[bool] = []

    def forked_forward(module: nn.Module, arguments: Any, output: torch.Tensor) -> None:
        handle.remove()
        results.append(in_child(lambda: torch.equal(forward(model, x), expected)))

    handle = model.layers[1].register_forward_hook(forked_forward)
    assert torch.equal(forward(model, x), expected)
    assert results == [True]
    assert_nothing_held(model, resident_bytes=(layers_in_budget or 0) * group_bytes(model))


def test_fork_while_threads_work() -> None:
    """At whatever moment a child is made, it can use the model."""
    plain = Stack(3)
    x = inputs()
    expected = forward(plain, x)
    model = pylomin.prefetch(pylomin.lazy_loading(plain), depth=1)
    stop = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        while not stop.is_set():
            try:
                assert torch.equal(forward(model, x), expected)
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(15):
            assert in_child(lambda: torch.equal(forward(model, x), expected))
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert failures == []
    assert not any(thread.is_alive() for thread in threads)


def _forward_in_process(model: nn.Module, x: torch.Tensor, queue: Any) -> None:
    queue.put(forward(model, x).tolist())


def test_multiprocessing(scratch: Path) -> None:
    x, expected, model = stack_pair(2)
    pylomin.prefetch(model)
    forward(model, x)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_forward_in_process, args=(model, x, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    for _ in processes:
        assert queue.get(timeout=30) == expected.tolist()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    queue.close()
    queue.join_thread()
    assert scratch_files(scratch)
    assert torch.equal(forward(model, x), expected)


def _write_in_process(model: nn.Module) -> None:
    with torch.no_grad():
        model._parameters["bias"].zero_()
    assert (forward(model, torch.zeros(1, 264)) == 0).all()


def test_a_process_that_writes_removes_its_own_scratch(scratch: Path) -> None:
    """It ends by os._exit, where no exit handler of the interpreter runs."""
    model = pylomin.lazy_loading(nn.Linear(264, 264))
    files = scratch_files(scratch)
    process = multiprocessing.get_context("fork").Process(target=_write_in_process, args=(model,))
    process.start()
    process.join(30)
    assert process.exitcode == 0
    assert scratch_files(scratch) == files


class Squares(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((264,), float(index * index))


@pytest.mark.parametrize("budget", [None, "1MiB"])
def test_a_data_loader_beside_an_offloaded_model(scratch: Path, budget: str | None) -> None:
    x, expected, model = stack_pair(2, memory_budget=budget)
    pylomin.prefetch(model)
    forward(model, x)
    batches = 0
    for _ in range(2):
        for batch in DataLoader(Squares(), batch_size=4, num_workers=2):
            assert forward(model, batch).shape == (4, 264)
            batches += 1
    assert batches == 6
    assert torch.equal(forward(model, x), expected)
    assert scratch_files(scratch)


def test_a_child_that_ends_normally(scratch: Path) -> None:
    """Exit handlers run there too: they remove nothing of the parent's and wait for nobody."""
    from .common import run_script

    script = """
    import os, sys, pathlib, torch, pylomin
    from torch import nn
    torch.set_num_threads(1)
    model = nn.Sequential(*[nn.Linear(264, 264) for _ in range(3)])
    x = torch.ones(1, 264)
    with torch.no_grad():
        expected = model(x)
        pylomin.prefetch(pylomin.lazy_loading(model))
        model(x)
        model(x)
        pid = os.fork()
        if pid == 0:
            model[0].bias.add_(1)
            model(x)
            sys.exit(3)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 3, status
        assert torch.equal(model(x), expected)
        (left,) = pathlib.Path(os.environ["TMPDIR"]).iterdir()
        print("right")
    """
    done = run_script(script)
    assert (done.stdout, done.stderr, done.returncode) == ("right\n", "", 0)
    assert list(scratch.iterdir()) == []
