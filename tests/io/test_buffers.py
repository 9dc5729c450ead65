from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pylomin.io import buffers
from pylomin.io.buffers import ALIGNMENT_BYTES, PAGE_BYTES, SMALL_BYTES, BufferPool, Pages, aligned, observe

KIB = 1 << 10
SIZES = st.one_of(
    st.integers(1, 300),
    st.sampled_from([SMALL_BYTES - 1, SMALL_BYTES, SMALL_BYTES + 1, 2 * SMALL_BYTES, 100 * KIB, 300 * KIB]),
)


@pytest.fixture
def deltas() -> Iterator[list[int]]:
    gc.collect()  # what other tests left must not go now
    seen: list[int] = []
    undo = observe(seen.append)
    yield seen
    undo()


def test_aligned() -> None:
    assert [aligned(n) for n in (0, 1, 63, 64, 65)] == [0, 64, 64, 64, 128]
    assert aligned(5, 4096) == 4096


@given(st.integers(0, 1 << 40), st.sampled_from([1, 2, 64, 4096]))
def test_aligned_is_the_next_multiple(nbytes: int, alignment: int) -> None:
    assert aligned(nbytes, alignment) % alignment == 0
    assert 0 <= aligned(nbytes, alignment) - nbytes < alignment


@pytest.mark.parametrize("nbytes", [1, 7, 64, 1000, SMALL_BYTES - 1, SMALL_BYTES, SMALL_BYTES + 1, 1 << 20])
def test_a_buffer_is_aligned_and_of_the_size_asked_for(nbytes: int) -> None:
    pool = BufferPool()
    for _ in range(3):
        buffer = pool.try_take(nbytes)
        assert buffer is not None
        assert ctypes.addressof(buffer) % ALIGNMENT_BYTES == 0
        assert len(memoryview(buffer).cast("B")) == nbytes
        memoryview(buffer).cast("B")[:] = b"\x55" * nbytes
    assert pool.in_use_bytes() >= nbytes


def test_bytes_are_live_until_the_last_view_dies() -> None:
    pool = BufferPool()
    buffer = pool.try_take(SMALL_BYTES)
    assert buffer is not None
    flat = torch.frombuffer(buffer, dtype=torch.float32)
    view = flat.view(4, -1)[2:]
    assert pool.in_use_bytes() == SMALL_BYTES
    del buffer
    assert pool.in_use_bytes() == SMALL_BYTES
    del flat
    assert pool.in_use_bytes() == SMALL_BYTES
    del view
    assert pool.in_use_bytes() == 0
    assert pool.free_bytes == SMALL_BYTES


def test_a_memoryview_keeps_bytes_live() -> None:
    pool = BufferPool()
    buffer = pool.try_take(SMALL_BYTES)
    view = memoryview(buffer).cast("B")[10:20]
    del buffer
    assert pool.in_use_bytes() == SMALL_BYTES
    del view
    assert pool.in_use_bytes() == 0


def test_a_block_is_reused() -> None:
    pool = BufferPool()
    buffer = pool.try_take(SMALL_BYTES)
    address = ctypes.addressof(buffer)
    del buffer
    buffer = pool.try_take(SMALL_BYTES - 100)
    assert ctypes.addressof(buffer) != address or pool.live_bytes <= 2 * SMALL_BYTES
    again = pool.try_take(SMALL_BYTES)
    assert address in (ctypes.addressof(buffer), ctypes.addressof(again))


def test_a_stale_view_never_sees_other_bytes() -> None:
    pool = BufferPool()
    buffer = pool.try_take(SMALL_BYTES)
    stale = torch.frombuffer(buffer, dtype=torch.uint8)
    stale.fill_(7)
    del buffer
    others = [torch.frombuffer(pool.try_take(SMALL_BYTES), dtype=torch.uint8).fill_(1) for _ in range(5)]
    assert bool((stale == 7).all())
    assert len({other.data_ptr() for other in others} | {stale.data_ptr()}) == 6


def test_the_best_fitting_block_is_reused() -> None:
    pool = BufferPool()
    sizes = [1 << 20, 1 << 19, 1 << 18]
    held = [pool.try_take(size) for size in sizes]
    addresses = [ctypes.addressof(buffer) for buffer in held]
    held.clear()
    assert ctypes.addressof(pool.try_take(1 << 18)) == addresses[2]


