"""What streaming weights to a device needs of it: the order of its work, and its memory.

Work is begun in streams. What is in one stream happens in order; between streams, only events make an order. The host
does not wait for any of it, but before it overwrites memory that a copy reads from.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from pylomin.errors import PassError


class Event(Protocol):
    """A point in a stream."""

    def query(self) -> bool:
        """Whether everything before it has ended."""
        ...

    def synchronize(self) -> None:
        """The host waits for that."""
        ...


class Bytes(Protocol):
    """Device memory that is in use as long as this object lives."""

    @property
    def base(self) -> torch.Tensor:
        """The allocation that they are a part of; 1-D, uint8."""
        ...

    @property
    def offset_bytes(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


class Device(Protocol):
    """One device. Callable from any thread."""

    @property
    def copy_stream(self) -> Hashable:
        """Where weights are copied that are used later, beside whatever is computed."""
        ...

    @property
    def urgent_stream(self) -> Hashable:
        """Where weights are copied that are needed now, so that they do not come after those."""
        ...

    @property
    def memory_stream(self) -> Hashable:
        """Where nothing is done but waiting, for former uses of memory that was given up."""
        ...

    def current_stream(self) -> Hashable:
        """Where this thread computes."""
        ...

    def on(self, stream: Hashable) -> AbstractContextManager[object]:
        """Inside, ``stream`` is the current one of this thread."""
        ...

    def record(self, stream: Hashable) -> Event:
        """The point up to which work was begun in ``stream``."""
        ...

    def wait(self, stream: Hashable, event: Event) -> None:
        """What is begun in ``stream`` from now on waits for ``event``; the host does not."""
        ...

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Begin to copy host bytes, in the current stream. ``source`` must be left alone until that has ended."""
        ...

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Memory (1-D, uint8), free when ``memory_stream`` has come as far as it is now.

        It may be given up when that stream waits for all that can still use it. Raises torch.OutOfMemoryError.
        """
        ...

    def tensor(self, of: Bytes) -> torch.Tensor:
        """A tensor (1-D, uint8) on these bytes, which keeps ``of`` alive."""
        ...

    def pin(self, address: int, nbytes: int) -> str | None:
        """Lock host memory, so that copies from it need no copy on the host. Returns why that cannot be, or None."""
        ...

    def unpin(self, address: int) -> None:
        """No copy from it may be under way."""
        ...

    def free_bytes(self) -> int:
        """That a new allocation could have."""
        ...

    def is_capturing(self) -> bool:
        """Whether what this thread does is recorded, to be repeated without Python."""
        ...

    def finish(self) -> None:
        """The host waits for everything that was begun. For measuring; never in a forward."""
        ...


Made = Callable[[torch.device], Device]


def _cuda(device: torch.device) -> Device:
    from pylomin.residency.cuda import CudaDevice

    return CudaDevice(device)


_KINDS: dict[str, Made] = {"cuda": _cuda}
_OTHERS: dict[torch.device, Made] = {}  # devices of their own; see `provide`
_devices: weakref.WeakValueDictionary[torch.device, Any] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def is_streamed_to(device: torch.device) -> bool:
    """Whether weights are brought to ``device`` by streams; others are copied by whoever needs them."""
    return device.type in _KINDS or device in _OTHERS


def provide(device: torch.device, made: Made | None) -> None:
    """Use ``made(device)`` for this very device; None: no longer."""
    with _lock:
        _devices.pop(device, None)
        _OTHERS.pop(device, None)
        if made is not None:
            _OTHERS[device] = made


def device_of(device: torch.device) -> Device:
    """One for all who use ``device``, as long as somebody does."""
    with _lock:
        found: Device | None = _devices.get(device)
        if found is not None:
            return found
        made = (_OTHERS.get(device) or _KINDS[device.type])(device)
        _devices[device] = made
        return made


def execution_device(device: torch.device | str | None) -> torch.device | None:
    """``device`` as a tensor on it names it, with its index.

    Raises:
        PassError: there is no such device here.
    """
    if device is None:
        return None
    wanted = torch.device(device)
    if wanted in _OTHERS:
        return wanted
    try:
        return torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise PassError(f"device is '{wanted}', which cannot be used here: {first_line}") from error
