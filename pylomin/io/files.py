"""Weight files: opened once, read by position from any thread, checked for changes each time."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from pylomin.errors import StoreChangedError, StoreReadError

_MAX_BUFFERS = 1024  # IOV_MAX on Linux and macOS; one preadv takes no more
_MAX_READ_BYTES = 0x7FFFF000  # 2 GiB - 4096: Linux transfers no more per call, macOS refuses 2 GiB
_COPY_BYTES = 1 << 24  # 16 MiB at a time through a temporary where preadv is missing
_HINT_BYTES = 1 << 17  # 128 KiB, the usual device readahead: a hint over more is cut to it

Read = Callable[[int, Sequence[memoryview]], None]


@dataclass(frozen=True, slots=True)
class Extent:
    """A byte range of a file."""

    start: int  # absolute file offset in bytes (inclusive)
    stop: int  # absolute file offset in bytes (exclusive)

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class _Stamp:
    """What tells one state of a file from another.

    Not ctime: it changes when another file is renamed over ours, which leaves our bytes alone.
    """

    size_bytes: int
    mtime_ns: int

    def __str__(self) -> str:
        seconds, nanoseconds = divmod(self.mtime_ns, 10**9)
        return f"{self.size_bytes} bytes modified at {seconds}.{nanoseconds:09d}"


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


class WeightFile:
    """A regular file opened once for reading; every thread shares it.

    Before every read the size and modification time are compared with those at opening. A file that
    differs raises :class:`StoreChangedError`. Where the size is the expected one again and the
    validation (:meth:`set_validation`) passes, the file counts as mended: it is used again, but
    only after a read has raised, so that no change is silent. A file that was deleted, or that
    another file was renamed over, reads on: the open descriptor still holds the original bytes.

    Args:
        path: a regular file.
        watched: False for a private file that this process itself writes to; switches the
            comparison off.

    Raises:
        StoreReadError: the file is missing, not readable, or not a regular file.
    """

    def __init__(self, path: str | os.PathLike[str], *, watched: bool = True) -> None:
        self.path = os.fspath(path)
        self._watched = watched
        self._is_mended: Callable[[Read], bool] | None = None
        self._change_was_raised = False
        self._descriptor: Descriptor | None = _open(self.path)
        try:
            self._stamp = self._examine(self._descriptor.fd)
        except BaseException:
            self.close()
            raise

    @property
    def size_bytes(self) -> int:
        """Size at opening."""
        return self._stamp.size_bytes

    def set_validation(self, is_mended: Callable[[Read], bool]) -> None:
        """Set who judges whether a changed file of the right size is mended; by default none is.

        ``is_mended`` gets a function like :meth:`read` that reads the file as it is now. It may let
        that function's :class:`StoreReadError` pass, which counts as False.
        """
        self._is_mended = is_mended

    def read(self, offset_bytes: int, buffers: Sequence[memoryview]) -> None:
        """Fill all ``buffers``, one after another, from the bytes that start at ``offset_bytes``.

        ``buffers`` are writable, C-contiguous and of format ``B``. The GIL is released while the
        system reads.

        Raises:
            StoreReadError: the file ended early, could not be read, or is closed.
            StoreChangedError: the file was modified since it was opened.
        """
        descriptor = self._descriptor
        if descriptor is None:
            raise StoreReadError(f"weight file {self.path!r} is closed. Open its store again to read from it.")
        try:
            if self._watched:
                self._check_unchanged(descriptor.fd)
            self._fill(descriptor.fd, offset_bytes, buffers)
        finally:
            # A traceback keeps this frame; it must not keep the file open too.
            del descriptor

    def prefetch_hint(self, offset_bytes: int, length_bytes: int) -> None:
        """Ask the system to read ahead into its page cache; without effect where it cannot."""
        descriptor = self._descriptor
        if descriptor is None or not hasattr(os, "posix_fadvise"):
            return
        # Some file systems refuse advice; the read that follows reports what is really wrong.
        with contextlib.suppress(OSError):
            stop = offset_bytes + length_bytes
            for start in range(offset_bytes, stop, _HINT_BYTES):
                nbytes = min(_HINT_BYTES, stop - start)
                os.posix_fadvise(descriptor.fd, start, nbytes, os.POSIX_FADV_WILLNEED)

    def is_at_path(self) -> bool:
        """Whether ``path`` leads to this file, which was not deleted, replaced or changed since it was opened."""
        descriptor = self._descriptor
        if descriptor is None:
            return False
        try:
            same = os.path.samestat(os.fstat(descriptor.fd), os.stat(self.path))
        except OSError:
            return False
        return same and self._examine(descriptor.fd) == self._stamp

    def close(self) -> None:
        """Give the descriptor back, as soon as no read uses it. Idempotent."""
        self._descriptor = None

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"the open weight file {self.path!r} can neither be copied nor pickled")

    def _check_unchanged(self, fd: int) -> None:
        found = self._examine(fd)
        expected = self._stamp
        if found == expected:
            self._change_was_raised = False
            return
        mended = found.size_bytes == expected.size_bytes and self._validates(fd)
        if mended:
            self._stamp = found
            if self._change_was_raised:
                self._change_was_raised = False
                return
            advice = "Its layout is as before, so the next read accepts the new content."
        else:
            self._change_was_raised = True
            advice = "Restore the file, or open it again to use what it holds now."
        raise StoreChangedError(
            f"weight file {self.path!r} was changed after it was opened: expected {expected}, found {found}. {advice}"
        )

    def _examine(self, fd: int) -> _Stamp:
        try:
            status = os.fstat(fd)
        except OSError as error:
            raise StoreReadError(
                f"cannot examine weight file {self.path!r}: {error.strerror} (errno {error.errno})."
            ) from error
        return _Stamp(status.st_size, status.st_mtime_ns)

    def _validates(self, fd: int) -> bool:
        if self._is_mended is None:
            return False
        try:
            return self._is_mended(lambda offset_bytes, buffers: self._fill(fd, offset_bytes, buffers))
        except StoreReadError:
            return False

    def _fill(self, fd: int, offset_bytes: int, buffers: Sequence[memoryview]) -> None:
        pending = [buffer for buffer in buffers if len(buffer)]
        expected_bytes = sum(map(len, pending))
        position = offset_bytes
        done = 0  # buffers filled
        while done < len(pending):
            try:
                count = _read_some(fd, _one_call(pending, done), position)
            except OSError as error:
                raise StoreReadError(
                    f"reading {expected_bytes} bytes at offset {offset_bytes} of weight file "
                    f"{self.path!r} failed at offset {position}: {error.strerror} (errno "
                    f"{error.errno}). Check the disk, then try again."
                ) from error
            if count == 0:
                # Truncated since it was last examined, and said so here: mended, it works at once.
                self._change_was_raised = True
                raise StoreReadError(
                    f"weight file {self.path!r} ends at byte {position}: expected {expected_bytes} "
                    f"bytes at offset {offset_bytes}, found {position - offset_bytes}. The file is "
                    "truncated; restore it."
                )
            position += count
            while done < len(pending) and count >= len(pending[done]):
                count -= len(pending[done])
                done += 1
            if count:
                pending[done] = pending[done][count:]


def _open(path: str) -> Descriptor:
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


def _one_call(pending: list[memoryview], start: int) -> list[memoryview]:
    """As many of ``pending[start:]`` as one call may read, the last one cut where needed."""
    batch: list[memoryview] = []
    room = _MAX_READ_BYTES
    for buffer in pending[start : start + _MAX_BUFFERS]:
        batch.append(buffer[:room])
        room -= len(batch[-1])
        if room == 0:
            break
    return batch


def _read_some(fd: int, buffers: list[memoryview], offset_bytes: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, buffers, offset_bytes)
    data = os.pread(fd, min(len(buffers[0]), _COPY_BYTES), offset_bytes)
    buffers[0][: len(data)] = data
    return len(data)
