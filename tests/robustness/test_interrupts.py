"""KeyboardInterrupt at any moment of a forward: nothing stays held, and the next forward is right."""

from __future__ import annotations

import ctypes
import gc
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import torch

import pylomin

from .common import (
    Stack,
    assert_nothing_held,
    faulty_stack,
    forward,
    group_bytes,
    inputs,
    only_residency,
    run_in_thread,
    run_script,
    settled,
    stack_pair,
    undisturbed,
)
from .interrupting import InterruptAt, places


def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    # An interrupt in a finalizer cannot be raised; Python reports it and goes on.
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)


def _model(depth: int, layers_in_budget: float | None, layers: int = 2) -> tuple[torch.Tensor, torch.Tensor, Stack]:
    x, _, model = stack_pair(layers)
    if depth:
        pylomin.prefetch(model, depth=depth)
    if layers_in_budget is not None:
        only_residency(model).set_budget(int(layers_in_budget * group_bytes(model)))
    expected = undisturbed(Stack(layers), x, only_residency(model).memory_budget)
    forward(model, x)
    forward(model, x)
    return x, expected, model


def _faults_after_interrupts(
    make: Callable[[], tuple[torch.Tensor, torch.Tensor, Stack]], *, restart: bool
) -> list[str]:
    x, expected, model = make()
    _get_ready(model, restart)
    faults: list[str] = []
    for count, (place, n) in enumerate(places(partial(forward, model, x))):
        _get_ready(model, restart)
        try:
            with _ends_in_time():
                _interrupted(InterruptAt(place, n), model, x)
                assert_nothing_held(model, resident_bytes=None)
                for _ in range(2):  # what the interrupt left in memory goes as memory is needed, or by being used again
                    assert torch.equal(forward(model, x), expected)
                assert_nothing_held(model, resident_bytes=_may_stay(model))
                if count % 5 == 4:
                    _assert_ledger_is_true(model)
        except Exception as error:
            faults.append(f"{place}, {n}: {(str(error) or repr(error)).splitlines()[0]}")
            if len(faults) == 5:
                break
            x, expected, model = make()
    return faults


def _get_ready(model: torch.nn.Module, restart: bool) -> None:
    residency = only_residency(model)
    if restart:  # a new thread, and nothing read ahead yet
        depth = residency.depth
        residency.set_depth(0)
        residency.set_depth(depth)
    assert settled(residency)


@contextmanager
def _ends_in_time() -> Iterator[None]:
    """A forward that hangs is stopped, and is a fault like any other."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError("it did not end")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 20)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _interrupted(interrupt: InterruptAt, model: torch.nn.Module, x: torch.Tensor) -> None:
    """A forward; where threading.Condition itself is stopped, a RuntimeError takes the interrupt's place."""
    try:
        with interrupt, torch.no_grad():
            model(x)
    except RuntimeError as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise


def _forwards(model: torch.nn.Module, x: torch.Tensor, count: int) -> None:
    with torch.no_grad():
        for _ in range(count):
            model(x)


def _may_stay(model: torch.nn.Module) -> int:
    """Residents, and what is read ahead."""
    residency = only_residency(model)
    return residency.depth * group_bytes(model) if residency.memory_budget is None else residency.memory_budget


def _assert_ledger_is_true(model: torch.nn.Module) -> None:
    """With everything evicted, the pool counts nothing."""
    residency = only_residency(model)
    budget, depth = residency.memory_budget, residency.depth
    residency.set_depth(0)
    residency.set_budget(1)
    assert residency.pool.in_use_bytes() == 0, "the ledger counts bytes that nobody uses"
    residency.pool.trim()
    assert residency.pool.free_bytes == 0, "the ledger counts free bytes that do not exist"
    assert residency._kept_bytes == 0, "bytes of residents that are gone"
    residency.set_budget(budget)
    residency.set_depth(depth)


@pytest.mark.parametrize(
    ("depth", "layers_in_budget", "layers", "restart"),
    [
        (1, None, 2, False),
        (1, None, 2, True),
        (0, 1, 2, False),
        (0, 2.2, 4, False),
        (1, 2.2, 4, False),
        (1, 2.2, 4, True),
        (1, 9, 2, False),
    ],
)
def test_at_any_moment(
    monkeypatch: pytest.MonkeyPatch, depth: int, layers_in_budget: float | None, layers: int, restart: bool
) -> None:
    _quiet(monkeypatch)
    assert _faults_after_interrupts(lambda: _model(depth, layers_in_budget, layers), restart=restart) == []


