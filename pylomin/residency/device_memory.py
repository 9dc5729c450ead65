"""Device memory that is used again in the order of streams: nobody waits on the host for its former uses to end.

A block that weights leave is handed out at once for other weights. The stream that writes those waits, on the device,
for what still computes with the former ones. So no more memory is in use than the ledger counts, however far the host
is ahead of the device; with ``record_stream`` it would be more, by all that the host is ahead.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable

import torch

from pylomin.residency.device import Device, Event


class DeviceMemory:
    """One allocation, and what may still be going on with which of its bytes."""

    __slots__ = ("__weakref__", "_fences", "base", "device")

    def __init__(self, device: Device, nbytes: int) -> None:
        self.device = device
        self.base = device.allocate(nbytes)
        self._fences: list[tuple[int, int, Event]] = [(0, nbytes, device.record(device.memory_stream))]

    def fence(self, first: int, stop: int, event: Event) -> None:
        """Bytes ``[first, stop)`` are in use until ``event``."""
        self._fences = [fence for fence in self._fences if not fence[2].query()]
        self._fences.append((first, stop, event))

    def fences(self, first: int, stop: int) -> list[Event]:
        """What has to have happened before bytes ``[first, stop)`` are written to."""
        return [event for begin, end, event in self._fences if begin < stop and first < end and not event.query()]

    def __del__(self) -> None:
        # The allocator hands it out again in the order of this stream.
        if not sys.is_finalizing():
            for _, _, event in getattr(self, "_fences", ()):
                self.device.wait(self.device.memory_stream, event)


class DeviceBytes:
    """A part of an allocation, in use as long as this object lives; tensors on it keep it alive."""

    __slots__ = ("__weakref__", "fences", "memory", "nbytes", "offset_bytes", "uses")

    def __init__(self, memory: DeviceMemory, offset_bytes: int, nbytes: int) -> None:
        self.memory = memory
        self.offset_bytes = offset_bytes
        self.nbytes = nbytes
        self.fences = memory.fences(offset_bytes, offset_bytes + nbytes)
        self.uses: set[Hashable] = set()  # streams in which something was begun with these bytes

    @property
    def base(self) -> torch.Tensor:
        return self.memory.base

    def is_of(self, device: Device) -> bool:
        return self.memory.device is device

    def begin(self) -> torch.Tensor:
        """A tensor on it, to be written in the current stream."""
        device = self.memory.device
        stream = device.current_stream()
        for event in self.fences:
            device.wait(stream, event)
        self.uses.add(stream)
        return device.tensor(self)

    def tensor(self, first: int, nbytes: int) -> torch.Tensor:
        """Some of them, as a tensor (1-D, uint8) of its own: writes to one weight are no writes to its neighbours."""
        return self.memory.device.tensor(_Part(self, first, nbytes))


class _Part:
    """Some of the bytes that were handed out."""

    __slots__ = ("_first", "_whole", "nbytes")

    def __init__(self, whole: DeviceBytes, first: int, nbytes: int) -> None:
        self._whole = whole
        self._first = first
        self.nbytes = nbytes

    @property
    def base(self) -> torch.Tensor:
        return self._whole.base

    @property
    def offset_bytes(self) -> int:
        return self._whole.offset_bytes + self._first


class Arrival:
    """Weights that come to a device together: when they are there, and who uses them."""

    __slots__ = ("_device", "_event", "_ordered", "_uses")

    def __init__(self, device: Device, uses: list[set[Hashable]]) -> None:
        stream = device.current_stream()
        self._device = device
        self._event = device.record(stream)
        self._uses = uses
        self._ordered = {stream}  # streams in which they are there for what is begun from now on

    def use(self) -> None:
        """What this thread begins from now on finds them there, and is waited for before others take their place."""
        stream = self._device.current_stream()
        if stream not in self._ordered:
            self._device.wait(stream, self._event)
            for uses in self._uses:
                uses.add(stream)
            self._ordered.add(stream)

    def is_there(self) -> bool:
        return self._event.query()

    def finish(self) -> None:
        """The host waits for them. For measuring."""
        self._event.synchronize()
