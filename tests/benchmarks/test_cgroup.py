from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks import cgroup
from benchmarks.cgroup import GroupUnavailableError, Hierarchy, find_hierarchy, memory_group, parse_fields

V1_MOUNTS = """\
tmpfs /sys/fs/cgroup tmpfs rw,mode=755 0 0
cgroup /sys/fs/cgroup/cpu cgroup rw,relatime,cpu 0 0
cgroup /sys/fs/cgroup/memory cgroup rw,relatime,memory 0 0
cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0
"""


def test_version_1_is_preferred_where_it_has_the_memory_controller() -> None:
    assert find_hierarchy(V1_MOUNTS, "4:memory:/\n0::/\n") == Hierarchy(1, Path("/sys/fs/cgroup/memory"))


def test_version_2_group_goes_where_memory_is_handed_on(tmp_path: Path) -> None:
    own = tmp_path / "user.slice" / "session.scope"
    own.mkdir(parents=True)
    (own / "cgroup.subtree_control").write_text("\n")
    (own.parent / "cgroup.subtree_control").write_text("cpu memory\n")
    found = find_hierarchy(f"cgroup2 {tmp_path} cgroup2 rw 0 0\n", "0::/user.slice/session.scope\n")
    assert found == Hierarchy(2, own.parent)


@pytest.mark.parametrize("mounts", ["proc /proc proc rw 0 0\n", "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n"])
def test_no_hierarchy_says_so(mounts: str) -> None:
    with pytest.raises(GroupUnavailableError, match=r"no memory limit: no memory control groups are mounted"):
        find_hierarchy(mounts, "0::/\n")


def test_version_2_without_the_controller_says_so(tmp_path: Path) -> None:
    (tmp_path / "cgroup.subtree_control").write_text("cpu\n")
    with pytest.raises(GroupUnavailableError, match="hands its memory on"):
        find_hierarchy(f"cgroup2 {tmp_path} cgroup2 rw 0 0\n", "0::/\n")


def test_fields() -> None:
    assert parse_fields("total_rss 4096\ntotal_mapped_file 8192\n") == {"total_rss": 4096, "total_mapped_file": 8192}


@pytest.fixture
def hierarchy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Hierarchy:
    """Ordinary files in place of the system's."""
    found = Hierarchy(request.param, tmp_path)
    monkeypatch.setattr(cgroup, "find_hierarchy", lambda mounts, own_groups: found)
    monkeypatch.setattr(cgroup, "_remove", shutil.rmtree)
    return found


@pytest.mark.parametrize("hierarchy", [1, 2], indirect=True)
def test_group_has_its_limit_tells_what_happened_and_goes(hierarchy: Hierarchy, tmp_path: Path) -> None:
    with memory_group(1 << 20) as group:
        assert (group.path / hierarchy.files["limit"]).read_text() == str(1 << 20)
        assert group.wrap(["true"])[-2:] == [str(group.path / "cgroup.procs"), "true"]
        events = group.path / hierarchy.files["events"]
        events.write_text("oom_kill 0\n")
        assert not group.killed()
        events.write_text("under_oom 0\noom_kill 1\n")
        assert group.killed()
        assert group.peak_bytes() is None
        (group.path / hierarchy.files["peak"]).write_text("123\n")
        assert group.peak_bytes() == 123
        (group.path / "memory.stat").write_text(
            f"cache 7\n{hierarchy.files['anonymous']} 10\n{hierarchy.files['mapped']} 5\n"
        )
        assert group.process_bytes() == 15
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("hierarchy", [2], indirect=True)
def test_no_right_to_make_a_group_says_so(hierarchy: Hierarchy, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(GroupUnavailableError, match=r"no memory limit: Permission denied"), memory_group(1 << 20):
        pass
