"""A device without hardware: streams whose work is done later, in an order that a test chooses.

It has values, for its memory is the host's: ``torch.device("cpu", 1)`` stands for it, which torch takes for the CPU but
which is not equal to it. Work that was begun runs when something waits for it, or when the schedule says so. What is on
the device is known by address alone, as on a GPU: pending work keeps nothing alive.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import random
import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from pylomin.residency import carrier as carriers
from pylomin.residency import device as devices
from pylomin.residency import pinned
from pylomin.residency.carrier import Carrier
from pylomin.residency.device import Bytes, Event
from pylomin.residency.loading import Room

FAKE = torch.device("cpu", 1)
OWN_STREAMS = ("copy", "urgent", "memory")  # others are those that are computed in
POISON = 0xFF  # NaN, in every floating-point dtype

Schedule = Callable[[list[str]], str | None]
"""Of the streams that can go on, the one that does; None: none does now."""


def lazy(streams: list[str]) -> str | None:
    """Nothing runs before it must."""
    return None


def copies_first(streams: list[str]) -> str | None:
    """Copies run at once, computations when they must."""
    return next((stream for stream in streams if stream in OWN_STREAMS), None)


def computes_first(streams: list[str]) -> str | None:
    others = [stream for stream in streams if stream not in OWN_STREAMS]
    return others[0] if others else None


def shuffled(seed: int) -> Schedule:
    chooser = random.Random(seed)
    return lambda streams: chooser.choice([*streams, None])


@dataclass(eq=False)
class FakeEvent:
    device: FakeDevice
    done: bool = False

    def query(self) -> bool:
        self.device.go_on()
        return self.done

    def synchronize(self) -> None:
        self.device.run_until(self)


@dataclass(eq=False)
class FakeDevice:
    """See :class:`pylomin.residency.device.Device`."""

    schedule: Schedule = lazy
    pins: bool = True
    capacity_bytes: int = 1 << 40
    is_eager: bool = False  # the host computes: who waits in a stream that is computed in waits on the host
    copy_stream: Hashable = "copy"
    urgent_stream: Hashable = "urgent"
    memory_stream: Hashable = "memory"
    capturing: bool = False
    failures: list[str] = field(default_factory=list)
    pinned: dict[int, int] = field(default_factory=dict)
    copied_bytes: int = 0
    host_waits: int = 0

    def __post_init__(self) -> None:
        self._queues: dict[str, deque[FakeEvent | Callable[[], object]]] = {
            stream: deque() for stream in (*OWN_STREAMS, "compute")
        }
        self._current = threading.local()
        self._lock = threading.RLock()
        self._free: list[mmap.mmap] = []
        self._used_bytes = 0
        self._pending_sources: list[tuple[int, int]] = []

    # -- what a device does -----------------------------------------------------------------------------------------

    def current_stream(self) -> Hashable:
        return getattr(self._current, "stream", "compute")

    @contextmanager
    def on(self, stream: Hashable) -> Iterator[None]:
        before, self._current.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self._current.stream = before

    def record(self, stream: Hashable) -> Event:
        event = FakeEvent(self)
        if self.is_eager and stream not in OWN_STREAMS:
            event.done = True
        else:
            self.begin(lambda: setattr(event, "done", True), stream)
        return event

    def wait(self, stream: Hashable, event: Event) -> None:
        assert isinstance(event, FakeEvent)
        if self.is_eager and stream not in OWN_STREAMS:
            self.run_until(event)
            return
        with self._lock:
            self._queue(stream).append(event)
        self.go_on()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert target.dtype == source.dtype == torch.uint8
        to, at, nbytes = target.data_ptr(), source.data_ptr(), source.nbytes
        assert target.nbytes == nbytes
        pending = (at, at + nbytes)
        with self._lock:
            self._pending_sources.append(pending)

        def run() -> None:
            if pending in self._pending_sources:
                self._pending_sources.remove(pending)
                ctypes.memmove(to, at, nbytes)

        self.copied_bytes += nbytes
        self.begin(run, self.current_stream())

    def allocate(self, nbytes: int) -> torch.Tensor:
        with self._lock:
            fitting = [memory for memory in self._free if nbytes <= len(memory) <= 2 * nbytes + mmap.PAGESIZE]
            if fitting:
                memory = fitting[0]
                self._free.remove(memory)
            else:
                memory = mmap.mmap(-1, nbytes)
            if self._used_bytes + len(memory) > self.capacity_bytes:
                self._free.append(memory)
                raise torch.cuda.OutOfMemoryError("the fake device is full")
            self._used_bytes += len(memory)
        part = (ctypes.c_char * nbytes).from_buffer(memory)
        weakref.finalize(part, self._freed, memory)
        address = ctypes.addressof(part)
        # Whoever has it next may write to it in the order of this stream.
        self.begin(partial(ctypes.memset, address, POISON, nbytes), "memory")
        return torch.frombuffer(part, dtype=torch.uint8)

    def tensor(self, of: Bytes) -> torch.Tensor:
        part = (ctypes.c_char * of.nbytes).from_address(of.base.data_ptr() + of.offset_bytes)
        part.of = of  # type: ignore[attr-defined]
        return torch.frombuffer(part, dtype=torch.uint8)

    def pin(self, address: int, nbytes: int) -> str | None:
        if not self.pins:
            return "the fake device does not pin"
        assert address % mmap.PAGESIZE == 0
        self.pinned[address] = nbytes
        return None

    def unpin(self, address: int) -> None:
        first, stop = address, address + self.pinned.pop(address)
        for begin, end in list(self._pending_sources):
            if begin < stop and first < end:
                self.failures.append("host memory is gone before the copies from it have ended")
                self._pending_sources.remove((begin, end))  # it would read what is not there

    def free_bytes(self) -> int:
        return self.capacity_bytes - self._used_bytes

    def is_capturing(self) -> bool:
        return self.capturing

    def finish(self) -> None:
        while self._runnable():
            self._step(self._runnable()[0])

    # -- for tests --------------------------------------------------------------------------------------------------

    def begin(self, work: Callable[[], object], stream: Hashable | None = None) -> None:
        """Work that runs later, in the current stream."""
        with self._lock:
            self._queue(self.current_stream() if stream is None else stream).append(work)
        self.go_on()

    def expect(self, tensor: torch.Tensor, expected: torch.Tensor, what: str) -> None:
        """Begin a computation with ``tensor``, which is wrong unless it then holds ``expected``."""
        address, wanted = tensor.data_ptr(), expected.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

        def run() -> None:
            if ctypes.string_at(address, len(wanted)) != wanted:
                self.failures.append(f"{what} has other values when it is computed with")

        self.begin(run)

    def go_on(self) -> None:
        while True:
            with self._lock:
                runnable = self._runnable()
                stream = self.schedule(runnable) if runnable else None
                if stream is None:
                    return
                self._step(stream)

    def run_until(self, event: FakeEvent) -> None:
        """Only what is needed for it, as if all else were slow."""
        with self._lock:
            if not event.done:
                self.host_waits += 1
            while not event.done:
                stream = self._needed_for(event)
                assert stream is not None, "a wait that cannot end"
                self._step(stream)

    def drain(self, stream: Hashable) -> None:
        """All that was begun in ``stream`` ends now."""
        event = self.record(stream)
        assert isinstance(event, FakeEvent)
        self.run_until(event)

    def _needed_for(self, event: FakeEvent) -> str | None:
        runnable = self._runnable()
        chosen = self.schedule(runnable) if runnable else None
        # The stream that has the event may be the one that is stuck behind another.
        return chosen or (runnable[0] if runnable else None)

    def _queue(self, stream: Hashable) -> deque[FakeEvent | Callable[[], object]]:
        assert isinstance(stream, str)
        return self._queues.setdefault(stream, deque())

    def _runnable(self) -> list[str]:
        return [name for name, queue in self._queues.items() if queue and not _blocks(queue[0])]

    def _step(self, stream: str) -> None:
        work = self._queues[stream].popleft()
        if not isinstance(work, FakeEvent):
            work()

    def _freed(self, memory: mmap.mmap) -> None:
        with self._lock:
            self._used_bytes -= len(memory)
            self._free.append(memory)


def _blocks(work: FakeEvent | Callable[[], object]) -> bool:
    return isinstance(work, FakeEvent) and not work.done


def computing_on_the_host(schedule: Schedule = lazy, **settings: Any) -> FakeDevice:
    """For whole models, whose operations run at once: they wait for what they need, and copies for nothing else."""
    return FakeDevice(schedule, is_eager=True, **settings)


@contextmanager
def installed(
    device: FakeDevice, *, at: torch.device = FAKE, slot_bytes: int = 2 * mmap.PAGESIZE, slots: int = 2
) -> Iterator[Carrier]:
    """``device`` is what ``at`` stands for, with a small ring; nothing of it is left afterwards."""

    def after_copies(method: Callable[..., Any]) -> Callable[..., Any]:
        def run(room: Room, tensors: list[torch.Tensor]) -> Any:
            # Converting and decoding run at once, as all operations here do, but in the order of their stream.
            device.drain(device.current_stream())
            device.drain(device.memory_stream)
            return method(room, tensors)

        return run

    devices.provide(at, lambda _: device)
    carrier = carriers._carriers[at] = Carrier(device, slot_bytes=slot_bytes, slots=slots)
    try:
        with (
            patch.object(Room, "_convert", after_copies(Room._convert)),
            patch.object(Room, "_decode", after_copies(Room._decode)),
        ):
            yield carrier
        gc.collect()
        device.finish()
        assert device.failures == []
    finally:
        pinned._said.clear()
        devices.provide(at, None)
        carriers._carriers.pop(at, None)
