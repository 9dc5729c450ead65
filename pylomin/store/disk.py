"""Writing to disk: room, complete writes, and errors that say what to do about them."""

from __future__ import annotations

import errno
import os
import shutil

from pylomin.errors import ScratchError, StoreWriteError

_WRITE_BYTES = 1 << 26  # 64 MiB per call: macOS refuses 2 GiB, and Ctrl-C should not wait for long
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


def _sized(nbytes: int) -> str:
    return f"{nbytes} bytes ({nbytes / (1 << 20):.1f} MiB)"
