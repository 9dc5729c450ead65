"""Host memory that a device copies from without the help of the processor.

Our own pages, locked: torch's pinned tensors are rounded up to powers of two, so that 1.2 GiB of weights take 2 GiB.
"""

from __future__ import annotations

import ctypes
import mmap
import warnings
import weakref

import torch

from pylomin.io.buffers import PAGE_BYTES, aligned, anonymous_memory
from pylomin.io.sizes import format_bytes
from pylomin.residency.device import Device


class PinnedMemory:
    """Pages of an exact size, pinned if the system lets us.

    They are unpinned and gone when neither this object nor a tensor on them is left. Whoever began copies from them
    keeps them until those have ended.
    """

    def __init__(self, device: Device, nbytes: int, *, what: str) -> None:
        self.nbytes = aligned(nbytes, PAGE_BYTES)
        self.pages = anonymous_memory(self.nbytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.pages))
        # Pages that nothing was written to are one page of zeros; pinning gives each its memory.
        refusal = device.pin(self.address, self.nbytes)
        self.is_pinned = refusal is None
        if self.is_pinned:
            _pinned[self.address] = self.pages
            weakref.finalize(self.pages, device.unpin, self.address).atexit = False
        else:
            _say_once(
                f"{format_bytes(self.nbytes)} of host memory {what} could not be pinned ({refusal}). Weights are "
                "copied to the device from ordinary memory: the results are the same, but copies are slower, and do "
                "not run beside the computation. Raise the limit on locked memory (ulimit -l), or free host memory."
            )

    def bytes(self, offset_bytes: int, nbytes: int) -> torch.Tensor:
        """A part, as a tensor (1-D, uint8)."""
        if not nbytes:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self.pages, dtype=torch.uint8, count=nbytes, offset=offset_bytes)


_pinned: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()  # by address


def is_pinned(tensor: torch.Tensor) -> bool:
    """Whether the values of a tensor on the host lie in memory that was pinned here."""
    first, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    return any(address <= first and stop <= address + len(pages) for address, pages in list(_pinned.items()))


_said: set[str] = set()


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        warnings.warn(text, RuntimeWarning, stacklevel=3)
