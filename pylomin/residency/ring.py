"""Host memory of a fixed size that bytes pass through on their way to a device."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from queue import Empty, SimpleQueue

import torch

from pylomin.residency.device import Device, Event
from pylomin.residency.pinned import PinnedMemory

SLOT_BYTES = 8 << 20  # 8 MiB; a copy of so much takes much longer than starting it
SLOTS = 8


class Slot:
    """A part of the ring, used by one thread at a time.

    One that is merely dropped is free again, too: an interrupt can arrive between any two lines.
    """

    __slots__ = ("_device", "_free", "event", "offset_bytes", "stream")

    def __init__(self, free: SimpleQueue[Slot], device: Device, offset_bytes: int, event: Event | None) -> None:
        self._free: SimpleQueue[Slot] | None = free
        self._device = device
        self.offset_bytes = offset_bytes
        self.event = event  # when the last copies from it have ended
        self.stream: Hashable | None = None  # in which copies from it are begun now; None: nobody may yet

    def release(self) -> None:
        """Copies from it were begun in ``stream``; it may be overwritten when they have ended."""
        free, self._free = self._free, None
        if free is not None:
            event = self.event if self.stream is None else self._device.record(self.stream)
            free.put(Slot(free, self._device, self.offset_bytes, event))

    def forget(self) -> None:
        """There is no ring any more."""
        self._free = None

    def __del__(self) -> None:
        self.release()


class Ring:
    """Slots in the order in which they become free, each after the event of its own copies.

    Args:
        slot_bytes: of each, a multiple of a page.
        slots: how many.
    """

    def __init__(self, device: Device, slot_bytes: int = SLOT_BYTES, slots: int = SLOTS) -> None:
        self.slot_bytes = slot_bytes
        self._device = device
        # A queue, for no interrupt can leave it locked.
        self._free: SimpleQueue[Slot] = SimpleQueue()
        for number in range(slots):
            self._free.put(Slot(self._free, device, number * slot_bytes, None))
        weakref.finalize(self, _empty, self._free).atexit = False
        self.memory = PinnedMemory(device, slot_bytes * slots, what="for transfers")

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes

    def take(self) -> Slot:
        """A slot to be overwritten, and copied from in the stream that is the current one.

        The host waits, if it must, for copies from it to end, or for another thread to release one.
        """
        slot = self._free.get()
        self._wait(slot)
        slot.stream = self._device.current_stream()
        return slot

    def _wait(self, slot: Slot) -> None:
        if slot.event is not None:
            slot.event.synchronize()

    def view(self, slot: Slot) -> memoryview:
        """Its bytes, to be filled."""
        return memoryview(self.memory.pages)[slot.offset_bytes : slot.offset_bytes + self.slot_bytes]

    def bytes(self, slot: Slot, first: int, nbytes: int) -> torch.Tensor:
        """Some of its bytes, as a tensor."""
        return self.memory.bytes(slot.offset_bytes + first, nbytes)


def _empty(free: SimpleQueue[Slot]) -> None:
    """The ring is gone: break the cycle of queue and slots, and let the copies end before its memory goes."""
    while True:
        try:
            slot = free.get_nowait()
        except Empty:
            return
        slot.forget()
        if slot.event is not None:
            slot.event.synchronize()
