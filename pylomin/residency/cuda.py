"""CUDA: streams beside the computation, events, memory in the order of streams."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable
from contextlib import AbstractContextManager
from typing import Any

import torch

from pylomin.io.buffers import keep_while_alive
from pylomin.residency.device import Bytes, Event

PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device


class CudaDevice:
    """See :class:`~pylomin.residency.device.Device`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copy_stream = torch.cuda.Stream(device)
        self._urgent_stream = torch.cuda.Stream(device, priority=-1)
        self._memory_stream = torch.cuda.Stream(device)

    @property
    def copy_stream(self) -> Hashable:
        return self._copy_stream

    @property
    def urgent_stream(self) -> Hashable:
        return self._urgent_stream

    @property
    def memory_stream(self) -> Hashable:
        return self._memory_stream

    def current_stream(self) -> Hashable:
        return torch.cuda.current_stream(self.device)

    def on(self, stream: Hashable) -> AbstractContextManager[object]:
        assert isinstance(stream, torch.cuda.Stream)
        return torch.cuda.stream(stream)

    def record(self, stream: Hashable) -> Event:
        assert isinstance(stream, torch.cuda.Stream)
        # Without timing, which costs more; who waits for it sleeps instead of spinning.
        event = torch.cuda.Event(blocking=True)
        event.record(stream)
        return event

    def wait(self, stream: Hashable, event: Event) -> None:
        assert isinstance(stream, torch.cuda.Stream)
        assert isinstance(event, torch.cuda.Event)
        stream.wait_event(event)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def allocate(self, nbytes: int) -> torch.Tensor:
        # Of this stream, whose order is that in which torch's allocator uses it again.
        with torch.cuda.stream(self._memory_stream), torch.inference_mode(False):
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def tensor(self, of: Bytes) -> torch.Tensor:
        return tensor_on(of, self.device)

    def pin(self, address: int, nbytes: int) -> str | None:
        torch.cuda.init()
        runtime: Any = torch.cuda.cudart()
        with torch.cuda.device(self.device):
            code = int(runtime.cudaHostRegister(address, nbytes, PORTABLE))
        if not code:
            return None
        # The runtime keeps the error for the next one who asks, which would be a kernel that did nothing wrong.
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device=self.device)
        return f"cudaHostRegister: error {code}"

    def unpin(self, address: int) -> None:
        runtime: Any = torch.cuda.cudart()
        runtime.cudaHostUnregister(address)

    def free_bytes(self) -> int:
        free_bytes, _ = torch.cuda.mem_get_info(self.device)
        # What torch's allocator has, and nobody uses, can be had, too.
        return free_bytes + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)

    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def finish(self) -> None:
        torch.cuda.synchronize(self.device)


def tensor_on(of: Bytes, device: torch.device) -> torch.Tensor:
    """These bytes of ``device`` (1-D, uint8). All that views them keeps ``of`` alive.

    That is known by the storage, whose Python object lives as long as it does. ``__cuda_array_interface__`` would do
    the same, but torch reads it with numpy, which need not be there.
    """
    with torch.inference_mode(False):
        made = torch.empty(0, dtype=torch.uint8, device=device)
        address = of.base.data_ptr() + of.offset_bytes
        storage: Any = torch._C._construct_storage_from_data_pointer(address, made.device, of.nbytes)
        keep_while_alive(of, storage)
        made.set_(storage, 0, (of.nbytes,), (1,))
    return made