def test_a_block_far_too_large_is_not_taken() -> None:
    pool = BufferPool(limit_bytes=4 << 20)
    pool.try_take(2 << 20)
    small = pool.try_take(SMALL_BYTES)
    assert pool.in_use_bytes() == SMALL_BYTES
    assert small is not None


def test_without_a_limit_free_blocks_are_bounded() -> None:
    pool = BufferPool()
    for size in range(SMALL_BYTES, 40 * SMALL_BYTES, SMALL_BYTES):
        pool.try_take(size)
    assert pool.in_use_bytes() == 0
    assert pool.free_bytes <= 2 * pool.peak_bytes


def test_small_blocks_are_not_kept() -> None:
    pool = BufferPool()
    pool.try_take(100)
    assert pool.in_use_bytes() == 0
    assert pool.free_bytes == 0


def test_none_where_the_limit_leaves_no_room() -> None:
    pool = BufferPool(limit_bytes=3 * PAGE_BYTES + 2 * SMALL_BYTES)
    first = pool.try_take(2 * SMALL_BYTES)
    assert first is not None
    assert pool.try_take(SMALL_BYTES) is None
    small = pool.try_take(3 * PAGE_BYTES)
    assert small is not None
    assert pool.try_take(1) is None
    assert pool.try_adopt(1) is None
    del small
    assert pool.try_take(1) is not None


def test_the_whole_limit_can_be_used() -> None:
    pool = BufferPool(limit_bytes=SMALL_BYTES)
    for _ in range(3):
        buffer = pool.try_take(SMALL_BYTES)
        assert buffer is not None
        del buffer


def test_free_blocks_make_room_for_other_sizes() -> None:
    pool = BufferPool(limit_bytes=4 * SMALL_BYTES)
    for size in (4, 1, 2, 3, 4, 2):
        assert pool.try_take(size * SMALL_BYTES) is not None, size


def test_set_limit_gives_up_free_blocks() -> None:
    pool = BufferPool()
    del (held := [pool.try_take(SMALL_BYTES) for _ in range(4)])[1:]
    pool.set_limit(2 * SMALL_BYTES)
    assert pool.live_bytes + pool.free_bytes <= 2 * SMALL_BYTES
    pool.set_limit(SMALL_BYTES)
    assert (pool.live_bytes, pool.free_bytes) == (SMALL_BYTES, 0)
    pool.set_limit(1)
    assert pool.in_use_bytes() == SMALL_BYTES, "what is used stays until its last view dies"
    assert pool.try_take(1) is None
    held.clear()
    assert pool.try_take(1) is not None
    pool.set_limit(None)
    assert pool.try_take(1 << 20) is not None


def test_trim() -> None:
    pool = BufferPool()
    kept = pool.try_take(SMALL_BYTES)
    pool.try_take(SMALL_BYTES)
    pool.trim()
    assert (pool.live_bytes, pool.free_bytes) == (SMALL_BYTES, 0)
    assert kept is not None


def test_adopted_bytes_count_until_the_storage_dies(deltas: list[int]) -> None:
    pool = BufferPool(limit_bytes=1000)
    attach = pool.try_adopt(400)
    assert attach is not None
    assert pool.in_use_bytes() == 400
    tensor = torch.ones(100)
    attach(tensor)
    del attach
    view = tensor[3:5]
    del tensor
    gc.collect()
    assert pool.in_use_bytes() == 400
    assert pool.try_adopt(700) is None
    del view
    assert pool.in_use_bytes() == 0
    assert deltas == [400, -400]


def test_a_reservation_that_is_not_used_goes_back() -> None:
    pool = BufferPool(limit_bytes=1000)
    attach = pool.try_adopt(1000)
    assert attach is not None
    del attach
    assert pool.in_use_bytes() == 0
    assert pool.try_adopt(1000) is not None


def test_observers_see_every_byte_come_and_go(deltas: list[int]) -> None:
    pool = BufferPool()
    buffers_ = [pool.try_take(nbytes) for nbytes in (5, SMALL_BYTES, 1 << 20)]
    assert deltas == [5, SMALL_BYTES, 1 << 20]
    del buffers_
    assert pool.in_use_bytes() == 0
    assert sum(deltas) == 0


