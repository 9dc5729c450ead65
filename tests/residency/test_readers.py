"""Several threads that read what goes to a device."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

import pylomin
from pylomin.errors import PassError, StoreReadError
from pylomin.io.buffers import PAGE_BYTES
from pylomin.lazy.offload import residencies_of
from pylomin.residency import carrier as carrier_module
from pylomin.residency.readers import Readers, Step

from .fake_device import FAKE, FakeDevice, computing_on_the_host, installed, lazy, shuffled

WAIT_S = 30


def steps(count: int, done: list[int]) -> Iterator[Step]:
    for number in range(count):
        yield lambda number=number: done.append(number)  # type: ignore[misc]


def reading_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "pylomin-reader"}


@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_step_is_done_once(count: int) -> None:
    readers = Readers(count)
    for most in (0, 1, 2, 50):
        done: list[int] = []
        readers.run(steps(most, done), most, nullcontext)
        assert sorted(done) == list(range(most))


def test_steps_are_done_at_the_same_time() -> None:
    meeting = threading.Barrier(3, timeout=WAIT_S)
    Readers(3).run(iter([meeting.wait] * 6), 6, nullcontext)  # type: ignore[list-item]


def test_one_step_is_taken_at_a_time() -> None:
    taking = threading.Lock()

    def one_by_one() -> Iterator[Step]:
        for _ in range(200):
            assert taking.acquire(blocking=False)
            taking.release()
            yield lambda: None

    Readers(4).run(one_by_one(), 200, nullcontext)


@pytest.mark.parametrize("failing", [0, 1, 5])
def test_what_a_step_raises_is_raised_and_ends_the_rest(failing: int) -> None:
    readers, done = Readers(3), list[int]()

    def some() -> Iterator[Step]:
        for number in range(1_000_000):
            if number == failing:

                def fail() -> None:
                    raise StoreReadError("the disk is gone")

                yield fail
            yield lambda number=number: done.append(number)  # type: ignore[misc]

    with pytest.raises(StoreReadError, match="the disk is gone"):
        readers.run(some(), 1_000_000, nullcontext)
    count = len(done)
    assert count < 1_000_000
    readers.run(steps(3, done), 3, nullcontext)
    assert len(done) == count + 3


def test_nobody_waits_for_help_to_begin() -> None:
    """The only helper is busy until the other reading is done."""
    readers, busy, go_on, done = Readers(2), threading.Semaphore(0), threading.Event(), list[int]()

    def stay() -> None:
        busy.release()
        go_on.wait(WAIT_S)

    other = threading.Thread(target=lambda: readers.run(iter([stay, stay]), 2, nullcontext))
    other.start()
    assert busy.acquire(timeout=WAIT_S)
    assert busy.acquire(timeout=WAIT_S)
    readers.run(steps(5, done), 5, nullcontext)
    go_on.set()
    other.join(WAIT_S)
    assert not other.is_alive()
    assert done == [0, 1, 2, 3, 4]


def test_threads_end_with_their_readers() -> None:
    gc.collect()
    before = reading_threads()
    readers = Readers(4)
    assert reading_threads() == before, "none before there is something to read"
    readers.run(steps(10, []), 10, nullcontext)
    assert len(reading_threads() - before) == 3
    del readers
    gc.collect()
    assert not reading_threads() - before


def test_a_forked_child_reads_alone() -> None:
    readers = Readers(3)
    readers.run(steps(10, []), 10, nullcontext)
    child = os.fork()
    if child == 0:
        done: list[int] = []
        try:
            readers.run(steps(10, done), 10, nullcontext)
        finally:
            os._exit(0 if done == list(range(10)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# -- into the ring ----------------------------------------------------------------------------------------------------


WIDTHS = (64, 200, 31, 128, 257, 96)


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    sizes = [*zip(WIDTHS, WIDTHS[1:], strict=False), (WIDTHS[-1], WIDTHS[0])]
    return nn.Sequential(*[nn.Linear(*size) for size in sizes]).eval()


X = torch.randn(3, WIDTHS[0], generator=torch.Generator().manual_seed(1))
EXPECTED = layers()(X).detach()


def runs(model: nn.Module, times: int = 4) -> bool:
    with torch.no_grad():
        return all(torch.equal(model(X), EXPECTED) for _ in range(times))


@pytest.mark.parametrize("mode", ["buffered", "direct"])
@pytest.mark.parametrize("seed", range(4))
def test_the_same_bits(seed: int, mode: Any) -> None:
    with installed(computing_on_the_host(shuffled(seed))):
        model = pylomin.lazy_loading(layers(), device=FAKE, memory_budget="400KiB", reading_mode=mode)
        assert runs(pylomin.prefetch(model, readers=3), 6)


def test_memory_that_is_not_pinned_is_copied_by_several_too() -> None:
    with installed(computing_on_the_host(shuffled(3), pins=False)):
        with pytest.warns(RuntimeWarning, match="for weights could not be pinned"):
            model = pylomin.lazy_loading(layers(), device=FAKE, storage="cpu")
        pylomin.prefetch(model, readers=4)
        with pytest.warns(RuntimeWarning, match="for transfers could not be pinned"):
            assert runs(model)


def test_more_readers_than_slots_in_several_threads() -> None:
    equal: list[bool] = []
    with installed(computing_on_the_host(shuffled(5)), slots=2) as carrier:
        models = [pylomin.prefetch(pylomin.lazy_loading(layers(), device=FAKE), readers=4) for _ in range(2)]
        threads = [threading.Thread(target=lambda m=m: equal.append(runs(m))) for m in models * 2]  # type: ignore[misc]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert equal == [True] * 4
        assert carrier.ring_bytes == 4 * PAGE_BYTES
        del models, threads


def test_a_slot_is_claimed_for_each_read_in_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes first never waits for a slot that what comes later has."""
    claimed: list[tuple[str, int]] = []
    read = carrier_module.read_range

    def watched(file: Any, start: int, *args: Any, **kwargs: Any) -> int:
        claimed.append((file.path, start))
        return read(file, start, *args, **kwargs)

    monkeypatch.setattr(carrier_module, "read_range", watched)
    with installed(computing_on_the_host(lazy), slots=1):
        model = pylomin.lazy_loading(nn.Linear(100, 200).eval(), device=FAKE)
        residencies_of(model)[0].set_readers(4)  # and nothing is read ahead
        path = model.weight.weight.source.stored.file.path
        with torch.no_grad():
            model(torch.ones(1, 100))
    starts = [start for of, start in claimed if of == path]  # models of other tests may not be gone yet
    assert len(starts) > 5
    assert starts == sorted(starts)


