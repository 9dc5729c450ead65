"""Private places for offloaded weights that the user's own files do not hold."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from pylomin.errors import OffloadedWriteError
from pylomin.io.descriptor import Descriptor
from pylomin.io.files import Extent, WeightFile
from pylomin.store.base import ReadRequest, WeightInfo
from pylomin.store.disk import disk_error, write_at
from pylomin.store.extents import StoredWeight, read_extents
from pylomin.store.requests import weight_not_found
from pylomin.store.scratch_place import default_parent
from pylomin.store.tensor_bytes import byte_view, contiguous_cpu

_FreeExtents = dict[int, list[int]]  # size in bytes to start offsets


class ScratchDirectory:
    """A fresh directory that only this user can read, and that nobody else uses.

    Removed with everything in it by :meth:`close`, when the object is garbage collected, or at
    interpreter exit; always by the process that created it, never by a forked child.

    Args:
        parent: where to create it. Default: ``TMPDIR`` if set, else the system's temporary
            directory, or ``/var/tmp`` where that one is kept in memory (weights written there would
            not leave it).

    Raises:
        ScratchError: it cannot be created.
    """

    def __init__(self, parent: str | os.PathLike[str] | None = None) -> None:
        directory = default_parent() if parent is None else os.fspath(parent)
        try:
            self.path = Path(tempfile.mkdtemp(prefix="pylomin-", dir=directory))
        except OSError as error:
            raise disk_error(error, directory, 0) from error
        self._remove = weakref.finalize(self, _remove, str(self.path), os.getpid())

    def close(self) -> None:
        """Remove the directory and everything in it. Idempotent."""
        self._remove()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a scratch directory can neither be copied nor pickled")


class OverlayStore:
    """A :class:`~pylomin.store.base.WeightStore` that can be written to: one private file.

    A value is written completely before the name refers to it, and the bytes that it replaces are
    reused, for a value of the same size, when no read uses them any more. So a failed write leaves
    the old value, and a read that runs beside a write gets the old value or the new one.

    Args:
        scratch: the directory for the file; kept alive by the store.

    Raises:
        ScratchError: the file cannot be created.
    """

    def __init__(self, scratch: ScratchDirectory) -> None:
        self._scratch = scratch
        try:
            fd, path = tempfile.mkstemp(prefix="overlay-", suffix=".bin", dir=scratch.path)
        except OSError as error:
            raise disk_error(error, str(scratch.path), 0) from error
        self._output: Descriptor | None = Descriptor(fd)
        self._file = WeightFile(path, watched=False)
        self._owner_pid = os.getpid()
        self._placed: dict[str, _Placed] = {}
        self._free: _FreeExtents = {}
        self._end = 0  # of the file, in bytes
        self._lock = threading.Lock()

    def __contains__(self, name: object) -> bool:
        return name in self._placed

    def __iter__(self) -> Iterator[str]:
        placed = self._placed.copy()
        return iter(sorted(placed, key=lambda name: placed[name].slot.extent.start))

    def __len__(self) -> int:
        return len(self._placed)

    def info(self, name: str) -> WeightInfo:
        """Metadata of the last value written. Raises WeightNotFoundError."""
        return self._get(name).info

    def describe(self, name: str) -> str:
        """The path of the private file. Raises WeightNotFoundError."""
        self._get(name)
        return self._file.path

    def read(self, requests: Sequence[ReadRequest]) -> None:
        """Fill every destination; weights that lie next to each other are read together.

        Raises:
            WeightNotFoundError: a weight is not in the store.
            StoreReadError: naming the weights and the file.
        """
        # One look-up per name, so that a write meanwhile cannot mix two values, and a reference for
        # the length of the read, so that the bytes are not reused under it.
        used = {request.name: self._get(request.name) for request in requests}
        read_extents([(used[r.name].stored(self._file), r) for r in requests])

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Store a copy of ``tensor`` (any dtype, device and strides) as the value of ``name``.

        Raises:
            ScratchError: no space; the old value remains.
            StoreFormatError: the tensor is sparse or quantized, or has no values in memory.
            OffloadedWriteError: called in a forked child, whose parent owns the file, or after
                ``close()``.
        """
        output = self._output
        if output is None or os.getpid() != self._owner_pid:
            raise OffloadedWriteError(
                f"weight {name!r} cannot be written to {self._file.path!r}: the file is "
                + ("closed." if output is None else "that of the process this one was forked from.")
            )
        dense = contiguous_cpu(tensor, name)
        view = byte_view(dense)
        slot = self._allocate(len(view))
        try:
            write_at(output.fd, slot.extent.start, view)
        except OSError as error:
            raise disk_error(error, str(self._scratch.path), len(view)) from error
        info = WeightInfo(dense.dtype, tuple(dense.shape), len(view))
        self._placed[name] = _Placed(info, slot)

    def discard(self, name: str) -> None:
        """Forget ``name``, which may be unknown; its bytes are reused when no read uses them."""
        self._placed.pop(name, None)

    def close(self) -> None:
        """Close and remove the file. Idempotent."""
        self._output = None
        self._file.close()
        if os.getpid() == self._owner_pid:
            # The scratch directory may have been removed already.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._file.path)

    def _get(self, name: str) -> _Placed:
        try:
            return self._placed[name]
        except KeyError:
            raise weight_not_found(name, list(self._placed), repr(self._file.path)) from None

    def _allocate(self, nbytes: int) -> _Slot:
        with self._lock:
            free = self._free.get(nbytes)
            if free:
                start = free.pop()
            else:
                start = self._end
                self._end += nbytes
        return _Slot(Extent(start, start + nbytes), self._free)


_forks = 0  # how often this process forked, give or take


class _Slot:
    """Bytes of the overlay file in use; free again when nothing refers to this object.

    Needs no lock (``setdefault`` and ``append`` are atomic), hence may die in any thread at any
    moment.
    """

    __slots__ = ("_forks", "_free", "extent")

    def __init__(self, extent: Extent, free: _FreeExtents) -> None:
        self.extent = extent
        self._free = free
        self._forks = _forks

    def __del__(self) -> None:
        # A child forked meanwhile may still read these bytes: then they are not used again.
        if self._forks == _forks:
            self._free.setdefault(self.extent.nbytes, []).append(self.extent.start)


@dataclass(frozen=True, slots=True)
class _Placed:
    """The current value of a name."""

    info: WeightInfo
    slot: _Slot

    def stored(self, file: WeightFile) -> StoredWeight:
        return StoredWeight(self.info, file, self.slot.extent)


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(before=_count_fork, after_in_parent=_count_fork)


def _remove(path: str, owner_pid: int) -> None:
    if os.getpid() == owner_pid:
        # Runs in finalizers and at exit, where nobody could act on an error.
        shutil.rmtree(path, ignore_errors=True)
