"""Processes under a memory limit: control groups of version 1 and 2. Linux; needs the right to make groups.

Page cache that a process brings in counts against the limit of its group, as in a container. Pages that another
process brought in do not: whoever wants the limit to bind drops the caches first (:mod:`benchmarks.disk`).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

REMOVAL_S = 5.0  # how long the system may take to let go of a group whose process has ended
NO_LIMIT = "no memory limit: "


class GroupUnavailableError(RuntimeError):
    """This system, or this user's rights on it, allow no memory group; the message says which."""


@dataclass(frozen=True)
class Hierarchy:
    """Where groups are made, and how their files are called."""

    version: int
    parent: Path

    @property
    def files(self) -> Mapping[str, str]:
        return _FILES[self.version]


_FILES: dict[int, dict[str, str]] = {
    1: {
        "limit": "memory.limit_in_bytes",
        "swap_limit": "memory.memsw.limit_in_bytes",  # of memory and swap together
        "peak": "memory.max_usage_in_bytes",
        "events": "memory.oom_control",
        "anonymous": "total_rss",
        "mapped": "total_mapped_file",
    },
    2: {
        "limit": "memory.max",
        "swap_limit": "memory.swap.max",
        "peak": "memory.peak",
        "events": "memory.events",
        "anonymous": "anon",
        "mapped": "file_mapped",
    },
}


@dataclass(frozen=True)
class MemoryGroup:
    """A group that exists; made and removed by :func:`memory_group`."""

    path: Path
    hierarchy: Hierarchy

    def wrap(self, command: Sequence[str]) -> list[str]:
        """``command``, run by a shell that joins the group first: nothing of it is loaded outside."""
        return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.path / "cgroup.procs"), *command]

    def peak_bytes(self) -> int | None:
        """Most memory, page cache included, that the group held; None where the system keeps no such mark."""
        try:
            return int(self._read("peak"))
        except OSError:
            return None

    def process_bytes(self) -> int:
        """Anonymous and mapped memory now, without page cache that is merely kept."""
        fields = parse_fields((self.path / "memory.stat").read_text())
        return fields[self.hierarchy.files["anonymous"]] + fields[self.hierarchy.files["mapped"]]

    def killed(self) -> bool:
        """Whether the system killed a process of the group for want of memory."""
        return parse_fields(self._read("events")).get("oom_kill", 0) > 0

    def _read(self, what: str) -> str:
        return (self.path / self.hierarchy.files[what]).read_text()


def parse_fields(text: str) -> dict[str, int]:
    r"""Lines ``name number``, as in ``memory.stat``.

    >>> parse_fields("cache 4096\noom_kill 1\n")
    {'cache': 4096, 'oom_kill': 1}
    """
    return {name: int(number) for name, number in (line.split() for line in text.splitlines())}


def find_hierarchy(mounts: str, own_groups: str) -> Hierarchy:
    """Where memory groups can be made.

    Args:
        mounts: text of ``/proc/mounts``.
        own_groups: text of ``/proc/self/cgroup``.

    Raises:
        GroupUnavailableError: nowhere.
    """
    unified = None
    for line in mounts.splitlines():
        _, mount, kind, options, *_ = line.split()
        if kind == "cgroup" and "memory" in options.split(","):
            return Hierarchy(1, Path(mount))
        if kind == "cgroup2":
            unified = Path(mount)
    if unified is None:
        raise GroupUnavailableError(f"{NO_LIMIT}no memory control groups are mounted.")
    own = next((line[3:] for line in own_groups.splitlines() if line.startswith("0::")), "/")
    directory = unified / own.lstrip("/")
    for candidate in (directory, *directory.parents):
        control = candidate / "cgroup.subtree_control"
        if control.exists() and "memory" in control.read_text().split():
            return Hierarchy(2, candidate)
        if candidate == unified:
            break
    raise GroupUnavailableError(f"{NO_LIMIT}no control group above this process hands its memory on to groups below.")


@contextlib.contextmanager
def memory_group(limit_bytes: int | None) -> Iterator[MemoryGroup]:
    """A fresh group, removed at the end; with ``limit_bytes`` None it only counts.

    Raises:
        GroupUnavailableError: on entering, with what stands in the way.
    """
    try:
        hierarchy = find_hierarchy(Path("/proc/mounts").read_text(), Path("/proc/self/cgroup").read_text())
        group = MemoryGroup(hierarchy.parent / f"pylomin-bench-{os.getpid()}-{time.monotonic_ns()}", hierarchy)
        group.path.mkdir()
    except OSError as error:
        raise GroupUnavailableError(f"{NO_LIMIT}{error.strerror} ({error.filename}).") from error
    try:
        if limit_bytes is not None:
            _set_limit(group, limit_bytes)
        yield group
    finally:
        _remove(group.path)


def _set_limit(group: MemoryGroup, limit_bytes: int) -> None:
    files = group.hierarchy.files
    try:
        (group.path / files["limit"]).write_text(str(limit_bytes))
    except OSError as error:
        raise GroupUnavailableError(f"{NO_LIMIT}{error.strerror} ({error.filename}).") from error
    swap_limit = group.path / files["swap_limit"]
    if swap_limit.exists():  # absent where the system has no swap accounting
        swap_limit.write_text(str(limit_bytes if group.hierarchy.version == 1 else 0))


def _remove(path: Path) -> None:
    deadline = time.monotonic() + REMOVAL_S
    while True:
        try:
            path.rmdir()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def own_process_bytes() -> int:
    """What :meth:`MemoryGroup.process_bytes` says of the group that this process was put into."""
    hierarchy = find_hierarchy(Path("/proc/mounts").read_text(), Path("/proc/self/cgroup").read_text())
    controller = {1: "memory", 2: ""}[hierarchy.version]
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            # The hierarchy may be mounted from below its root; our groups are direct children of the parent.
            return MemoryGroup(hierarchy.parent / Path(path).name, hierarchy).process_bytes()
    raise GroupUnavailableError(f"{NO_LIMIT}this process is in no memory group.")
