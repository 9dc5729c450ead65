"""Where scratch files go by default: on a disk, not into memory."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

_IN_MEMORY = {"tmpfs", "ramfs"}
_DISK_FALLBACK = "/var/tmp"
_MOUNTS = "/proc/self/mounts"


def default_parent() -> str:
    """The directory in which scratch directories are created by default."""
    chosen = os.environ.get("TMPDIR")
    if chosen:
        return chosen
    directory = tempfile.gettempdir()
    mounts = _read_mounts()
    if (
        is_in_memory(os.path.realpath(directory), mounts)
        and not is_in_memory(os.path.realpath(_DISK_FALLBACK), mounts)
        and os.access(_DISK_FALLBACK, os.W_OK | os.X_OK)
    ):
        return _DISK_FALLBACK
    return directory


def is_in_memory(real_path: str, mounts: str) -> bool:
    """Does a path without links lie in memory, by a table like that of ``/proc/self/mounts``?"""
    path = Path(real_path)
    longest, found = -1, ""
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        mount_point = Path(_unescape(fields[1]))
        # A later mount on the same point hides the earlier one.
        if path.is_relative_to(mount_point) and len(mount_point.parts) >= longest:
            longest, found = len(mount_point.parts), fields[2]
    return found in _IN_MEMORY


def _read_mounts() -> str:
    try:
        return Path(_MOUNTS).read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""  # no such table on this system: take every directory for one on disk


def _unescape(field: str) -> str:
    """A field with its octal escapes, which stand for spaces and the like, undone."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
