"""Weight files: opened once, read by position from any thread, checked for changes each time."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

from pylomin.errors import StoreChangedError, StoreReadError
from pylomin.io import page_cache
from pylomin.io.buffers import PAGE_BYTES, PRIVATE
from pylomin.io.descriptor import Descriptor, open_weight_file
from pylomin.io.direct import DirectAccess, fill_direct, open_direct, refuses
from pylomin.io.mapping import copy_ranges, fault_in, mapped_bytes, show_pages
from pylomin.io.reading import fill, pieces
from pylomin.io.scattered import fill_scattered

_DROPPED_BYTES = 1 << 24  # 16 MiB; what a read that drops its pages has in the page cache at one time
_CHECKED_BYTES = 1 << 20  # 1 MiB at a time when a mapping failed and a read is to say why

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


class _Stamp(NamedTuple):
    """What tells one state of a file from another.

    Not ctime: it changes when another file is renamed over ours, which leaves our bytes alone.
    """

    size_bytes: int
    mtime_ns: int

    def __str__(self) -> str:
        seconds, nanoseconds = divmod(self.mtime_ns, 10**9)
        return f"{self.size_bytes} bytes modified at {seconds}.{nanoseconds:09d}"


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
        descriptor: of the file, where it is open already; ``path`` then is what errors call it.

    Raises:
        StoreReadError: the file is missing, not readable, or not a regular file.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, watched: bool = True, descriptor: Descriptor | None = None
    ) -> None:
        self.path = os.fspath(path)
        self._watched = watched
        self._is_mended: Callable[[Read], bool] | None = None
        self._change_was_raised = False
        # While views of a private file exist, this process may write other weights to the same bytes.
        self._map_refusal = None if watched else "this process writes to it"
        self._in_parts = False
        self._direct: DirectAccess | None = None
        self._descriptor: Descriptor | None = open_weight_file(self.path) if descriptor is None else descriptor
        try:
            self._stamp = self._examine(self._descriptor.fd)
        except BaseException:
            self.close()
            raise

    @property
    def size_bytes(self) -> int:
        """Size at opening."""
        return self._stamp.size_bytes

    def expect_parts(self) -> None:
        """Only parts of weights are read from here on, the rest of which is for other machines.

        The system reads ahead of a reader, here and there 8 MiB, and of who touches mapped pages. So what is wanted is
        announced from now on, and found in the page cache.
        """
        self._in_parts = True

    def set_validation(self, is_mended: Callable[[Read], bool]) -> None:
        """Set who judges whether a changed file of the right size is mended; by default none is.

        ``is_mended`` gets a function like :meth:`read` that reads the file as it is now. It may let
        that function's :class:`StoreReadError` pass, which counts as False.
        """
        self._is_mended = is_mended

    def read(self, offset_bytes: int, buffers: Sequence[memoryview], *, drop_cache: bool = False) -> None:
        """Fill all ``buffers``, one after another, from the bytes that start at ``offset_bytes``.

        ``buffers`` are writable, C-contiguous and of format ``B``. The GIL is released while the
        system reads. With ``drop_cache`` the page cache keeps nothing of what was read.

        Raises:
            StoreReadError: the file ended early, could not be read, or is closed.
            StoreChangedError: the file was modified since it was opened.
        """
        descriptor = self._opened()
        try:
            self._check_unchanged(descriptor.fd)
            self._announce_part(descriptor.fd, offset_bytes, sum(map(len, buffers)))
            self._fill(descriptor.fd, offset_bytes, buffers, drop_cache=drop_cache)
        finally:
            # A traceback keeps this frame; it must not keep the file open too.
            del descriptor

    def map(
        self,
        offset_bytes: int,
        nbytes: int,
        pages: mmap.mmap,
        at_bytes: int = 0,
        *,
        whole_huge: bool = False,
        again: bool = False,
    ) -> bool:
        """Let ``pages`` show ``nbytes`` (> 0) of the file instead of copying them there, and fault them in.

        Byte ``offset_bytes`` appears at ``at_bytes + offset_bytes % PAGE_BYTES``; ``at_bytes`` is a multiple of a
        page. What is written to the pages stays in this process. A change of the file is noticed when it comes
        before the end of this call; afterwards it shows through, and to touch bytes that were cut off is a bus error.

        Args:
            pages: from :meth:`~pylomin.io.buffers.BufferPool.try_take_pages`; what they show goes when they go.
            whole_huge: see :func:`~pylomin.io.mapping.show_pages`.
            again: they show the range already, and were dropped since.

        Returns:
            False where that cannot be; then the pages are as before, and the file can be read into them.

        Raises:
            StoreReadError, StoreChangedError: as :meth:`read`.
        """
        if self.map_refused is not None or not self._provide([(offset_bytes, offset_bytes + nbytes)]):
            return False
        descriptor = self._opened()
        try:
            try:
                if not again:
                    show_pages(descriptor.fd, offset_bytes, nbytes, pages, at_bytes, whole_huge=whole_huge)
            except OSError as error:
                if error.errno != errno.ENOMEM:  # there may be memory next time
                    self._map_refusal = f"the file system refuses to map it: {error.strerror} (errno {error.errno})"
                return False
            self._announce_part(descriptor.fd, offset_bytes, nbytes)
            try:
                fault_in(offset_bytes, nbytes, pages, at_bytes)
            except OSError as error:
                self._check_unchanged(descriptor.fd)
                self._find_fault(descriptor.fd, offset_bytes, nbytes)
                self._raise_unless_complete(offset_bytes, nbytes, 0, error)
            self._check_unchanged(descriptor.fd)
            shown_bytes = min(nbytes, max(0, self._stamp.size_bytes - offset_bytes))
            self._raise_unless_complete(offset_bytes, nbytes, shown_bytes, None)
            return True
        finally:
            del descriptor

    def copy_cached(self, extents: Sequence[Extent], buffer: memoryview) -> bool:
        """Copy extents that are in the page cache, one after the other, into ``buffer``, which they fill.

        As :meth:`read`, but with no system call for each: many rows of a table lie scattered. Where they are not
        cached, each costs a read of the disk with all that is read ahead of it.

        Returns:
            False where the file cannot be mapped; then nothing was copied.

        Raises:
            StoreReadError, StoreChangedError: as :meth:`read`.
        """
        if self.map_refused is not None or not self._provide([(extent.start, extent.stop) for extent in extents]):
            return False
        descriptor = self._opened()
        first = min(extent.start for extent in extents)
        last = max(extent.stop for extent in extents)
        try:
            pages = mmap.mmap(-1, mapped_bytes(first, last - first), flags=PRIVATE)
            try:
                show_pages(descriptor.fd, first, last - first, pages, 0, scattered=True)
            except OSError:
                return False
            try:
                copy_ranges([(extent.start, extent.nbytes) for extent in extents], first, pages, buffer)
            except OSError as error:
                self._check_unchanged(descriptor.fd)
                self._find_fault(descriptor.fd, first, last - first)
                self._raise_unless_complete(first, last - first, 0, error)
            self._check_unchanged(descriptor.fd)
            return True
        finally:
            del descriptor

    def read_scattered(self, extents: Sequence[Extent], buffer: memoryview) -> None:
        """Fill ``buffer`` with extents, one after the other, whose pages alone are read of the disk.

        Raises:
            StoreReadError, StoreChangedError: as :meth:`read`.
        """
        descriptor = self._opened()
        try:
            self._check_unchanged(descriptor.fd)
            start, count, error = fill_scattered(descriptor.fd, [(e.start, e.stop) for e in extents], buffer)
            if start >= 0:
                self._raise_unless_complete(start, count + 1, count, error)
        finally:
            del descriptor

    @property
    def map_refused(self) -> str | None:
        """Why :meth:`map` maps nothing; None where it does."""
        return self._map_refusal

    def read_direct(self, offset_bytes: int, nbytes: int, buffer: memoryview) -> None:
        """Read past the page cache where the system lets us, otherwise through it, and leave nothing in it.

        Byte ``offset_bytes`` goes to ``buffer[offset_bytes % PAGE_BYTES]``; the rest of the pages that are read with
        it may be overwritten.

        Args:
            buffer: writable, of :func:`~pylomin.io.direct.direct_bytes`, at the start of a page. At another address
                the read is buffered.

        Raises:
            StoreReadError, StoreChangedError: as :meth:`read`.
        """
        descriptor = self._opened()
        try:
            self._check_unchanged(descriptor.fd)
            access = self._direct_access(descriptor)
            target = buffer[offset_bytes % PAGE_BYTES :][:nbytes]
            if access.descriptor is not None and access.suits(buffer):
                count, error = fill_direct(access, offset_bytes, nbytes, buffer)
                if error is None or not refuses(error):
                    if error is None and count < nbytes:
                        rest, error = fill(descriptor.fd, offset_bytes + count, [target[count:]])
                        count += rest
                    self._raise_unless_complete(offset_bytes, nbytes, count, error)
                    return
                self._direct = DirectAccess.refused(error)
            self._fill(descriptor.fd, offset_bytes, [target], drop_cache=True)
        finally:
            del descriptor

    @property
    def direct_refused(self) -> str | None:
        """Why :meth:`read_direct` goes through the page cache after all; None where it does not."""
        return self._direct_access(self._opened()).refusal

    def announce(self, extents: Sequence[Extent]) -> None:
        """Say that all of these are read next, one after the other: for files of which reads take long to begin."""

    def prefetch_hint(self, offset_bytes: int, length_bytes: int) -> None:
        """Ask the system to read ahead into its page cache; without effect where it cannot."""
        descriptor = self._descriptor
        if descriptor is not None:
            page_cache.read_ahead(descriptor.fd, offset_bytes, length_bytes)

    def cached_fraction(self, extents: Sequence[Extent], samples: int = 64) -> float | None:
        """How much of the extents is in the page cache, 0 to 1, judged by ``samples`` places at most.

        None where the system cannot tell, or the file is closed.
        """
        descriptor = self._descriptor
        if descriptor is None:
            return None
        return page_cache.cached_fraction(descriptor.fd, [(e.start, e.stop) for e in extents if e.nbytes], samples)

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
        """Give the descriptors back, as soon as no read uses them. Idempotent."""
        self._descriptor = None
        self._direct = None

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"the open weight file {self.path!r} can neither be copied nor pickled")

    def _provide(self, ranges: Sequence[tuple[int, int]]) -> bool:
        """Get byte ranges to where the descriptor finds them; False where that cannot be."""
        return True

    def _opened(self) -> Descriptor:
        descriptor = self._descriptor
        if descriptor is None:
            raise StoreReadError(f"weight file {self.path!r} is closed. Open its store again to read from it.")
        return descriptor

    def _direct_access(self, descriptor: Descriptor) -> DirectAccess:
        access = self._direct
        if access is None:
            # Two threads may both come here; the descriptor of the slower one stays, the other closes after its read.
            access = self._direct = open_direct(descriptor.fd, self.path)
            if self._descriptor is None:  # closed meanwhile
                self._direct = None
        return access

    def _check_unchanged(self, fd: int) -> None:
        if not self._watched:
            return
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

    def _announce_part(self, fd: int, offset_bytes: int, nbytes: int) -> None:
        if self._in_parts:
            page_cache.read_ahead(fd, offset_bytes, nbytes)

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

    def _fill(self, fd: int, offset_bytes: int, buffers: Sequence[memoryview], *, drop_cache: bool = False) -> None:
        if drop_cache:
            count, error = _fill_and_drop(fd, offset_bytes, buffers)
        else:
            count, error = fill(fd, offset_bytes, buffers)
        self._raise_unless_complete(offset_bytes, sum(map(len, buffers)), count, error)

    def _raise_unless_complete(self, offset_bytes: int, nbytes: int, count: int, error: OSError | None) -> None:
        position = offset_bytes + count
        if error is not None:
            raise StoreReadError(
                f"reading {nbytes} bytes at offset {offset_bytes} of weight file "
                f"{self.path!r} failed at offset {position}: {error.strerror} (errno "
                f"{error.errno}). Check the disk, then try again."
            ) from error
        if count < nbytes:
            # Truncated since it was last examined, and said so here: mended, it works at once.
            self._change_was_raised = True
            raise StoreReadError(
                f"weight file {self.path!r} ends at byte {position}: expected {nbytes} "
                f"bytes at offset {offset_bytes}, found {count}. The file is "
                "truncated; restore it."
            )

    def _find_fault(self, fd: int, offset_bytes: int, nbytes: int) -> None:
        """Raise what :meth:`read` would; a failed mapping says neither where nor why."""
        ignored = memoryview(bytearray(min(nbytes, _CHECKED_BYTES)))
        whole, rest = divmod(nbytes, len(ignored))
        self._fill(fd, offset_bytes, [ignored] * whole + [ignored[:rest]])


def opened(path: str | os.PathLike[str] | WeightFile) -> WeightFile:
    """The weight file at ``path``, or the one that is given; whoever asks is to close it."""
    return path if isinstance(path, WeightFile) else WeightFile(path)


def _fill_and_drop(fd: int, offset_bytes: int, buffers: Sequence[memoryview]) -> tuple[int, OSError | None]:
    """Like :func:`fill`, a piece at a time, each of which leaves the page cache before the next comes."""
    done = 0
    for piece in pieces(buffers, _DROPPED_BYTES):
        nbytes = sum(map(len, piece))
        count, error = fill(fd, offset_bytes + done, piece)
        page_cache.drop(fd, offset_bytes + done, nbytes)
        done += count
        if count < nbytes:
            return done, error
    return done, None
