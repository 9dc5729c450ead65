"""Files that appear in a directory complete and together, or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence

_JOURNAL = "publishing.json"  # the names that are being moved to the target, in that order
_NOT_SYNCABLE = {errno.EINVAL, errno.ENOTSUP}  # some file systems cannot sync a directory


class Staging:
    """A directory ``.pylomin-*.tmp`` beside the target, in which files grow until they are published.

    It is locked while its writer lives. What a killed writer left behind is therefore known for that, and removed by
    the next writer of the same target; a writer that is still at work is left alone. Where the file system has no
    locks, leftovers stay.

    Args:
        directory: where the files are to appear.
        target: tells one target in ``directory`` from another.

    All methods let OSError pass.
    """

    def __init__(self, directory: str, target: str) -> None:
        self._directory = directory
        prefix = f".pylomin-{hashlib.sha256(target.encode()).hexdigest()[:8]}-"
        self._fd: int | None = None
        # Leftovers are looked for under this lock only, so nobody meets the new directory before it is locked, too.
        with _locked(directory) as is_locked:
            if is_locked:
                _remove_leftovers(directory, prefix)
            self.path = os.path.join(directory, f"{prefix}{secrets.token_hex(8)}.tmp")
            os.mkdir(self.path)
            try:
                self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                _try_lock(self._fd)
            except BaseException:
                self.discard()
                raise

    def publish(
        self,
        names: Sequence[str],
        *,
        check: Callable[[], None],
        replaced: Callable[[], Sequence[str]],
        durable: bool,
    ) -> None:
        """Move the staged files to the target, the last of ``names`` last: with it, the target is there.

        Writers of the same directory publish one after the other.

        Args:
            check: raises if the target must not be touched; called when nobody else publishes.
            replaced: the files of the target that was there before; gone afterwards.
            durable: return only when all would survive a power failure.
        """
        with _locked(self._directory):
            check()
            old = replaced()
            if len(names) > 1:
                self._publish_several(names, old)
            else:
                os.replace(self._staged(names[0]), self._published(names[0]))
                for name in set(old) - set(names):
                    _unlink(self._published(name))
        if durable:
            sync_directory(self._directory)

    def discard(self) -> None:
        """Remove the directory and what is left in it. Idempotent."""
        # A failure that led here matters more than one in clearing up after it.
        shutil.rmtree(self.path, ignore_errors=True)
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _publish_several(self, names: Sequence[str], old: Sequence[str]) -> None:
        # Without its index or single file, which come first, the old target is absent rather than a mixture.
        with open(self._staged(_JOURNAL), "w", encoding="utf-8") as journal:
            json.dump(list(names), journal)
        for name in old:
            _unlink(self._published(name))
        try:
            for name in names:
                os.replace(self._staged(name), self._published(name))
        except BaseException:
            _withdraw(self._directory, self.path, names)
            raise

    def _staged(self, name: str) -> str:
        return os.path.join(self.path, name)

    def _published(self, name: str) -> str:
        return os.path.join(self._directory, name)


def _remove_leftovers(directory: str, prefix: str) -> None:
    """Of writers that were killed. Failing to look or to remove is no reason not to write."""
    with contextlib.suppress(OSError):
        for name in os.listdir(directory):
            if name.startswith(prefix) and name.endswith(".tmp"):
                with contextlib.suppress(OSError):
                    _remove_leftover(directory, os.path.join(directory, name))


def _remove_leftover(directory: str, path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if not _try_lock(fd):
            return
        with contextlib.suppress(FileNotFoundError, ValueError), open(os.path.join(path, _JOURNAL), "rb") as journal:
            _withdraw(directory, path, json.load(journal))
        shutil.rmtree(path)
    finally:
        os.close(fd)


def _withdraw(directory: str, staging: str, names: Sequence[str]) -> None:
    """Undo a publication that did not come to its end, unless the target is there all the same."""
    if os.path.lexists(os.path.join(directory, names[-1])):
        return
    for name in names:
        if not os.path.lexists(os.path.join(staging, name)):
            _unlink(os.path.join(directory, name))


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


@contextlib.contextmanager
def _locked(directory: str) -> Iterator[bool]:
    """One process and thread at a time, where the file system has locks; says whether it has."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # the write that follows says what is wrong, if anything is
        yield False
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        try:
            yield True
        finally:
            # Closing is not enough: a child that was forked meanwhile has the descriptor, too.
            fcntl.flock(fd, fcntl.LOCK_UN)
    finally:
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def sync_directory(path: str) -> None:
    """Make the names in a directory survive a power failure. Lets OSError pass."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NOT_SYNCABLE:
            raise
    finally:
        os.close(fd)
