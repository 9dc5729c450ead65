"""Reads and writes past the page cache (O_DIRECT): a third of the CPU time or less, nothing left in memory."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from dataclasses import dataclass

from pylomin.io import syscalls
from pylomin.io.buffers import PAGE_BYTES, aligned
from pylomin.io.descriptor import Descriptor

MOST_BYTES = 64 << 20  # 64 MiB of one call: between calls the disk waits, longer where all processors compute
_REFUSALS = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS}


@dataclass(frozen=True, slots=True)
class DirectAccess:
    """A second descriptor of a weight file, or why there is none."""

    descriptor: Descriptor | None
    memory_alignment_bytes: int = PAGE_BYTES
    refusal: str | None = None

    def suits(self, buffer: memoryview) -> bool:
        """Is this memory aligned as direct reads need it?"""
        return ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % self.memory_alignment_bytes == 0

    @staticmethod
    def refused(reason: OSError | str) -> DirectAccess:
        if isinstance(reason, OSError):
            reason = f"{reason.strerror} (errno {reason.errno})"
        return DirectAccess(None, refusal=f"the file system refuses O_DIRECT: {reason}")


def refuses(error: OSError) -> bool:
    """Is this the file system's way to say that it has no direct reads, or writes?"""
    return error.errno in _REFUSALS


def set_direct(fd: int, direct: bool) -> bool:
    """Have writes to an open file go past the page cache, or through it. Returns False where the system refuses."""
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        return False
    try:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | flag if direct else flags & ~flag)
    except OSError:
        return False
    return True


def direct_bytes(offset_bytes: int, nbytes: int) -> int:
    """Bytes of the whole pages that a direct read of a range fills."""
    return aligned(offset_bytes % PAGE_BYTES + nbytes, PAGE_BYTES)


def open_direct(fd: int, path: str) -> DirectAccess:
    """Open the file of ``fd`` once more, for direct reads. Never another file, and never an error."""
    if not hasattr(os, "O_DIRECT"):
        return DirectAccess.refused("this system has none")
    memory, offset = syscalls.direct_alignment(fd) or (PAGE_BYTES, PAGE_BYTES)
    if not 0 < max(memory, offset) <= PAGE_BYTES:
        return DirectAccess.refused(f"it asks for memory aligned to {memory} and offsets aligned to {offset} bytes")
    # By descriptor it is the same file even if that was deleted or replaced; by path where /proc is not mounted.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_DIRECT
    refusal: OSError | str = "the file cannot be opened again"
    for name in (f"/proc/self/fd/{fd}", path):
        try:
            descriptor = Descriptor(os.open(name, flags))
            is_same = os.path.samestat(os.fstat(descriptor.fd), os.fstat(fd))
        except OSError as error:
            refusal = error
            continue
        if is_same:
            return DirectAccess(descriptor, memory)
        refusal = "opened again, the path is another file"
    return DirectAccess.refused(refusal)


def fill_direct(access: DirectAccess, offset_bytes: int, nbytes: int, buffer: memoryview) -> tuple[int, OSError | None]:
    """Read the pages that hold ``nbytes`` at ``offset_bytes``; returns as :func:`pylomin.io.reading.fill` does.

    It also stops where a call ends within a page, at the end of the file or before a fault: direct reads cannot go on.
    """
    assert access.descriptor is not None
    before = offset_bytes % PAGE_BYTES
    length = direct_bytes(offset_bytes, nbytes)
    position = 0
    while position < before + nbytes:
        batch = buffer[position : min(length, position + MOST_BYTES)]
        try:
            count = os.preadv(access.descriptor.fd, [batch], offset_bytes - before + position)
        except OSError as error:
            return max(0, position - before), error
        position += count
        if count == 0 or count % PAGE_BYTES:
            break
    return min(max(0, position - before), nbytes), None
