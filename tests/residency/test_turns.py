"""Whose turn it is: workers that run one at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from pylomin.residency.turns import Ended, Group, Turns, Worker
from tests.robustness.common import run_in_thread

from .common import groups

NUMEL = 1 << 17  # 512 KiB, enough to be read ahead


class Log:
    """What workers do, in order; and that one runs at a time."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self._running = threading.Lock()

    def worker(self, name: str, work: Callable[[], None]) -> Worker:
        def switched_in() -> None:
            assert self._running.acquire(blocking=False), "two at a time"
            self.events.append(f"+{name}")

        def switched_out() -> None:
            self._running.release()

        return Worker(work, switched_in=switched_in, switched_out=switched_out)


def test_those_run_first_that_can_use_what_is_there() -> None:
    residency, (a, b), store = groups(2, NUMEL)
    log, turns = Log(), Turns(10)
    residency.turns = turns

    def work(name: str) -> None:
        for group in (a, b):
            with residency.hold(group):
                log.events.append(f"{name}{group[0].name}")

    run_in_thread(lambda: turns.run(log.worker(name, lambda name=name: work(name)) for name in "xyz"))
    uses = [event for event in log.events if not event.startswith("+")]
    assert uses == ["x0", "y0", "z0", "x1", "y1", "z1"]
    assert len(store.reads) == 2
    assert residency.pool.in_use_bytes() == 0
    assert not residency._waiting
    assert not residency._holders


def test_the_group_is_loaded_that_most_wait_for() -> None:
    residency, (a, b), store = groups(2, NUMEL)
    turns, order = Turns(10), []
    residency.turns = turns

    def worker(name: str) -> Worker:
        def work() -> None:
            with residency.hold(a if name == "a" else b):
                order.append(name)

        return Worker(work)

    run_in_thread(lambda: turns.run(map(worker, "abab" + "b")))
    assert order == ["b", "b", "b", "a", "a"]
    assert len(store.reads) == 2


def test_no_more_begin_than_may() -> None:
    residency, (a,), store = groups(1, NUMEL)
    turns, begun = Turns(2), 0
    residency.turns = turns
    seen = []

    def work() -> None:
        nonlocal begun
        begun += 1
        with residency.hold(a):
            seen.append(begun)
        begun -= 1

    run_in_thread(lambda: turns.run(Worker(work) for _ in range(6)))
    assert max(seen) == 2
    assert len(seen) == 6
    assert len(store.reads) <= 6


def test_nobody() -> None:
    Turns(1).run([])


def test_ending_in_the_middle() -> None:
    residency, (a, b), _ = groups(2, NUMEL)
    turns, ended = Turns(10), []
    residency.turns = turns

    def worker(name: str) -> Worker:
        def work() -> None:
            try:
                with residency.hold(a):
                    if name == "2":
                        turns.end()
                with residency.hold(b):
                    raise AssertionError("it should have ended")
            except Ended:
                ended.append(name)

        return Worker(work)

    run_in_thread(lambda: turns.run(map(worker, "0123")))
    assert sorted(ended) == ["0", "1", "2", "3"]
    assert residency.pool.in_use_bytes() == 0
    assert not residency._holders


def test_a_worker_that_raises_lets_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    turns, done = Turns(10), []

    def fail() -> None:
        raise LookupError

    workers = [Worker(fail), Worker(lambda: done.append(1)), Worker(fail), Worker(lambda: done.append(2))]
    run_in_thread(lambda: turns.run(workers))
    assert done == [1, 2]


def test_other_threads_do_not_take_turns() -> None:
    residency, (a,), _ = groups(1, NUMEL)
    residency.turns = Turns(1)
    with residency.hold(a):
        assert a[0].tensor is not None
    assert residency.turns.here() is None


def test_what_is_needed_is_what_is_not_there() -> None:
    residency, (a, b), _ = groups(2, NUMEL)
    with residency.hold(a):
        need = Group(residency, [*a, *b])
        assert need.weights == b
        assert not need.is_there()
        assert need.places() is not None
        with residency.hold(b):
            assert need.is_there()
            assert need.places() is None
