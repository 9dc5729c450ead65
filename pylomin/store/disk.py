"""Writing to disk: room, complete writes, and errors that say what to do about them."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from pylomin.errors import OutputExistsError, ScratchError, StoreWriteError
from pylomin.io.buffers import anonymous_memory
from pylomin.io.direct import refuses, set_direct

_WRITE_BYTES = 1 << 26  # 64 MiB per call: macOS refuses 2 GiB, and Ctrl-C should not wait for long
_BLOCK_BYTES = 1 << 22  # 4 MiB: direct writes of more were no faster
_BLOCKS = 3  # one is filled, one is written, and one waits
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS}
_HOW_TO_CHOOSE = {
    ScratchError: " with output_dir= or by setting the environment variable TMPDIR",
    StoreWriteError: "",  # the caller named it
}


def check_room(directory: str, needed_bytes: int, error_class: type[StoreWriteError] = ScratchError) -> None:
    """Raise ``error_class`` unless the file system of ``directory`` has ``needed_bytes`` free."""
    try:
        free_bytes = shutil.disk_usage(directory).free
    except OSError as error:
        raise disk_error(error, directory, needed_bytes, error_class) from error
    if free_bytes < needed_bytes:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise disk_error(full, directory, needed_bytes, error_class)


def write_at(fd: int, offset_bytes: int, view: memoryview) -> None:
    """Write all of ``view`` at a file offset, with the GIL released. Lets OSError pass."""
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done : done + _WRITE_BYTES], offset_bytes + done)


def disk_error(
    error: OSError, directory: str, needed_bytes: int, error_class: type[StoreWriteError] = ScratchError
) -> StoreWriteError:
    """The error for a failed write of ``needed_bytes`` into ``directory``."""
    try:
        free = _sized(shutil.disk_usage(directory).free)
    except OSError:
        free = "unknown"
    if error.errno in _NO_ROOM:
        advice = "Free some space there, or choose another directory"
    elif error.errno in _NO_PERMISSION:
        advice = "Make it writable for this user, or choose another directory"
    elif error.errno in {errno.ENOENT, errno.ENOTDIR}:
        advice = "Create the directory, or choose another one"
    else:
        advice = "Check the disk, or choose another directory"
    return error_class(
        f"writing weights to {directory!r} failed: {error.strerror or error}. Needed: "
        f"{_sized(needed_bytes)}; free there: {free}. {advice}{_HOW_TO_CHOOSE[error_class]}."
    )


@dataclass(slots=True)
class DiskWriter:
    """Writes files to one directory; every OSError of its own becomes an ``error_class``.

    Args:
        total_bytes: of all the files, for errors and progress.
        progress: called with bytes written and ``total_bytes``.
    """

    directory: str
    total_bytes: int
    error_class: type[StoreWriteError]
    progress: Callable[[int, int], None] | None = None
    written_bytes: int = field(default=0, init=False)

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Around what changes the disk and nothing else."""
        try:
            yield
        except OutputExistsError:
            raise
        except OSError as error:
            raise disk_error(error, self.directory, self.total_bytes, self.error_class) from error

    @contextlib.contextmanager
    def create(self, path: str, durable: bool) -> Iterator[GrowingFile]:
        """A new file; with ``durable``, on disk when the block ends."""
        # Not tempfile: its files are private to the user, and this one follows the umask.
        with self.errors():
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            output = _DirectFile(fd, self) if durable and set_direct(fd, True) else GrowingFile(fd, self)
            with contextlib.closing(output):
                yield output
                output.finish()
            if durable:
                with self.errors():
                    os.fsync(fd)
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(fd)
            raise
        with self.errors():
            os.close(fd)  # network file systems may report a full disk only here


@dataclass(slots=True)
class GrowingFile:
    """One file that grows."""

    fd: int
    disk: DiskWriter
    position: int = field(default=0, init=False)

    def append(self, view: memoryview) -> None:
        """Write ``view`` at the end. When this returns, its memory may change."""
        self._append(view)
        self.position += len(view)
        self.disk.written_bytes += len(view)
        if self.disk.progress is not None:
            self.disk.progress(self.disk.written_bytes, self.disk.total_bytes)

    def finish(self) -> None:
        """Return when all is written: nothing more is appended."""

    def rewrite_start(self, view: memoryview) -> None:
        """Replace the first bytes, of which there are as many; nothing is appended after it."""
        self.finish()
        with self.disk.errors():
            write_at(self.fd, 0, view)

    def close(self) -> None:
        """Give back what it took to write, whether it was finished or not."""

    def _append(self, view: memoryview) -> None:
        with self.disk.errors():
            write_at(self.fd, self.position, view)


class _DirectFile(GrowingFile):
    """Written past the page cache, in blocks, by another thread.

    What is not read again soon has no use for memory; and to find pages for it can take several times as long as the
    disk takes to write them.
    """

    def __init__(self, fd: int, disk: DiskWriter) -> None:
        super().__init__(fd, disk)
        self._block: mmap.mmap | None = None  # that is being filled
        self._filled_bytes = 0  # of it
        self._offset_bytes = 0  # of it in the file
        self._writes: deque[tuple[Future[None], mmap.mmap]] = deque()  # of the blocks before it
        self._thread: ThreadPoolExecutor | None = None

    def _append(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            if self._block is None:
                full = len(self._writes) == _BLOCKS - 1
                self._block = self._written_block() if full else anonymous_memory(_BLOCK_BYTES)
            part = view[done : done + _BLOCK_BYTES - self._filled_bytes]
            self._block[self._filled_bytes : self._filled_bytes + len(part)] = part
            self._filled_bytes += len(part)
            done += len(part)
            if self._filled_bytes == _BLOCK_BYTES:
                self._hand_over(self._block)

    def finish(self) -> None:
        while self._writes:
            self._written_block()
        set_direct(self.fd, False)  # the rest is no whole page
        if self._block is not None:
            with self.disk.errors():
                write_at(self.fd, self._offset_bytes, memoryview(self._block)[: self._filled_bytes])
            self._block = None

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def _hand_over(self, block: mmap.mmap) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="pylomin-writer")
        self._writes.append((self._thread.submit(_write_direct, self.fd, self._offset_bytes, block), block))
        self._offset_bytes += self._filled_bytes
        self._block, self._filled_bytes = None, 0

    def _written_block(self) -> mmap.mmap:
        """The oldest of those that are being written, when it is."""
        future, block = self._writes.popleft()
        with self.disk.errors():
            future.result()
        return block


def _write_direct(fd: int, offset_bytes: int, block: mmap.mmap) -> None:
    try:
        write_at(fd, offset_bytes, memoryview(block))
    except OSError as error:
        if not refuses(error):
            raise
        set_direct(fd, False)
        write_at(fd, offset_bytes, memoryview(block))


def _sized(nbytes: int) -> str:
    return f"{nbytes} bytes ({nbytes / (1 << 20):.1f} MiB)"
