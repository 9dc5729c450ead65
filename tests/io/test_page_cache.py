from __future__ import annotations

import errno
import os
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pylomin.errors import StoreReadError
from pylomin.io import files, page_cache, syscalls
from pylomin.io.buffers import PAGE_BYTES
from pylomin.io.files import Extent, WeightFile

PAGES = 64


@pytest.fixture
def file(path: Path) -> WeightFile:
    path.write_bytes(bytes(PAGES * PAGE_BYTES))
    return WeightFile(path)


class Cache:
    """Stands for the system's page cache: a set of pages."""

    def __init__(self, patch: pytest.MonkeyPatch, *, counts: bool) -> None:
        self.pages: set[int] = set()
        self.asked = 0
        self.probe_error = errno.EAGAIN
        patch.setattr(os, "preadv", self.preadv)
        patch.setattr(os, "RWF_NOWAIT", 8, raising=False)
        patch.setattr(syscalls, "cached_pages", self.count if counts else lambda fd, offset, nbytes: None)

    def preadv(self, fd: int, buffers: list[bytearray], offset: int, flags: int) -> int:
        assert (len(buffers[0]), flags) == (1, 8)
        self.asked += 1
        if offset // PAGE_BYTES not in self.pages:
            raise OSError(self.probe_error, os.strerror(self.probe_error))
        return 1

    def count(self, fd: int, offset: int, nbytes: int) -> int:
        self.asked += 1
        return len(self.pages & set(range(offset // PAGE_BYTES, (offset + nbytes - 1) // PAGE_BYTES + 1)))


@pytest.mark.parametrize("counts", [True, False])
class TestCachedFraction:
    @pytest.mark.parametrize("cached", [0, 16, 32, 64])
    def test_one_extent(self, file: WeightFile, monkeypatch: pytest.MonkeyPatch, counts: bool, cached: int) -> None:
        cache = Cache(monkeypatch, counts=counts)
        cache.pages = set(range(cached))
        assert file.cached_fraction([Extent(0, PAGES * PAGE_BYTES)]) == cached / PAGES

    def test_many_extents_are_sampled(self, file: WeightFile, monkeypatch: pytest.MonkeyPatch, counts: bool) -> None:
        cache = Cache(monkeypatch, counts=counts)
        cache.pages = set(range(PAGES // 2))
        extents = [Extent(start, start + 100) for start in range(0, PAGES * PAGE_BYTES, 100)]
        fraction = file.cached_fraction(extents, samples=20)
        assert fraction == pytest.approx(0.5, abs=0.06)
        assert cache.asked <= 21

    def test_nothing(self, file: WeightFile, monkeypatch: pytest.MonkeyPatch, counts: bool) -> None:
        Cache(monkeypatch, counts=counts)
        assert file.cached_fraction([]) is None
        assert file.cached_fraction([Extent(5, 5)]) is None
        file.close()
        assert file.cached_fraction([Extent(0, 5)]) is None


def test_only_what_is_asked_for(file: WeightFile, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(monkeypatch, counts=True)
    cache.pages = {3}
    page = [Extent(i * PAGE_BYTES, (i + 1) * PAGE_BYTES) for i in range(5)]
    assert file.cached_fraction([page[3]]) == 1
    assert file.cached_fraction([page[2], page[4]]) == 0
    assert file.cached_fraction([page[2], page[3]]) == 0.5


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL, errno.EIO])
def test_a_file_system_that_cannot_tell(file: WeightFile, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    cache = Cache(monkeypatch, counts=False)
    cache.probe_error = number
    assert file.cached_fraction([Extent(0, 5)]) is None


def test_a_system_that_cannot_tell(file: WeightFile, monkeypatch: pytest.MonkeyPatch) -> None:
    Cache(monkeypatch, counts=False)
    monkeypatch.delattr(os, "RWF_NOWAIT")
    assert file.cached_fraction([Extent(0, 5)]) is None


def test_the_real_cache(file: WeightFile, path: Path) -> None:
    """Just read, it is there. What the kernel counts and what a probe finds agree, where both can tell."""
    path.read_bytes()
    whole = (0, PAGES * PAGE_BYTES)
    fd = file._descriptor.fd
    found = [page_cache._counted(fd, [whole], 10), page_cache._probed(fd, [whole], 10)]
    assert {fraction for fraction in found if fraction is not None} <= {1.0}
    assert syscalls.cached_pages(-1, 0, 10) is None


def test_dropping_the_real_cache(file: WeightFile, path: Path) -> None:
    """File systems in memory keep their pages; others keep none after such a read."""
    with open(path, "rb") as same:
        os.fsync(same.fileno())
    extents = [Extent(0, PAGES * PAGE_BYTES)]
    page_cache.drop(file._descriptor.fd, 0, PAGES * PAGE_BYTES)
    kept = file.cached_fraction(extents)
    file.read(0, [memoryview(bytearray(file.size_bytes))], drop_cache=True)
    assert file.cached_fraction(extents) == kept
    assert kept in (None, 0, 1)


def test_a_read_that_drops(file: WeightFile, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Piece by piece, whole pages, also when a read fails."""
    data = bytes(range(256)) * (PAGES * PAGE_BYTES // 256)
    path.write_bytes(data)
    file = WeightFile(path)
    dropped: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "POSIX_FADV_DONTNEED", 4, raising=False)
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, start, n, advice: dropped.append((start, n)), raising=False)
    monkeypatch.setattr(files, "_DROPPED_BYTES", 2 * PAGE_BYTES)
    buffers = [bytearray(PAGE_BYTES + 1), bytearray(0), bytearray(3 * PAGE_BYTES)]
    file.read(100, [memoryview(buffer) for buffer in buffers], drop_cache=True)
    assert b"".join(buffers) == data[100 : 100 + 4 * PAGE_BYTES + 1]
    assert dropped == [(0, 3 * PAGE_BYTES), (2 * PAGE_BYTES, 3 * PAGE_BYTES), (4 * PAGE_BYTES, PAGE_BYTES)]

    with pytest.raises(StoreReadError, match=f"ends at byte {len(data)}: expected {6 * PAGE_BYTES} bytes at offset"):
        file.read(len(data) - 5 * PAGE_BYTES, [memoryview(bytearray(6 * PAGE_BYTES))], drop_cache=True)
    assert dropped[-1] == (len(data) - PAGE_BYTES, 2 * PAGE_BYTES)


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(1, 3000)), min_size=1, max_size=20),
    st.integers(1, 40),
)
def test_spread(pieces: list[tuple[int, int]], samples: int) -> None:
    """As many places as asked for at most, inside the ranges, at equal distances counted over their bytes."""
    ranges, position = [], 0
    for gap, nbytes in pieces:
        ranges.append((position + gap, position + gap + nbytes))
        position += gap + nbytes
    inside = [byte for start, stop in ranges for byte in range(start, stop)]
    places = [inside.index(place) for place in page_cache._spread(ranges, samples)]
    assert len(places) <= samples
    assert len({b - a for a, b in pairwise(places)}) <= 1
    assert places or len(inside) <= samples
