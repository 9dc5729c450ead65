"""The order of copies and computations on a device, for every schedule that its streams allow.

A slot of the ring is never overwritten before its own copies have ended; weights are never computed with before they
have come; their memory is never written to while something computes with them. Each of these is taken away once, to see
that these tests would notice.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pylomin.errors import StoreReadError
from pylomin.io.buffers import PAGE_BYTES
from pylomin.residency import carrier as carrier_module
from pylomin.residency import device as device_module
from pylomin.residency import pinned
from pylomin.residency.carrier import Carrier
from pylomin.residency.device_memory import Arrival, DeviceMemory
from pylomin.residency.pinned import PinnedMemory
from pylomin.residency.residency import Residency
from pylomin.residency.ring import Ring, Slot
from pylomin.residency.weight import Source, Weight
from pylomin.store.memory import MemoryStore

from .common import CountingStore, layout, value
from .fake_device import FAKE, FakeDevice, Schedule, computes_first, copies_first, lazy, shuffled

SLOT_BYTES = 2 * PAGE_BYTES
SIZES = (64, 3_000, 9_000, 20_000, 5_000, 17_000)  # float32 elements of each group: from less than a slot to many
NUMELS = len(SIZES)


class Streamed:
    """Groups of one weight each, on a fake device."""

    def __init__(
        self, device: FakeDevice, *, budget: int | None = None, in_memory: bool = False, depth: int = 0
    ) -> None:
        device_module.provide(FAKE, lambda _: device)
        self.device = device
        self.carrier = carrier_module._carriers[FAKE] = Carrier(device, slot_bytes=SLOT_BYTES, slots=2)
        generator = torch.Generator().manual_seed(0)
        self.values = [torch.randn(numel, generator=generator) for numel in SIZES]
        self.residency = Residency(budget)
        if in_memory:
            chunk = PinnedMemory(device, sum(tensor.nbytes for tensor in self.values), what="for a test")
            position, tensors = 0, {}
            for i, tensor in enumerate(self.values):
                place = chunk.bytes(position, tensor.nbytes).view(torch.float32)
                tensors[str(i)] = place.copy_(tensor)
                position += tensor.nbytes
            store: MemoryStore | CountingStore = MemoryStore(tensors)
        else:
            store = CountingStore({str(i): tensor for i, tensor in enumerate(self.values)})
        self.store = store
        self.groups = []
        for i, tensor in enumerate(self.values):
            stored = layout(torch.float32, tensor.numel())
            source = Source(store, str(i), stored)
            self.groups.append([Weight(str(i), source, self.residency, (replace(stored, device=FAKE),))])
        if depth:
            self.residency.set_depth(depth)

    def use(self, i: int) -> None:
        """Compute with a group."""
        with self.residency.hold(self.groups[i]):
            self.device.expect(value(self.groups[i][0]), self.values[i], f"group {i}")

    def use_rows(self, i: int, runs: Sequence[tuple[int, int]]) -> None:
        rows = self.residency.load_runs(self.groups[i][0], runs)
        self.device.expect(rows, torch.cat([self.values[i][first:last] for first, last in runs]), f"rows of {i}")

    def finish(self) -> list[str]:
        """All that was begun ends; what went wrong."""
        self.device.finish()
        return self.device.failures


@pytest.fixture(autouse=True)
def _no_device_afterwards() -> Iterator[None]:
    yield
    gc.collect()
    pinned._said.clear()
    device_module.provide(FAKE, None)
    carrier_module._carriers.pop(FAKE, None)


LARGEST = max(SIZES) * 4
uses = st.lists(st.integers(0, NUMELS - 1), min_size=1, max_size=30)
budgets = st.sampled_from([None, LARGEST + 4 * PAGE_BYTES, 2 * LARGEST + 4 * PAGE_BYTES, 10 * LARGEST])


@settings(deadline=None, max_examples=150)
@given(uses=uses, budget=budgets, seed=st.integers(0, 2**32), in_memory=st.booleans(), depth=st.integers(0, 2))
def test_what_is_computed_with_is_there(
    uses: list[int], budget: int | None, seed: int, in_memory: bool, depth: int
) -> None:
    # From a store, reads ahead come from a thread of their own, which no seed repeats: another test has those.
    streamed = Streamed(FakeDevice(shuffled(seed)), budget=budget, in_memory=in_memory, depth=depth if in_memory else 0)
    for i in uses + uses:
        streamed.use(i)
    assert streamed.finish() == []
    if budget is not None:
        assert streamed.residency.pool.peak_bytes <= budget


@settings(deadline=None, max_examples=100)
@given(
    runs=st.lists(st.tuples(st.integers(0, 19_000), st.integers(1, 900)), min_size=1, max_size=20),
    seed=st.integers(0, 2**32),
    in_memory=st.booleans(),
)
def test_rows_are_there(runs: list[tuple[int, int]], seed: int, in_memory: bool) -> None:
    streamed = Streamed(FakeDevice(shuffled(seed)), in_memory=in_memory)
    wanted = [(first, first + count) for first, count in runs]
    streamed.use_rows(3, wanted)
    streamed.use(3)
    streamed.use_rows(3, wanted[::-1])
    assert streamed.finish() == []
    rows_bytes = 4 * sum(count for _, count in runs)
    assert streamed.device.copied_bytes == 2 * rows_bytes + streamed.values[3].nbytes  # those rows, and no others


@pytest.mark.parametrize("seed", range(10))
def test_read_ahead_by_a_thread(seed: int) -> None:
    streamed = Streamed(FakeDevice(shuffled(seed)), budget=2 * LARGEST + 4 * PAGE_BYTES, depth=2)
    for i in list(range(NUMELS)) * 5:
        streamed.use(i)
    streamed.residency.set_depth(0)
    assert streamed.finish() == []


def test_the_host_waits_for_nothing_but_slots() -> None:
    streamed = Streamed(FakeDevice(lazy), budget=LARGEST + 4 * PAGE_BYTES, in_memory=True)
    for i in list(range(NUMELS)) * 3:
        streamed.use(i)
    assert streamed.device.host_waits == 0
    assert streamed.finish() == []


def test_streams_of_users_are_known() -> None:
    streamed = Streamed(FakeDevice(copies_first), budget=LARGEST + 4 * PAGE_BYTES, in_memory=True)
    for turn, i in enumerate(list(range(NUMELS)) * 3):
        with streamed.device.on(f"stream {turn % 3}"):
            streamed.use(i)
    assert streamed.finish() == []


def test_a_view_that_outlives_its_use_keeps_its_bytes() -> None:
    streamed = Streamed(FakeDevice(copies_first))
    with streamed.residency.hold(streamed.groups[2]):
        view = value(streamed.groups[2][0])[10:20]
    for i in range(NUMELS):
        streamed.use(i)
    streamed.device.expect(view, streamed.values[2][10:20], "a view")
    assert streamed.finish() == []


def test_a_read_that_fails_gives_its_slot_back() -> None:
    streamed = Streamed(FakeDevice(lazy))
    assert isinstance(streamed.store, CountingStore)

    def fail() -> None:
        raise StoreReadError("the disk is gone")

    for _ in range(5):  # more often than there are slots
        streamed.store.before_read = fail
        with pytest.raises(StoreReadError, match="the disk is gone"):
            streamed.use(3)
        streamed.store.before_read = lambda: None
    streamed.use(3)
    assert streamed.finish() == []
    assert streamed.residency.pool.in_use_bytes() == 0


def test_the_ring_is_of_a_fixed_size_and_goes_with_its_users() -> None:
    streamed = Streamed(FakeDevice(lazy))
    device = streamed.device
    assert streamed.residency.stats().pinned_bytes == 0
    for i in range(NUMELS):
        streamed.use(i)
        assert streamed.residency.stats().pinned_bytes == 2 * SLOT_BYTES == sum(device.pinned.values())
    del streamed
    gc.collect()
    assert device.pinned == {}
    device.finish()
    assert device.failures == []


def test_what_cannot_be_pinned_is_copied_all_the_same() -> None:
    with pytest.warns(RuntimeWarning, match="could not be pinned"):
        streamed = Streamed(FakeDevice(shuffled(1), pins=False), in_memory=True)
    with pytest.warns(RuntimeWarning, match="could not be pinned"):  # the ring, too
        streamed.use(0)
    for i in range(NUMELS):
        streamed.use(i)  # and that was said once
    assert streamed.finish() == []


# -- wrong orders are noticed -----------------------------------------------------------------------------------------


def _nothing(*args: object, **kwargs: object) -> None:
    pass


def _release_without_event(slot: Slot) -> None:
    free, slot._free = slot._free, None
    if free is not None:
        free.put(Slot(free, slot._device, slot.offset_bytes, None))


def _release_after_other_copies(slot: Slot) -> None:
    free, slot._free = slot._free, None
    if free is not None:
        free.put(Slot(free, slot._device, slot.offset_bytes, slot._device.record(slot._device.copy_stream)))


def _keep_for_other_copies(carrier: Carrier, source: torch.Tensor) -> None:
    carrier._sources.append((carrier.device.record(carrier.device.copy_stream), [source]))


def _given_up_without_waiting(memory: DeviceMemory) -> None:
    pass


def _no_fences(memory: DeviceMemory, first: int, stop: int) -> list[object]:
    return []


WRONG: dict[str, tuple[type, str, Callable[..., object]]] = {
    "slots are overwritten before their event": (Ring, "_wait", _nothing),
    "slots have no event": (Slot, "release", _release_without_event),
    "slots have the event of another stream": (Slot, "release", _release_after_other_copies),
    "host memory is kept for another stream": (Carrier, "_keep", _keep_for_other_copies),
    "computations do not wait for copies": (Arrival, "use", _nothing),
    "nobody knows what computes with a block": (Carrier, "take_back", _nothing),
    "copies do not wait for computations": (DeviceMemory, "fences", _no_fences),
    "memory is given up while it is computed with": (DeviceMemory, "__del__", _given_up_without_waiting),
    "host memory is not kept until it is copied": (Carrier, "_keep", _nothing),
}
SCHEDULES: list[Schedule] = [lazy, copies_first, computes_first, *map(shuffled, range(5))]


def _all_failures() -> set[str]:
    failures: set[str] = set()
    for schedule in SCHEDULES:
        for budget in (None, LARGEST + 4 * PAGE_BYTES):
            for in_memory in (False, True):
                device = FakeDevice(schedule)
                streamed = Streamed(device, budget=budget, in_memory=in_memory)
                for i in [3, 5, 2, 4, 3, 5, 0, 1, 2, 3]:
                    streamed.use(i)
                streamed.residency.pool.trim()
                streamed.use(3)
                del streamed
                device.finish()
                failures |= set(device.failures)
    return failures


def test_the_right_order_has_no_failures() -> None:
    assert _all_failures() == set()


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_order_is_noticed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, replacement = WRONG[wrong]
    monkeypatch.setattr(owner, name, replacement)
    assert _all_failures()
