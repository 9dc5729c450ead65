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

_JOURNAL = "publishing.json"  # what is being moved to the target, and what is being removed there, in that order
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
        self._prefix = prefix = f".pylomin-{hashlib.sha256(target.encode()).hexdigest()[:8]}-"
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
        with _locked(self._directory) as is_locked:
            if is_locked:  # before this changes what they were about to change
                _remove_leftovers(self._directory, self._prefix)
            check()
            old = [name for name in replaced() if len(names) > 1 or name != names[0]]
            try:
                if len(names) > 1 or old:
                    self._write_journal(names, old)
                if len(names) > 1:
                    # Without its index or single file, which come first, the old target is absent rather than mixed.
                    self._remove(old)
                for name in names:
                    os.replace(os.path.join(self.path, name), os.path.join(self._directory, name))
                if len(names) == 1:
                    self._remove(old)
            except BaseException:
                with contextlib.suppress(OSError):
                    _settle(self._directory, self.path)
                raise
        if durable:
            sync_directory(self._directory)

    def discard(self) -> None:
        """Remove the directory and what is left in it. Idempotent."""
        # A failure that led here matters more than one in clearing up after it.
        shutil.rmtree(self.path, ignore_errors=True)
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _write_journal(self, names: Sequence[str], old: Sequence[str]) -> None:
        with open(os.path.join(self.path, _JOURNAL), "w", encoding="utf-8") as journal:
            json.dump({"new": list(names), "old": list(old)}, journal)

    def _remove(self, names: Sequence[str]) -> None:
        for name in names:
            _unlink(os.path.join(self._directory, name))


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
        _settle(directory, path)
        shutil.rmtree(path)
    finally:
        os.close(fd)


def _settle(directory: str, staging: str) -> None:
    """Finish a publication that did not come to its end, or take it back."""
    new, old = _read_journal(staging)
    if not new:
        return
    moved = [name for name in new if not os.path.lexists(os.path.join(staging, name))]
    if new[-1] in moved:  # the new target is there
        unwanted = [name for name in old if name not in new]
    elif old and os.path.lexists(os.path.join(directory, old[0])):  # the old one still is
        unwanted = []
    else:
        unwanted = [*old, *moved]
    for name in unwanted:
        _unlink(os.path.join(directory, name))


def _read_journal(staging: str) -> tuple[list[str], list[str]]:
    """What it says, or nothing if it was not written to its end: then nothing was done yet."""
    try:
        with open(os.path.join(staging, _JOURNAL), encoding="utf-8") as journal:
            document = json.load(journal)
        new, old = document["new"], document["old"]
        if all(os.path.basename(name) == name for name in [*new, *old]):
            return list(new), list(old)
    except (OSError, ValueError, LookupError, TypeError):
        pass
    return [], []


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