def test_the_end_of_an_observation() -> None:
    seen: list[int] = []
    undo = observe(seen.append)
    undo()
    BufferPool().try_take(10)
    assert seen == []
    assert seen.append not in buffers._observers


def test_peak() -> None:
    pool = BufferPool()
    first = pool.try_take(2 * SMALL_BYTES)
    second = pool.try_take(SMALL_BYTES)
    assert (first is not None, second is not None) == (True, True)
    del first, second
    pool.try_take(SMALL_BYTES)
    assert pool.peak_bytes == 3 * SMALL_BYTES


def test_a_pool_may_die_before_its_buffers() -> None:
    pool = BufferPool()
    tensor = torch.frombuffer(pool.try_take(SMALL_BYTES), dtype=torch.uint8).fill_(3)
    del pool
    gc.collect()
    assert bool((tensor == 3).all())
    del tensor


def test_finalizers_may_run_while_the_pool_is_locked() -> None:
    """The collector can run inside the pool's own code, and take a buffer with it."""
    pool = BufferPool(limit_bytes=8 * SMALL_BYTES)

    class Cycle:
        pass

    for _ in range(20):
        for _ in range(3):
            cycle = Cycle()
            cycle.me, cycle.buffer = cycle, pool.try_take(SMALL_BYTES)  # type: ignore[attr-defined]
            del cycle
        with pool._lock:
            gc.collect(0)
        assert pool.in_use_bytes() == 0


def test_many_threads() -> None:
    """Takes, drops and drops in other threads; the ledger is right in the end, and the limit was never exceeded."""
    limit = 10 * SMALL_BYTES
    pool = BufferPool(limit_bytes=limit)
    exceeded: list[int] = []

    def watch(delta: int) -> None:
        if pool.live_bytes + pool.free_bytes > limit:
            exceeded.append(delta)

    undo = observe(watch)
    passed_on: list[torch.Tensor] = []
    wrong: list[int] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        mine: list[torch.Tensor] = []
        for step in range(300):
            size = int(torch.randint(1, 3 * SMALL_BYTES, (), generator=generator))
            buffer = pool.try_take(size)
            if buffer is not None:
                mine.append(torch.frombuffer(buffer, dtype=torch.uint8).fill_(seed))
                if step % 3 == 0:
                    passed_on.append(mine[-1])
            if len(mine) > 2 or buffer is None:
                for tensor in mine:
                    if not bool((tensor == seed).all()):
                        wrong.append(seed)
                mine.clear()
            if len(passed_on) > 3:
                passed_on.clear()

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    undo()
    assert not any(thread.is_alive() for thread in threads)
    passed_on.clear()
    assert (exceeded, wrong) == ([], [])
    assert pool.in_use_bytes() == 0
    pool.trim()
    assert pool.free_bytes == 0


