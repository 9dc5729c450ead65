"""The memory limits of the control groups that this process is in: versions 1 and 2, and both at once.

What the files mean is in the kernel's ``Documentation/admin-guide/cgroup-v2.rst`` and ``cgroup-v1/memory.rst``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_UNLIMITED_BYTES = 1 << 60  # version 1 says "no limit" as the largest multiple of a page; nobody has an exbibyte


@dataclass(frozen=True, slots=True)
class CgroupMemory:
    """A group with a limit on memory."""

    directory: str
    limit_bytes: int
    used_bytes: int  # page cache included, but not what can be reclaimed at once

    @property
    def available_bytes(self) -> int:
        return max(0, self.limit_bytes - self.used_bytes)


@dataclass(frozen=True, slots=True)
class _Version:
    limits: tuple[str, ...]  # file names; the smallest limit counts
    usage: str
    reclaimable: str  # a line of memory.stat: pages of files that nobody used lately


_V1 = _Version(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Version(("memory.max", "memory.high"), "memory.current", "inactive_file")


def limited_cgroups(root: Path) -> Iterator[CgroupMemory]:
    """This process's group and its ancestors, as far as they are visible and have a limit. ``root`` is ``/``."""
    paths = _own_paths(_text(root / "proc/self/cgroup"))
    for version, mount_root, mount_point in _mounts(_text(root / "proc/self/mountinfo")):
        own = paths.get(version)
        if own is None:
            continue
        below = _below(own, mount_root)
        top = root / mount_point.lstrip("/")
        for depth in range(len(below), -1, -1):
            group = _examine(top.joinpath(*below[:depth]), version, root)
            if group is not None:
                yield group


def _own_paths(text: str) -> dict[_Version, str]:
    """Paths below the root of each hierarchy, from lines such as ``4:memory:/docker/1f`` and ``0::/user.slice``."""
    paths: dict[_Version, str] = {}
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            paths[_V2] = path
        elif "memory" in controllers.split(","):
            paths[_V1] = path
    return paths


def _mounts(text: str) -> Iterator[tuple[_Version, str, str]]:
    """Version, mounted directory of the hierarchy, and mount point, of each mount that may hold memory limits."""
    for line in text.splitlines():
        before, separator, after = line.partition(" - ")
        fields, file_system = before.split(), after.split()
        if not separator or len(fields) < 5 or len(file_system) < 3:
            continue
        if file_system[0] == "cgroup2":
            version = _V2
        elif file_system[0] == "cgroup" and "memory" in file_system[2].split(","):
            version = _V1
        else:
            continue
        yield version, _unescaped(fields[3]), _unescaped(fields[4])


def _below(own: str, mount_root: str) -> tuple[str, ...]:
    """The way from a mount point down to the process's group; empty where that is not below the mount."""
    path = PurePosixPath(own)
    if ".." in path.parts or not path.is_relative_to(mount_root):
        return ()
    return path.relative_to(mount_root).parts


def _examine(directory: Path, version: _Version, root: Path) -> CgroupMemory | None:
    limits = [limit for name in version.limits if (limit := _number(directory / name)) is not None]
    used_bytes = _number(directory / version.usage)
    if not limits or used_bytes is None or min(limits) >= _UNLIMITED_BYTES:
        return None
    reclaimable = re.search(rf"^{version.reclaimable} (\d+)$", _text(directory / "memory.stat"), re.MULTILINE)
    used_bytes -= int(reclaimable[1]) if reclaimable else 0
    return CgroupMemory("/" + str(directory.relative_to(root)), min(limits), max(0, used_bytes))


def _number(path: Path) -> int | None:
    """None also for ``max``, which means no limit."""
    text = _text(path).strip()
    return int(text) if re.fullmatch(r"\d+", text, re.ASCII) else None


def _text(path: Path) -> str:
    """Empty where the file is missing or may not be read: then it limits nothing that we could know of."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""


def _unescaped(field: str) -> str:
    r"""``mountinfo`` writes a space as ``\040``."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
