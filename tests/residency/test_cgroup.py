"""Control groups on fabricated trees, in the layouts that are met in practice, and one real group where permitted."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pylomin.residency import cgroup
from pylomin.residency.cgroup import CgroupMemory, limited_cgroups

V1_NO_LIMIT = "9223372036854771712"
V1_MOUNT = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
V2_MOUNT = "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
HYBRID_MOUNTS = f"""\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
{V1_MOUNT}
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""


class Tree:
    """A root directory with ``proc`` and control groups."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def process(self, cgroup: str, mountinfo: str) -> None:
        self.write("proc/self/cgroup", cgroup)
        self.write("proc/self/mountinfo", mountinfo)

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")

    def v2(self, directory: str, maximum: object, current: int, inactive: int = 0, high: object = "max") -> None:
        self.write(f"{directory}/memory.max", str(maximum))
        self.write(f"{directory}/memory.high", str(high))
        self.write(f"{directory}/memory.current", str(current))
        self.write(f"{directory}/memory.stat", f"anon 5\ninactive_file {inactive}\ntotal_inactive_file 77")

    def v1(self, directory: str, limit: object, usage: int, inactive: int = 0) -> None:
        self.write(f"{directory}/memory.limit_in_bytes", str(limit))
        self.write(f"{directory}/memory.usage_in_bytes", str(usage))
        self.write(f"{directory}/memory.stat", f"inactive_file 77\ntotal_inactive_file {inactive}\nhierarchical 1")

    def found(self) -> list[CgroupMemory]:
        return list(limited_cgroups(self.root))


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_v2(tree: Tree) -> None:
    tree.process("0::/app", V2_MOUNT)
    tree.v2("sys/fs/cgroup/app", 1000, current=700, inactive=300)
    (group,) = tree.found()
    assert group == CgroupMemory("/sys/fs/cgroup/app", limit_bytes=1000, used_bytes=400)
    assert group.available_bytes == 600


def test_v2_the_lower_of_max_and_high(tree: Tree) -> None:
    tree.process("0::/app", V2_MOUNT)
    tree.v2("sys/fs/cgroup/app", 1000, current=0, high=900)
    assert [group.limit_bytes for group in tree.found()] == [900]
    tree.v2("sys/fs/cgroup/app", "max", current=0, high=800)
    assert [group.limit_bytes for group in tree.found()] == [800]
    tree.v2("sys/fs/cgroup/app", 700, current=0, high=800)
    assert [group.limit_bytes for group in tree.found()] == [700]


def test_v2_nested(tree: Tree) -> None:
    """The group itself has no limit; two of those above it have. Siblings do not matter."""
    tree.process("0::/machine/pod/app", V2_MOUNT)
    tree.v2("sys/fs/cgroup/machine", 5000, current=4000)
    tree.v2("sys/fs/cgroup/machine/pod", 3000, current=500)
    tree.v2("sys/fs/cgroup/machine/pod/app", "max", current=500)
    tree.v2("sys/fs/cgroup/machine/pod/other", 10, current=10)
    assert [(g.directory, g.available_bytes) for g in tree.found()] == [
        ("/sys/fs/cgroup/machine/pod", 2500),
        ("/sys/fs/cgroup/machine", 1000),
    ]


def test_v1(tree: Tree) -> None:
    tree.process("5:devices:/x\n4:cpu,memory:/docker/1f\n", V1_MOUNT)
    tree.v1("sys/fs/cgroup/memory", V1_NO_LIMIT, usage=10**9)
    tree.v1("sys/fs/cgroup/memory/docker", V1_NO_LIMIT, usage=10**9)
    tree.v1("sys/fs/cgroup/memory/docker/1f", 2000, usage=1500, inactive=200)
    assert tree.found() == [CgroupMemory("/sys/fs/cgroup/memory/docker/1f", 2000, 1300)]


def test_v1_mounted_from_inside(tree: Tree) -> None:
    """A container without a namespace of its own: the path is that of the host, the mount shows only our part."""
    mount = "35 31 0:32 /docker/1f /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory"
    tree.process("4:memory:/docker/1f/job", mount)
    tree.v1("sys/fs/cgroup/memory", 2000, usage=100)
    tree.v1("sys/fs/cgroup/memory/job", 1000, usage=50)
    tree.v1("sys/fs/cgroup/memory/docker/1f", 1, usage=1)
    assert [group.limit_bytes for group in tree.found()] == [1000, 2000]


@pytest.mark.parametrize("own", ["/elsewhere", "/../../other", "/", "/docker/1fff"])
def test_a_path_that_the_mount_does_not_show(tree: Tree, own: str) -> None:
    mount = "35 31 0:32 /docker/1f /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory"
    tree.process(f"4:memory:{own}", mount)
    tree.v1("sys/fs/cgroup/memory", 2000, usage=100)
    assert [group.limit_bytes for group in tree.found()] == [2000]


def test_hybrid(tree: Tree) -> None:
    """Version 1 has the memory controller; version 2 is mounted too, and knows nothing of memory."""
    tree.process("9:name=systemd:/\n4:memory:/app\n0::/app\n", HYBRID_MOUNTS)
    tree.v1("sys/fs/cgroup/memory", V1_NO_LIMIT, usage=0)
    tree.v1("sys/fs/cgroup/memory/app", 2000, usage=500)
    (tree.root / "sys/fs/cgroup/unified/app").mkdir(parents=True)
    assert tree.found() == [CgroupMemory("/sys/fs/cgroup/memory/app", 2000, 500)]


def test_both_versions_with_limits(tree: Tree) -> None:
    tree.process("4:memory:/app\n0::/app\n", HYBRID_MOUNTS)
    tree.v1("sys/fs/cgroup/memory/app", 2000, usage=500)
    tree.v2("sys/fs/cgroup/unified/app", 1000, current=500)
    assert sorted(group.limit_bytes for group in tree.found()) == [1000, 2000]


def test_no_limits(tree: Tree) -> None:
    tree.process("0::/app", V2_MOUNT)
    tree.v2("sys/fs/cgroup/app", "max", current=700)
    assert tree.found() == []


@pytest.mark.parametrize("missing", ["cgroup", "mountinfo", "both"])
def test_no_proc(tree: Tree, missing: str) -> None:
    tree.process("0::/app", V2_MOUNT)
    tree.v2("sys/fs/cgroup/app", 1000, current=700)
    for name in ("cgroup", "mountinfo"):
        if missing in (name, "both"):
            (tree.root / "proc/self" / name).unlink()
    assert tree.found() == []


def test_a_group_that_is_gone(tree: Tree) -> None:
    """Those above it still count."""
    tree.process("0::/pod/app (deleted)", V2_MOUNT)
    tree.v2("sys/fs/cgroup/pod", 1000, current=700)
    assert [group.limit_bytes for group in tree.found()] == [1000]


@pytest.mark.parametrize("name", ["memory.max", "memory.current"])
@pytest.mark.parametrize("damage", ["missing", "directory", "empty", "words", "negative", "other digits"])
def test_files_that_cannot_be_used(tree: Tree, name: str, damage: str) -> None:
    tree.process("0::/app", V2_MOUNT)
    tree.v2("sys/fs/cgroup/app", 1000, current=700)
    file = tree.root / "sys/fs/cgroup/app" / name
    file.unlink()
    if damage == "directory":  # unreadable also for root
        file.mkdir()
    elif damage != "missing":
        file.write_text({"empty": "", "words": "many", "negative": "-1", "other digits": "١٢٣"}[damage], "utf-8")
    assert tree.found() == []


def test_without_statistics(tree: Tree) -> None:
    tree.process("0::/app", V2_MOUNT)
    tree.v2("sys/fs/cgroup/app", 1000, current=700, inactive=300)
    (tree.root / "sys/fs/cgroup/app/memory.stat").unlink()
    assert [group.used_bytes for group in tree.found()] == [700]


def test_more_used_than_allowed(tree: Tree) -> None:
    tree.process("0::/app", V2_MOUNT)
    tree.v2("sys/fs/cgroup/app", 1000, current=1700)
    assert [group.available_bytes for group in tree.found()] == [0]
    tree.v2("sys/fs/cgroup/app", 1000, current=100, inactive=200)
    assert [group.available_bytes for group in tree.found()] == [1000]


def test_a_mount_point_with_spaces(tree: Tree) -> None:
    tree.process("0::/a b", "31 23 0:28 / /odd\\040place rw - cgroup2 cgroup2 rw")
    tree.v2("odd place/a b", 1000, current=0)
    assert [group.directory for group in tree.found()] == ["/odd place/a b"]


@given(st.text(), st.text())
def test_any_text_is_survived(tmp_path_factory: pytest.TempPathFactory, own: str, mountinfo: str) -> None:
    tree = Tree(tmp_path_factory.getbasetemp() / "any_text")
    with contextlib.suppress(UnicodeEncodeError):
        tree.process(own, mountinfo)
    assert tree.found() == []


def _memory_directories() -> Iterator[tuple[Path, str]]:
    """Where groups with a memory limit may be made: a directory, and the name of the limit."""
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split()[:3]
        mount = Path(before.split()[4])
        if kind == "cgroup" and "memory" in options.split(","):
            yield mount, "memory.limit_in_bytes"
        elif kind == "cgroup2":
            yield mount, "memory.max"


@contextlib.contextmanager
def _real_group(limit_bytes: int) -> Iterator[Path | None]:
    """A new group, or None where this user may make none."""
    for mount, name in _memory_directories() if sys.platform == "linux" else ():
        group = mount / f"pylomin-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            try:
                if not (group / name).exists():
                    continue
                (group / name).write_text(str(limit_bytes), encoding="ascii")
            except OSError:
                continue
            yield group
            return
        finally:
            group.rmdir()
    yield None


def test_a_real_group() -> None:
    """A process started in a group finds its limit. Where none may be made, it finds what its parent finds."""
    limit_bytes = 321 << 20
    # The module alone: importing the package, and torch with it, takes seconds.
    script = (
        "import runpy, sys; from pathlib import Path\n"
        "if sys.argv[2]: Path(sys.argv[2], 'cgroup.procs').write_text('0')\n"
        "limited_cgroups = runpy.run_path(sys.argv[1])['limited_cgroups']\n"
        "print([(group.directory, group.limit_bytes) for group in limited_cgroups(Path('/'))])\n"
    )
    inherited = [(group.directory, group.limit_bytes) for group in limited_cgroups(Path("/"))]
    with _real_group(limit_bytes) as group:
        process = subprocess.run(
            [sys.executable, "-c", script, cgroup.__file__, str(group or "")],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
    assert process.returncode == 0, process.stderr
    expected = [(str(group), limit_bytes)] if group else inherited
    assert str(expected)[1:-1] in process.stdout