class PoolMachine(RuleBasedStateMachine):
    """Random takes, views, drops, idle pages, adoptions and limits against a model of the ledger."""

    @initialize(limit=st.one_of(st.none(), st.integers(1, 600 * KIB)))
    def start(self, limit: int | None) -> None:
        self.pool = BufferPool(limit)
        self.held: list[tuple[int, int, list[torch.Tensor]]] = []  # size, fill, views
        self.adopted: list[tuple[int, torch.Tensor]] = []
        self.pages: list[tuple[int, Pages]] = []
        self.idle: set[Pages] = set()
        self.fill = 0
        self.observed = 0
        self.undo = observe(self._observe)

    def _observe(self, delta: int) -> None:
        self.observed += delta

    @rule(size=SIZES)
    def take(self, size: int) -> None:
        buffer = self.pool.try_take(size)
        if buffer is None:
            # Never without a reason: free blocks do not stand in the way.
            assert self.pool.limit_bytes is not None
            needed = aligned(size, PAGE_BYTES) if size >= SMALL_BYTES else size
            assert self.pool.live_bytes + needed > self.pool.limit_bytes
            return
        self.fill = (self.fill + 1) % 251
        tensor = torch.frombuffer(buffer, dtype=torch.uint8).fill_(self.fill)
        assert tensor.data_ptr() % ALIGNMENT_BYTES == 0
        self.held.append((size, self.fill, [tensor]))

    @rule(size=SIZES)
    def take_pages(self, size: int) -> None:
        pages = self.pool.try_take_pages(size)
        if pages is None:
            assert self.pool.limit_bytes is not None
            assert self.pool.live_bytes + aligned(size, PAGE_BYTES) > self.pool.limit_bytes
            return
        assert pages[:] == bytes(aligned(size, PAGE_BYTES)), "fresh"
        self.fill = (self.fill + 1) % 251
        self.held.append((size, self.fill, [torch.frombuffer(pages, dtype=torch.uint8, count=size).fill_(self.fill)]))

    @rule(index=st.integers(0, 20))
    def set_idle(self, index: int) -> None:
        if self.pages:
            _, pages = self.pages[index % len(self.pages)]
            self.pool.set_idle(pages)
            self.idle.add(pages)

    @rule(index=st.integers(0, 20))
    def use_again(self, index: int) -> None:
        size, pages = self.pages[index % len(self.pages)] if self.pages else (0, None)
        if pages is None or pages not in self.idle:
            return
        if self.pool.try_use_again(pages):
            self.idle.remove(pages)
        else:
            assert self.pool.limit_bytes is not None
            assert self.pool.live_bytes + aligned(size, PAGE_BYTES) > self.pool.limit_bytes

    @rule(index=st.integers(0, 20))
    def drop_pages(self, index: int) -> None:
        if self.pages:
            _, pages = self.pages.pop(index % len(self.pages))
            self.idle.discard(pages)

    @rule(size=SIZES)
    def take_pages_to_keep(self, size: int) -> None:
        pages = self.pool.try_take_pages(size)
        if pages is not None:
            self.pages.append((size, pages))

    @rule(size=st.integers(1, 100 * KIB))
    def adopt(self, size: int) -> None:
        attach = self.pool.try_adopt(size)
        if attach is None:
            assert self.pool.limit_bytes is not None
            assert self.pool.live_bytes + size > self.pool.limit_bytes
            return
        tensor = torch.empty(size, dtype=torch.uint8)
        attach(tensor)
        self.adopted.append((size, tensor))

    @rule(index=st.integers(0, 20))
    def view(self, index: int) -> None:
        if self.held:
            _, _, views = self.held[index % len(self.held)]
            views.append(views[0][len(views[0]) // 2 :])

    @rule(index=st.integers(0, 20))
    def drop_first_view(self, index: int) -> None:
        if self.held:
            entry = self.held[index % len(self.held)]
            del entry[2][0]
            if not entry[2]:
                self.held.remove(entry)

    @rule(index=st.integers(0, 20))
    def drop_adopted(self, index: int) -> None:
        if self.adopted:
            del self.adopted[index % len(self.adopted)]

    @rule(limit=st.one_of(st.none(), st.integers(1, 600 * KIB)))
    def set_limit(self, limit: int | None) -> None:
        self.pool.set_limit(limit)

    @rule()
    def trim(self) -> None:
        self.pool.trim()
        assert self.pool.free_bytes == 0

    @invariant()
    def the_ledger_is_right(self) -> None:
        used = sum(size for size, _, _ in self.held) + sum(size for size, _ in self.adopted)
        used += sum(size for size, pages in self.pages if pages not in self.idle)
        in_use = self.pool.in_use_bytes()
        assert in_use >= used
        rounded = len(self.held) * (3 * SMALL_BYTES) + len(self.pages) * PAGE_BYTES
        assert in_use <= used + rounded + sum(size for size, _, _ in self.held)
        assert self.observed == used
        assert self.pool.free_bytes == sum(block.capacity_bytes for block in self.pool._free)
        if not used:
            assert in_use == 0

    @invariant()
    def the_limit_holds(self) -> None:
        if self.pool.limit_bytes is not None:
            assert self.pool.free_bytes == 0 or (self.pool.live_bytes + self.pool.free_bytes <= self.pool.limit_bytes)

    @invariant()
    def nobody_wrote_into_what_is_viewed(self) -> None:
        for _, fill, views in self.held:
            assert all(bool((view == fill).all()) for view in views)

    def teardown(self) -> None:
        if hasattr(self, "undo"):
            self.held.clear()
            self.adopted.clear()
            self.pages.clear()
            self.undo()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
