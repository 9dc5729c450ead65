from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from benchmarks import disk
from benchmarks.disk import cached_share, disk_bandwidth, drop_caches, speeds_together

PAGE_BYTES = 4096


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(10 * PAGE_BYTES + 5))
    return path


@pytest.mark.parametrize("mode", ["direct", "buffered"])
def test_bandwidth_reads_all_of_the_file(file: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0])
    monkeypatch.setattr(disk.time, "perf_counter", lambda: next(clock))
    assert disk_bandwidth(file, mode, 4 * PAGE_BYTES) == file.stat().st_size / 2  # type: ignore[arg-type]


def test_dropping_says_what_it_could_not_do(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(disk, "DROP_CACHES", tmp_path / "missing" / "drop_caches")
    assert "posix_fadvise" in drop_caches([file])
    monkeypatch.setattr(disk, "DROP_CACHES", tmp_path / "drop_caches")
    assert "all caches" in drop_caches([file])
    assert (tmp_path / "drop_caches").read_text() == "3"


def test_cached_share_of_a_file_that_was_just_read(file: Path) -> None:
    file.read_bytes()
    assert cached_share(file) in (None, 1.0)


def test_speeds_together_are_of_the_time_that_is_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "ENOUGH_S", 0.05)
    monkeypatch.setattr(disk, "LOAD_ROWS", 1024)
    reading = []

    def slow(*args: object) -> float:
        reading.append(args)
        time.sleep(0.05)
        return 3e9

    monkeypatch.setattr(disk, "disk_bandwidth", slow)
    bytes_per_s, share = speeds_together(file, "buffered", PAGE_BYTES)
    assert reading == [(file, "buffered", PAGE_BYTES)]
    assert bytes_per_s == 3e9
    assert share > 0
