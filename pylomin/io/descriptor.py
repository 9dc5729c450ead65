"""File descriptors that close when nobody uses them any more."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import NoReturn

from pylomin.errors import StoreReadError


class Descriptor:
    """Owns a file descriptor and closes it when the last reference to this object goes.

    Every use holds one, so ``close()`` in another thread cannot free a descriptor number that is
    still used (and that the next ``open`` would hand out again for another file). Needs no lock,
    hence safe over fork.
    """

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.fd)

    def __reduce__(self) -> NoReturn:
        raise TypeError("an open weight file can neither be copied nor pickled")


def open_weight_file(path: str) -> Descriptor:
    # O_NONBLOCK: opening a FIFO would otherwise wait for a writer; regular files ignore it.
    try:
        descriptor = Descriptor(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        mode = os.fstat(descriptor.fd).st_mode
    except FileNotFoundError as error:
        raise StoreReadError(f"weight file {path!r} does not exist. Check the path.") from error
    except PermissionError as error:
        raise StoreReadError(f"weight file {path!r} may not be read by this user: {error.strerror}.") from error
    except OSError as error:
        raise StoreReadError(f"cannot open weight file {path!r}: {error.strerror} (errno {error.errno})") from error
    if stat.S_ISREG(mode):
        return descriptor
    del descriptor
    kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
    raise StoreReadError(f"weight file {path!r} is {kind}; expected a file.")
