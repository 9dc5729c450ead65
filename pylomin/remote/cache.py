"""The directory in which remote files are kept, bounded in bytes and shared between processes.

Every change of what is in it is made under one lock. A file that is in use is locked shared, and is never removed; of
the others those that were used longest ago go first. The directory must be on a disk of this machine.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pylomin.errors import StoreFormatError
from pylomin.io.descriptor import Descriptor
from pylomin.io.sizes import format_bytes, parse_bytes
from pylomin.remote.entry import BLOCK_BYTES, Entry, Header, boot_id, prepare, read_header, write_header
from pylomin.remote.transport import ObjectState
from pylomin.remote.urls import Url

DIRECTORY_VARIABLE = "PYLOMIN_CACHE_DIR"
SIZE_VARIABLE = "PYLOMIN_CACHE_SIZE"
LEASE_BLOCKS = 256  # 64 MiB; granted to one process at a time
SPARE_BYTES = 256 << 20  # 256 MiB; of the disk, left free
LOCK_S = 10.0  # a lock that is held for so long is held by a process that was stopped
_POLL_S = 0.005  # locks between processes cannot be waited for with a limit
_NAME = re.compile(r"([0-9a-f]{64})\.(data|blocks)")


def default_directory() -> str:
    """Where remote files are kept unless it is said where."""
    chosen = os.environ.get(DIRECTORY_VARIABLE)
    if chosen:
        return chosen
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(root, "pylomin")


def default_size() -> int | None:
    """The bound, if the environment has one."""
    text = os.environ.get(SIZE_VARIABLE)
    try:
        return parse_bytes(text, what=SIZE_VARIABLE) if text else None
    except ValueError as error:
        raise StoreFormatError(str(error)) from None


@dataclass(frozen=True, slots=True)
class _Kept:
    """A file of the cache, as the directory shows it."""

    stem: str
    granted_bytes: int
    used_ns: int


class Cache:
    """A cache directory.

    Args:
        directory: is created where it is missing. Default: :func:`default_directory`.
        limit_bytes: the bound on what is kept. Default: half of what the disk has free for it.
    """

    def __init__(self, directory: str | None = None, limit_bytes: int | None = None) -> None:
        self.directory = default_directory() if directory is None else directory
        self._limit_bytes = default_size() if limit_bytes is None else limit_bytes
        self._problem: str | None = None  # what the user should hear
        self._told = False

    def open(self, url: Url, state: ObjectState) -> Entry:
        """The file's place in the cache. Where it cannot have one, an entry that keeps nothing, and a warning."""
        stem = _stem(url, state)
        fresh = Header(url.shown, state.tag, state.size_bytes, boot_id())
        try:
            os.makedirs(self.directory, mode=0o700, exist_ok=True)
            with self._locked():
                return self._open(stem, fresh)
        except OSError as error:
            self.report(f"{error.strerror or error} (errno {error.errno})")
        try:
            return self._open_to_read(stem, fresh)
        except OSError:
            return Entry.nowhere(state.size_bytes)

    def reserve(self, entry: Entry, blocks: int) -> bool:
        """May ``entry`` get this many blocks more? What was used longest ago makes room for them."""
        if not entry.writable:
            return False
        _forget_after_fork(entry)
        if entry.granted < blocks:
            try:
                with self._locked():
                    self._grant(entry, blocks)
            except OSError as error:
                self.report(f"{error.strerror or error} (errno {error.errno})")
                entry.writable = False
        if entry.granted < blocks:
            return False
        entry.granted -= blocks
        return True

    def seal(self, entry: Entry, modified_ns: int) -> None:
        """All of the file is on the disk: from now on it must stay as it is."""
        with contextlib.suppress(OSError), self._locked(), entry.header() as found:
            if found is not None:
                write_header(found[0], replace(found[1], sealed_ns=modified_ns))

    def close(self, entry: Entry) -> None:
        """Give back what ``entry`` may have and did not use."""
        _forget_after_fork(entry)
        if entry.granted:
            with contextlib.suppress(OSError), self._locked(), entry.header() as found:
                if found is not None:
                    write_header(found[0], replace(found[1], granted=found[1].granted - entry.granted))
        entry.granted = 0
        entry.close()

    def report(self, problem: str) -> None:
        """Something keeps the cache from being what it should be; from any thread."""
        if self._problem is None:
            self._problem = problem

    def warn(self) -> None:
        """Tell the user, once, in the thread that asked for bytes."""
        if self._problem is not None and not self._told:
            self._told = True
            warnings.warn(
                f"remote weights cannot all be kept in {self.directory!r}: {self._problem}. What is not there is "
                "fetched again each time it is used. Choose another directory or size: cache_dir=, cache_size=, or the "
                f"environment variables {DIRECTORY_VARIABLE} and {SIZE_VARIABLE}.",
                RuntimeWarning,
                stacklevel=5,
            )

    def _open(self, stem: str, fresh: Header) -> Entry:
        data = Descriptor(os.open(self._path(stem, "data"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
        blocks = Descriptor(os.open(self._path(stem, "blocks"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
        if _lock_at_once(data.fd, fcntl.LOCK_EX):  # nobody else uses it
            prepare(data.fd, blocks.fd, fresh)
        elif read_header(blocks.fd) is None:
            raise OSError(errno.EIO, "the record of a file in use is damaged")
        fcntl.flock(data.fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        os.utime(blocks.fd)
        return Entry(data, blocks, fresh.size_bytes, writable=True)

    def _open_to_read(self, stem: str, fresh: Header) -> Entry:
        """From a directory that may not be written to. Lets OSError pass."""
        data = Descriptor(os.open(self._path(stem, "data"), os.O_RDONLY | os.O_CLOEXEC))
        blocks = Descriptor(os.open(self._path(stem, "blocks"), os.O_RDONLY | os.O_CLOEXEC))
        fcntl.flock(data.fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        header, status = read_header(blocks.fd), os.fstat(data.fd)
        if (
            header is None
            or (header.tag, header.size_bytes, status.st_size) != (fresh.tag, fresh.size_bytes, fresh.size_bytes)
            or header.sealed_ns not in (None, status.st_mtime_ns)
            or (header.sealed_ns is None and (not header.boot or header.boot != fresh.boot))
        ):
            raise OSError(errno.ESTALE, "not to be trusted")
        return Entry(data, blocks, fresh.size_bytes, writable=False)

    def _grant(self, entry: Entry, wanted: int) -> None:
        """Under the lock."""
        kept = self._kept()
        used_bytes = sum(file.granted_bytes for file in kept)
        room_bytes = self._room_bytes(used_bytes)
        for file in sorted(kept, key=lambda file: file.used_ns):
            if room_bytes >= wanted * BLOCK_BYTES:
                break
            if self._remove(file.stem):
                used_bytes -= file.granted_bytes
                room_bytes = self._room_bytes(used_bytes)
        granted = min(max(wanted, min(LEASE_BLOCKS, entry.missing_blocks)), room_bytes // BLOCK_BYTES)
        if granted < wanted:
            self.report(f"there is room for {format_bytes(max(0, room_bytes))} more")
            return
        with entry.header() as found:
            if found is not None:
                write_header(found[0], replace(found[1], granted=found[1].granted + granted))
                entry.granted += granted

    def _room_bytes(self, used_bytes: int) -> int:
        free_bytes = shutil.disk_usage(self.directory).free
        limit_bytes = (free_bytes + used_bytes) // 2 if self._limit_bytes is None else self._limit_bytes
        return min(limit_bytes - used_bytes, free_bytes - SPARE_BYTES)

    def _kept(self) -> list[_Kept]:
        stems = {match[1] for name in os.listdir(self.directory) if (match := _NAME.fullmatch(name))}
        return [self._look_at(stem) for stem in stems]

    def _look_at(self, stem: str) -> _Kept:
        try:
            blocks = Descriptor(os.open(self._path(stem, "blocks"), os.O_RDONLY | os.O_CLOEXEC))
            header = read_header(blocks.fd)
            used_ns = os.fstat(blocks.fd).st_mtime_ns
        except OSError:
            header, used_ns = None, 0
        return _Kept(stem, 0 if header is None else header.granted * BLOCK_BYTES, used_ns)

    def _remove(self, stem: str) -> bool:
        """Unless it is in use."""
        with contextlib.suppress(FileNotFoundError):
            data = Descriptor(os.open(self._path(stem, "data"), os.O_RDONLY | os.O_CLOEXEC))
            if not _lock_at_once(data.fd, fcntl.LOCK_EX):
                return False
        for suffix in ("blocks", "data"):  # without its record, data is nothing
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path(stem, suffix))
        return True

    def _path(self, stem: str, suffix: str) -> str:
        return os.path.join(self.directory, f"{stem}.{suffix}")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Lets OSError pass."""
        lock = Descriptor(os.open(Path(self.directory) / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
        deadline = time.monotonic() + LOCK_S
        while not _lock_at_once(lock.fd, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise OSError(errno.ETIMEDOUT, "another process holds its lock")
            time.sleep(_POLL_S)
        try:
            yield
        finally:
            fcntl.flock(lock.fd, fcntl.LOCK_UN)


def _lock_at_once(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _forget_after_fork(entry: Entry) -> None:
    if entry.owner_pid != os.getpid():
        entry.granted, entry.owner_pid = 0, os.getpid()


def _stem(url: Url, state: ObjectState) -> str:
    """A name that says nothing of the URL."""
    return hashlib.sha256(json.dumps([url.identity, state.tag, state.size_bytes]).encode()).hexdigest()