def test_a_read_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    read, calls = carrier_module.read_range, list[int]()

    def failing(*args: Any, **kwargs: Any) -> int:
        calls.append(1)
        if len(calls) % 7 == 0:
            raise StoreReadError("the disk is gone")
        return read(*args, **kwargs)

    with installed(computing_on_the_host(shuffled(2))):
        model = pylomin.prefetch(pylomin.lazy_loading(layers(), device=FAKE), readers=3)
        monkeypatch.setattr(carrier_module, "read_range", failing)
        for _ in range(5):
            with pytest.raises(StoreReadError, match="the disk is gone"):
                runs(model, 20)
        monkeypatch.setattr(carrier_module, "read_range", read)
        assert runs(model)
        residencies_of(model)[0].set_depth(0)
        assert pylomin.stats(model).resident_bytes == 0


def test_readers_are_chosen_before_or_after_and_copied() -> None:
    model = pylomin.lazy_loading(pylomin.prefetch(layers(), readers=2))
    (residency,) = residencies_of(model)
    assert residency.readers.count == 2
    pylomin.prefetch(model)
    assert residency.readers.count == 2
    pylomin.prefetch(model, readers=1)
    assert residency.readers.count == 1
    assert residency.copy().readers.count == 1
    with pytest.raises(PassError, match=r"readers is 0; expected an int of at least 1\."):
        pylomin.prefetch(model, readers=0)


def test_a_device_of_its_own_for_each() -> None:
    first, second = computing_on_the_host(shuffled(0)), computing_on_the_host(shuffled(1))
    other = torch.device("cpu", 2)
    with installed(first) as carrier, installed(second, at=other) as other_carrier:
        models = [
            pylomin.prefetch(pylomin.lazy_loading(layers(), device=at, memory_budget="400KiB")) for at in (FAKE, other)
        ]
        for _ in range(3):
            assert all(runs(model, 1) for model in models)
        assert first.copied_bytes > 0
        assert second.copied_bytes > 0
        assert [pylomin.stats(model).pinned_bytes for model in models] == [carrier.ring_bytes, other_carrier.ring_bytes]
        del models


def test_one_model_on_two_devices() -> None:
    first, second = computing_on_the_host(shuffled(0)), computing_on_the_host(shuffled(1))
    other = torch.device("cpu", 2)
    with installed(first), installed(second, at=other):
        model = layers()
        pylomin.lazy_loading(model, target_modules=list(model)[:3], device=FAKE)
        pylomin.lazy_loading(model, target_modules=list(model)[3:], device=other)
        pylomin.prefetch(pylomin.set_memory_budget(model, "400KiB"))
        assert runs(model)
        assert first.copied_bytes > 0
        assert second.copied_bytes > 0
        del model


def test_urgent_copies_do_not_wait_for_those_that_are_read_ahead() -> None:
    def urgent_first(streams: list[str]) -> str | None:
        return next((stream for stream in ("urgent", "memory") if stream in streams), None)

    device = FakeDevice(urgent_first)
    with installed(device):
        model = pylomin.lazy_loading(layers(), device=FAKE, storage="cpu", memory_budget="4MiB")
        (residency,) = residencies_of(model)
        ahead, now = list(residency._weights.values())[:2]
        with residency.lock:
            room = residency.try_reserve_ahead([ahead], residency.places_of([ahead]))
        assert room is not None
        tensors = room.load()
        behind = len(device._queues["copy"])
        assert behind > 0
        with residency.hold([now]):
            (arrival,) = now.loaded.arrivals
            arrival.finish()
            assert len(device._queues["copy"]) == behind
        device.finish()
        del tensors, room, model, residency, ahead, now, arrival