def test_at_any_moment_of_a_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight has the old value or the new one."""
    _quiet(monkeypatch)
    x, _, model = stack_pair(1)
    bias = model.layers[0].bias

    def write(value: float) -> None:
        with torch.no_grad():
            bias.fill_(value)

    before = 1.0
    for value, (place, n) in enumerate(places(partial(write, before), library=False), 2):
        with InterruptAt(place, n):
            write(float(value))
        assert_nothing_held(model, resident_bytes=None)
        found = bias.detach().clone()
        assert torch.equal(found, torch.full_like(found, float(found[0]))), place
        assert float(found[0]) in (float(value), before), place
        before = float(found[0])
        forward(model, x)
    assert_nothing_held(model)


def test_at_any_moment_of_a_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    _quiet(monkeypatch)
    plain = torch.nn.Embedding(100, 16)
    tokens = torch.tensor([3, 50, 51])
    expected = forward(plain, tokens)
    model = pylomin.lazy_loading(plain, memory_budget=2000)
    for place, n in places(partial(forward, model, tokens)):
        _interrupted(InterruptAt(place, n), model, tokens)
        assert_nothing_held(model)
        assert torch.equal(forward(model, tokens), expected), place


def test_at_any_moment_of_lazy_loading(monkeypatch: pytest.MonkeyPatch, scratch: Path) -> None:
    """The model works, offloaded as far as it came, and leaves no file when it is gone."""
    _quiet(monkeypatch)
    x = inputs(8)
    expected = forward(Stack(2, width=8), x)
    for place, n in places(lambda: pylomin.lazy_loading(Stack(2, width=8)), library=False):
        model = Stack(2, width=8)
        with InterruptAt(place, n):
            pylomin.lazy_loading(model)
        assert torch.equal(forward(model, x), expected), place
        with suppress(pylomin.PassError):  # all of it was offloaded already
            pylomin.lazy_loading(model)
        assert torch.equal(forward(model, x), expected), place
        pylomin.restore(model)
        assert type(model.layers[0]) is torch.nn.Linear, place
        assert torch.equal(forward(model, x), expected), place
        del model
        if "_remove" not in place and any(path.is_file() for path in scratch.rglob("*")):
            gc.collect()  # the interrupt went through a context manager, which makes a cycle
            assert not any(path.is_file() for path in scratch.rglob("*")), place


def test_at_any_moment_of_restore(monkeypatch: pytest.MonkeyPatch) -> None:
    _quiet(monkeypatch)
    x = inputs(8)
    expected = forward(Stack(2, width=8), x)
    offloaded = pylomin.lazy_loading(Stack(2, width=8))
    for place, n in places(lambda: pylomin.restore(offloaded), library=False):
        model = pylomin.lazy_loading(Stack(2, width=8))
        with InterruptAt(place, n):
            pylomin.restore(model)
        assert torch.equal(forward(model, x), expected), place
        with suppress(pylomin.PassError):  # it was restored already
            pylomin.restore(model)
        assert type(model.layers[0]) is torch.nn.Linear, place
        assert torch.equal(forward(model, x), expected), place


def test_at_random_moments_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that another thread sends arrives between any two instructions, as a signal does."""
    _quiet(monkeypatch)
    x, expected, model = _model(1, 3.3)
    chance = random.Random(0)
    stopped = 0
    for _ in range(300):
        running = threading.Event()

        def use(running: threading.Event = running) -> bool:
            try:
                with torch.no_grad():
                    running.set()
                    for _ in range(50):
                        model(x)
            except KeyboardInterrupt:
                return True
            return False

        outcome: list[bool] = []
        thread = threading.Thread(target=lambda use=use, outcome=outcome: outcome.append(use()), daemon=True)
        thread.start()
        assert running.wait(30)
        for _ in range(chance.randrange(2000)):
            pass
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident or 0), ctypes.py_object(KeyboardInterrupt)
        )
        thread.join(30)
        assert not thread.is_alive()
        stopped += outcome == [True]
    assert stopped > 100
    assert_nothing_held(model, resident_bytes=None)
    for _ in range(2):
        assert torch.equal(run_in_thread(lambda: forward(model, x)), expected)
    assert_nothing_held(model, resident_bytes=_may_stay(model))
    run_in_thread(lambda: _assert_ledger_is_true(model))


def test_signals_at_random_times(monkeypatch: pytest.MonkeyPatch) -> None:
    _quiet(monkeypatch)
    x, expected, model = _model(1, None)
    chance = random.Random(1)
    interrupted = 0

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(300):
            try:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-5, 5e-3))
                with torch.no_grad():
                    for _ in range(20):
                        model(x)
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 200
    assert_nothing_held(model, resident_bytes=None)
    for _ in range(2):
        assert torch.equal(run_in_thread(lambda: forward(model, x)), expected)
    assert_nothing_held(model, resident_bytes=_may_stay(model))
    run_in_thread(lambda: _assert_ledger_is_true(model))


def test_while_a_forward_waits_for_a_background_read() -> None:
    """The wait can be interrupted; the read goes on, and its result is used."""
    x, expected, model, store = faulty_stack(3)
    pylomin.prefetch(model)
    forward(model, x)
    forward(model, x)
    residency = only_residency(model)
    interrupted = threading.Event()
    main = threading.main_thread().ident or 0

    def before_read(names: list[str]) -> None:
        if "layers.1.weight" in names and not interrupted.is_set():
            if threading.get_ident() == main:
                return
            signal.pthread_kill(main, signal.SIGINT)
            assert interrupted.wait(30)

    store.before_read = before_read
    with pytest.raises(KeyboardInterrupt):
        _forwards(model, x, 10_000)
    assert residency is only_residency(model)
    interrupted.set()
    store.before_read = lambda names: None
    assert_nothing_held(model, resident_bytes=2 * group_bytes(model))
    assert torch.equal(run_in_thread(lambda: forward(model, x)), expected)


def test_ctrl_c_ends_the_process() -> None:
    script = """
    import os, signal, sys, threading, torch, pylomin
    from torch import nn
    model = nn.Sequential(*[nn.Linear(264, 264) for _ in range(4)])
    pylomin.prefetch(pylomin.lazy_loading(model, memory_budget="2MiB"))
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with torch.no_grad():
        while True:
            model(torch.ones(1, 264))
    """
    done = run_script(script)
    assert done.returncode in (-signal.SIGINT, 130)
    assert done.stderr.rstrip().endswith("KeyboardInterrupt")


def test_interrupted_inputs_do_not_matter() -> None:
    """An interrupt inside a module's own code, while it holds its weights."""

    class Interrupted(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = super().forward(x)
            if x[0, 0] > 0:
                raise KeyboardInterrupt
            return out

    model = pylomin.lazy_loading(Interrupted(264, 264))
    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(1, 264))
    assert_nothing_held(model)
    assert forward(model, -inputs().abs()).shape == (2, 264)
