from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from pylomin.residency.memory_limits import MemoryLimits, memory_limits

MIB = 1 << 20
MEMINFO = "MemTotal:       4096 kB\nMemFree:        1 kB\nMemAvailable:   2048 kB\nSwapFree: 9 kB"
NO_LIMIT = resource.RLIM_INFINITY


@pytest.fixture(autouse=True)
def rlimits(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Soft limits of this process; none but what a test sets."""
    limits: dict[int, int] = {}
    monkeypatch.setattr(resource, "getrlimit", lambda number: (limits.get(number, NO_LIMIT), NO_LIMIT))
    return limits


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(MEMINFO, encoding="ascii")
    (tmp_path / "proc/self/status").write_text("Name:\tpython\nVmSize:\t   100 kB\nVmData:\t    40 kB\n", "ascii")
    return tmp_path


def put_in_group(root: Path, limit: str, current: int) -> None:
    (root / "proc/self/cgroup").write_text("0::/app", "ascii")
    (root / "proc/self/mountinfo").write_text("31 23 0:28 / /cg rw - cgroup2 cgroup2 rw", "ascii")
    (root / "cg/app").mkdir(parents=True)
    (root / "cg/app/memory.max").write_text(limit, "ascii")
    (root / "cg/app/memory.current").write_text(str(current), "ascii")


def test_the_machine(root: Path) -> None:
    assert memory_limits(root) == MemoryLimits(None, 2 * MIB, "the machine: 2.0 MiB of 4.0 MiB available")


def test_a_control_group(root: Path) -> None:
    put_in_group(root, str(MIB), MIB // 4)
    source = "control group /cg/app: 256.0 KiB of 1.0 MiB used"
    assert memory_limits(root) == MemoryLimits(MIB, 3 * MIB // 4, source)


def test_a_limit_above_what_the_machine_has(root: Path) -> None:
    put_in_group(root, str(3 * MIB), 0)
    assert memory_limits(root) == MemoryLimits(3 * MIB, 2 * MIB, "the machine: 2.0 MiB of 4.0 MiB available")


def test_a_group_without_limit(root: Path) -> None:
    put_in_group(root, "max", 0)
    assert memory_limits(root).limit_bytes is None


@pytest.mark.parametrize(
    ("number", "name", "used_kib"), [(resource.RLIMIT_AS, "RLIMIT_AS", 100), (resource.RLIMIT_DATA, "RLIMIT_DATA", 40)]
)
def test_resource_limits(root: Path, rlimits: dict[int, int], number: int, name: str, used_kib: int) -> None:
    rlimits[number] = MIB
    source = f"{name} of this process: {used_kib}.0 KiB of 1.0 MiB used"
    assert memory_limits(root) == MemoryLimits(MIB, MIB - (used_kib << 10), source)
    rlimits[number] = 10
    assert memory_limits(root).available_bytes == 0
    (root / "proc/self/status").unlink()
    assert memory_limits(root).available_bytes == 10


def test_the_lowest_limit_and_the_tightest_need_not_be_the_same(root: Path, rlimits: dict[int, int]) -> None:
    put_in_group(root, str(3 * MIB // 2), 3 * MIB // 2 - 5)
    rlimits[resource.RLIMIT_AS] = MIB
    found = memory_limits(root)
    assert (found.limit_bytes, found.available_bytes) == (MIB, 5)
    assert "control group" in found.source


@pytest.mark.parametrize("meminfo", [None, "", "MemTotal: 5 kB", "MemAvailable: many kB\nMemTotal: 5 kB"])
def test_without_meminfo(root: Path, monkeypatch: pytest.MonkeyPatch, meminfo: str | None) -> None:
    """Other systems say how much memory there is, and no more."""
    (root / "proc/meminfo").unlink()
    if meminfo is not None:
        (root / "proc/meminfo").write_text(meminfo, encoding="ascii")
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 512, "SC_PAGE_SIZE": 4096}.__getitem__)
    source = "the machine: 2.0 MiB in all; how much is free it does not say"
    assert memory_limits(root) == MemoryLimits(None, 2 * MIB, source)


@pytest.mark.parametrize("error", [ValueError("unrecognized configuration name"), OSError("no"), None])
def test_a_system_that_says_nothing(root: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
    def sysconf(name: str) -> int:
        if error is not None:
            raise error
        return -1 if name == "SC_PHYS_PAGES" else 4096

    (root / "proc/meminfo").unlink()
    monkeypatch.setattr(os, "sysconf", sysconf)
    assert memory_limits(root) == MemoryLimits(None, None, "the system does not say how much memory it has")


def test_this_machine() -> None:
    found = memory_limits()
    assert found.available_bytes is not None
    assert 0 < found.available_bytes < 1 << 50
    assert found.source
