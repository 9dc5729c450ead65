"""How much memory this process can still have, and what says so."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pylomin.io.sizes import format_bytes
from pylomin.residency.cgroup import limited_cgroups

_RLIMITS = (  # name, resource, line of /proc/self/status that counts against it
    ("RLIMIT_AS", resource.RLIMIT_AS, "VmSize"),
    ("RLIMIT_DATA", resource.RLIMIT_DATA, "VmData"),
)


@dataclass(frozen=True, slots=True)
class MemoryLimits:
    """What :func:`memory_limits` found."""

    limit_bytes: int | None  # the lowest limit of a container or of this process; None where there is none
    available_bytes: int | None  # what is left below every limit and in the machine; None where nothing tells
    source: str  # what sets available_bytes, in words


@dataclass(frozen=True, slots=True)
class _Bound:
    limit_bytes: int | None
    available_bytes: int
    source: str


def memory_limits(root: str | os.PathLike[str] = "/") -> MemoryLimits:
    """The tightest of: control groups (and all above them), the machine's free memory, resource limits.

    Page cache that the system would give up for us counts as available.

    Args:
        root: where ``proc`` and the control groups are found; another directory for tests.
    """
    bounds = [*_of_cgroups(Path(root)), *_of_machine(Path(root)), *_of_process(Path(root))]
    if not bounds:
        return MemoryLimits(None, None, "the system does not say how much memory it has")
    tightest = min(bounds, key=lambda bound: bound.available_bytes)
    limits = [bound.limit_bytes for bound in bounds if bound.limit_bytes is not None]
    return MemoryLimits(min(limits, default=None), tightest.available_bytes, tightest.source)


def anonymous_bytes(root: str | os.PathLike[str] = "/") -> int:
    """What this process has in memory that is no part of a file; 0 where the system does not say."""
    try:
        status = (Path(root) / "proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    return _kib(status, "RssAnon") or 0


def _of_cgroups(root: Path) -> Iterator[_Bound]:
    for group in limited_cgroups(root):
        used, limit = format_bytes(group.used_bytes), format_bytes(group.limit_bytes)
        source = f"control group {group.directory}: {used} of {limit} used"
        yield _Bound(group.limit_bytes, group.available_bytes, source)


def _of_machine(root: Path) -> Iterator[_Bound]:
    try:
        meminfo = (root / "proc/meminfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        meminfo = ""
    available, total = _kib(meminfo, "MemAvailable"), _kib(meminfo, "MemTotal")
    if available is not None and total is not None:
        yield _Bound(None, available, f"the machine: {format_bytes(available)} of {format_bytes(total)} available")
        return
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):  # the system does not know these names
        return
    if total > 0:
        yield _Bound(None, total, f"the machine: {format_bytes(total)} in all; how much is free it does not say")


def _of_process(root: Path) -> Iterator[_Bound]:
    for name, number, counted in _RLIMITS:
        soft, _ = resource.getrlimit(number)
        if soft == resource.RLIM_INFINITY:
            continue
        try:
            used = _kib((root / "proc/self/status").read_text(encoding="ascii", errors="replace"), counted) or 0
        except OSError:
            used = 0
        source = f"{name} of this process: {format_bytes(used)} of {format_bytes(soft)} used"
        yield _Bound(soft, max(0, soft - used), source)


def _kib(text: str, name: str) -> int | None:
    """The bytes of a line such as ``MemAvailable:   23456 kB``."""
    match = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(match[1]) << 10 if match else None
