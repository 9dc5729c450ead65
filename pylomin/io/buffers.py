"""Recycled, aligned memory that weights are read into.

A fresh 16 MiB buffer costs 4096 page faults, which takes longer than copying 16 MiB from the page cache into it
(20 times longer on the virtual machine this was written on). So blocks are reused, and a block may be reused only
when no tensor views its bytes: it is handed out as a Python buffer object, every tensor made by
:func:`torch.frombuffer` keeps that object alive, and a finalizer on it brings the block back.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pylomin.io.arena import Arena, drop_pages
from pylomin.io.spaces import Space

ALIGNMENT_BYTES = 64  # what torch's own CPU allocator gives; some BLAS kernels round differently on less
PAGE_BYTES = mmap.PAGESIZE
HUGE_PAGE_BYTES = 2 << 20  # 2 MiB; of x86-64, and of ARM with pages of 4 KiB
SMALL_BYTES = 64 << 10  # 64 KiB; below this malloc is quick and a page-rounded block would be wasteful
# Python's default is shared: a forked child would read its weights into our memory.
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS

_observers: list[Callable[[int], None]] = []


def observe(callback: Callable[[int], None]) -> Callable[[], None]:
    """Call ``callback(delta_bytes)`` whenever weight bytes appear in or leave memory; returns the undo."""
    _observers.append(callback)
    return lambda: _observers.remove(callback)


def _notify(delta_bytes: int) -> None:
    for callback in tuple(_observers):
        callback(delta_bytes)


def aligned(nbytes: int, alignment: int = ALIGNMENT_BYTES) -> int:
    """``nbytes`` rounded up to a multiple of ``alignment``."""
    return -(-nbytes // alignment) * alignment


def block_bytes(nbytes: int, space: Space | None = None) -> int:
    """What a block for ``nbytes`` takes in the ledger; ``space``: where it lies, if not in ordinary pages."""
    if nbytes >= SMALL_BYTES:
        return aligned(nbytes, PAGE_BYTES)
    return nbytes if space is None else aligned(nbytes, space.alignment_bytes)


@dataclass(eq=False, slots=True)
class _Block:
    memory: Any  # a writable buffer exporter: anonymous mmap, or a ctypes array for small blocks; or of a space
    offset_bytes: int  # of the first aligned byte
    capacity_bytes: int
    arena: Arena | None = None  # of which it is a part
    space: Space | None = None  # None: ordinary pages
    uses: Any = None  # of a block that is out: what its space wants to know when it comes back


class _Ticket(weakref.ref[Any]):
    """Refers to what is handed out, and knows what to take back when that dies.

    Its callback is the ``append`` of a deque: no Python code, which an interrupt could stop half-way.
    """

    __slots__ = ("block", "capacity_bytes", "counted", "nbytes")

    block: _Block | None  # None for memory that the pool only counts
    capacity_bytes: int
    nbytes: int
    counted: bool  # in the ledger; not of idle pages, and an interrupt may come between taking and counting


class Pages(mmap.mmap):
    """Pages for a mapping of a file, from :meth:`BufferPool.try_take_pages`."""

    ticket: _Ticket


class BufferPool:
    """Blocks of memory, and the count of those in use.

    ``live_bytes`` counts blocks that somebody still views; ``free_bytes`` those waiting to be reused. With
    ``limit_bytes``, their sum never exceeds it. Callable from any thread.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.live_bytes = 0
        self.peak_bytes = 0
        self._recent_peak_bytes = 0  # fades, so that one large load does not keep its memory for good
        self._free: list[_Block] = []  # oldest first
        self._window: Arena | None = None  # for what streams; what is free of it counts as free
        self._window_bytes = 0  # that it should have
        # Former windows of other spaces, which cannot give parts of themselves back: that comes with their last block.
        self._closed: list[Arena] = []
        # Why the last `try_take` had no memory, if not for the limit.
        self.refusal: torch.cuda.OutOfMemoryError | None = None
        self._out: dict[int, _Ticket] = {}  # by id
        # Callbacks run in any thread at any moment, also inside our own critical sections: they only append here.
        self._returned: deque[_Ticket] = deque()
        self._lock = threading.Lock()

    def try_take(
        self, nbytes: int, *, from_window: bool = False, of_any_block: bool = False, space: Space | None = None
    ) -> Any | None:
        """A writable buffer of ``nbytes`` (> 0), 64-byte aligned, or None where the limit leaves no room.

        Args:
            from_window: only a part of the window will do, unless none is wanted or it is a small buffer.
            of_any_block: reuse one that is much larger, too; for what lives shortly, in one size after the other.
            space: what its memory is made of; then what ``space.hand_out`` gives is returned. None is also returned
                where the space has no memory left; ``refusal`` says so.
        """
        with self._lock:
            self._collect()
            self.refusal = None
            if from_window and nbytes >= SMALL_BYTES and self._window_bytes:
                block = self._of_window(nbytes, space)
            else:
                block = self._reuse(nbytes, of_any_block, space) or self._allocate(nbytes, space)
            if block is None:
                return None
            if space is None:
                buffer: Any = (ctypes.c_char * nbytes).from_buffer(block.memory, block.offset_bytes)
            else:
                buffer = space.hand_out(block.memory, block.offset_bytes, nbytes)
                block.uses = buffer.uses
            self._count(buffer, block, block.capacity_bytes, nbytes)
            return buffer

    def try_take_pages(self, nbytes: int, used_bytes: int | None = None) -> Pages | None:
        """Fresh pages for a mapping of a file, or None where the limit leaves no room.

        They cost nothing until they are used, and are unmapped as soon as the last view dies. Large ones begin, where
        the system can do that, on a multiple of ``HUGE_PAGE_BYTES``.

        Args:
            used_bytes: how many of them will be used, and are counted; default: all.
        """
        capacity = aligned(nbytes, PAGE_BYTES)
        used_bytes = nbytes if used_bytes is None else used_bytes
        counted_bytes = aligned(used_bytes, PAGE_BYTES)
        with self._lock:
            self._collect()
            if not self._make_room(counted_bytes):
                return None
            pages = _address_space(capacity)
            pages.ticket = self._count(pages, None, counted_bytes, used_bytes)
            return pages

    def set_idle(self, pages: Pages) -> None:
        """Pages that take no memory now do not count, until :meth:`try_use_again`."""
        with self._lock:
            self._discount(pages.ticket)

    def try_use_again(self, pages: Pages) -> bool:
        """Count pages that were idle; False where the limit leaves no room."""
        with self._lock:
            self._collect()
            if not self._make_room(pages.ticket.capacity_bytes):
                return False
            self._count_in(pages.ticket)
            return True

    def try_adopt(self, nbytes: int) -> Callable[[torch.Tensor], None] | None:
        """Room for a tensor that is allocated elsewhere (another device, another dtype), or None.

        The returned function is called once, with that tensor; its bytes count until its storage dies.
        """
        with self._lock:
            self._collect()
            if not self._make_room(nbytes):
                return None
            reservation = _Reservation()
            self._count(reservation, None, nbytes, nbytes)
        return reservation.attach

    def asked_bytes(self) -> int:
        """Bytes of what is out, without what blocks are larger than asked for."""
        with self._lock:
            self._collect()
            return sum(ticket.nbytes for ticket in self._out.values() if ticket.counted)

    def in_use_bytes(self) -> int:
        """``live_bytes`` after taking back what has died meanwhile."""
        self.collect()
        return self.live_bytes

    def collect(self) -> None:
        """Take back what has died; otherwise that happens when memory is asked for."""
        with self._lock:
            self._collect()

    def set_window(self, nbytes: int) -> None:
        """Set so much of the limit aside, as soon as that is possible, for what streams; 0: nothing."""
        with self._lock:
            self._window_bytes = nbytes - nbytes % PAGE_BYTES
            if self._window is not None and self._window.nbytes != self._window_bytes:
                self._disband_window()

    def set_limit(self, limit_bytes: int | None) -> None:
        """Change the limit; free blocks are given up first. Live ones leave when their last view dies.

        The peak is counted anew.
        """
        with self._lock:
            self.limit_bytes = limit_bytes
            self._collect()
            self._window_bytes = 0
            self._disband_window()
            self._make_room(0)
            self.peak_bytes = self.live_bytes

    def trim(self) -> None:
        """Give all free blocks back to the system."""
        with self._lock:
            self._collect()
            self._disband_window()
            self._drop_free(0)

    @property
    def free_bytes(self) -> int:
        free_bytes = sum([block.capacity_bytes for block in self._free])
        if self._closed:
            free_bytes += sum([window.free_bytes for window in self._closed])
        return free_bytes if self._window is None else free_bytes + self._window.free_bytes

    def _count(self, owner: object, block: _Block | None, capacity_bytes: int, nbytes: int) -> _Ticket:
        ticket = _Ticket(owner, self._returned.append)
        ticket.block, ticket.capacity_bytes, ticket.nbytes, ticket.counted = block, capacity_bytes, nbytes, False
        self._out[id(ticket)] = ticket
        self._count_in(ticket)
        return ticket

    def _count_in(self, ticket: _Ticket) -> None:
        self.live_bytes, ticket.counted = self.live_bytes + ticket.capacity_bytes, True
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self._recent_peak_bytes = max(self.live_bytes, self._recent_peak_bytes - self._recent_peak_bytes // 64)
        if self.limit_bytes is not None:
            assert self.live_bytes + self.free_bytes <= self.limit_bytes, "ledger exceeds the budget"
        _notify(ticket.nbytes)

    def _discount(self, ticket: _Ticket) -> None:
        if ticket.counted:  # no call between these two lines and no more than one statement, for interrupts
            self.live_bytes, ticket.counted = self.live_bytes - ticket.capacity_bytes, False
            _notify(-ticket.nbytes)

    def _collect(self) -> None:
        while self._returned:
            ticket = self._returned[0]
            self._discount(ticket)
            block, ticket.block = ticket.block, None
            if block is not None:
                self._take_back(block)
            self._out.pop(id(ticket), None)
            self._returned.popleft()
        if self.limit_bytes is None:
            # Enough for every size that a round of layers needs; bounded by what is in use at one time.
            self._drop_free(2 * self._recent_peak_bytes)
        else:
            self._drop_free(max(0, self.limit_bytes - self.live_bytes))

    def _take_back(self, block: _Block) -> None:
        if block.space is not None:
            uses, block.uses = block.uses, None
            block.space.take_back(block.memory, block.offset_bytes, block.capacity_bytes, uses)
        if block.arena is None:
            if block.capacity_bytes >= SMALL_BYTES:
                self._free.append(block)
        elif block.arena is self._window or block.arena in self._closed:
            block.arena.give(block.offset_bytes, block.capacity_bytes)
            self._closed = [window for window in self._closed if window.free_bytes < window.nbytes]
        else:  # other parts of it may be in use for long
            drop_pages(block.memory, block.offset_bytes, block.capacity_bytes)

    def _of_window(self, nbytes: int, space: Space | None) -> _Block | None:
        if self._window is not None and self._window.space is not space:
            self._disband_window()
        if self._window is None:
            self._drop_free(max(0, (self.limit_bytes or 0) - self.live_bytes - self._window_bytes))
            if self.live_bytes + self.free_bytes + self._window_bytes > (self.limit_bytes or 0):
                return None
            memory = self._new_memory(self._window_bytes, space)
            if memory is None:
                return None
            self._window = Arena(memory, self._window_bytes, space)
        capacity = aligned(nbytes, PAGE_BYTES)
        offset = self._window.take(capacity)
        return None if offset is None else _Block(self._window.memory, offset, capacity, self._window, space)

    def _disband_window(self) -> None:
        """What is in use of it stays so; the rest is no longer set aside."""
        window, self._window = self._window, None
        if window is None:
            return
        if window.space is None:
            window.drop_free()
        elif window.free_bytes < window.nbytes:
            self._closed.append(window)

    def _reuse(self, nbytes: int, of_any_block: bool, space: Space | None) -> _Block | None:
        # Without a limit a block may be twice too large, so that layers of similar sizes share one.
        slack = nbytes if self.limit_bytes is None else max(SMALL_BYTES, nbytes // 8)
        fitting = [
            b
            for b in self._free
            if nbytes <= b.capacity_bytes and (of_any_block or b.capacity_bytes <= nbytes + slack) and b.space is space
        ]
        if not fitting:
            return None
        block = min(fitting, key=lambda b: b.capacity_bytes)
        self._free.remove(block)
        return block

    def _allocate(self, nbytes: int, space: Space | None) -> _Block | None:
        if nbytes < SMALL_BYTES and space is None:
            if not self._make_room(nbytes):
                return None
            small = (ctypes.c_char * (nbytes + ALIGNMENT_BYTES))()
            return _Block(small, -ctypes.addressof(small) % ALIGNMENT_BYTES, nbytes)
        capacity = block_bytes(nbytes, space)
        if not self._make_room(capacity):
            return None
        memory = self._new_memory(capacity, space)
        return None if memory is None else _Block(memory, 0, capacity, space=space)

    def _new_memory(self, nbytes: int, space: Space | None) -> Any | None:
        """None where its space has none left."""
        if space is None:
            return anonymous_memory(nbytes)
        try:
            return space.allocate(nbytes)
        except torch.cuda.OutOfMemoryError as error:
            self.refusal = error.with_traceback(None)
            return None

    def _make_room(self, nbytes: int) -> bool:
        if self.limit_bytes is None:
            return True
        self._drop_free(max(0, self.limit_bytes - self.live_bytes - nbytes))
        if self._window is not None and self.live_bytes + self.free_bytes + nbytes > self.limit_bytes:
            self._disband_window()
        return self.live_bytes + self.free_bytes + nbytes <= self.limit_bytes

    def _drop_free(self, keep_bytes: int) -> None:
        while self._free and self.free_bytes > keep_bytes:
            del self._free[0]


def _address_space(nbytes: int) -> Pages:
    """Pages that nothing was written to, private to this process: Python's default would share them with a child.

    Large ones begin on a multiple of ``HUGE_PAGE_BYTES``, as Linux has it where the size is a multiple of that (since
    6.7). What is beyond ``nbytes`` is never touched.
    """
    return Pages(-1, aligned(nbytes, HUGE_PAGE_BYTES) if nbytes >= HUGE_PAGE_BYTES else nbytes, flags=PRIVATE)


def anonymous_memory(nbytes: int) -> mmap.mmap:
    """Memory, of huge pages as far as they do not take more than is asked for.

    Direct reads were up to twice as fast into huge pages.
    """
    memory = _address_space(nbytes)
    huge_bytes = nbytes - nbytes % HUGE_PAGE_BYTES
    if huge_bytes and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE, 0, huge_bytes)
    return memory


class _Reservation:
    """Bytes counted for a tensor of another allocator: until it is attached, by this object, then by its storage."""

    def attach(self, tensor: torch.Tensor) -> None:
        keep_while_alive(self, tensor.untyped_storage())


def keep_while_alive(kept: object, storage: torch.UntypedStorage) -> None:
    """Keep an object as long as a storage: by the argument of its finalizer, which nothing else refers to."""
    weakref.finalize(storage, _forget, kept).atexit = False


def _forget(kept: object) -> None:
    """The storage is gone, and with this call what it kept."""
