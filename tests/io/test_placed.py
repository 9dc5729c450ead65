from __future__ import annotations

import ctypes
import errno
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pylomin.errors import StoreChangedError, StoreReadError
from pylomin.io import syscalls
from pylomin.io.buffers import ALIGNMENT_BYTES, PAGE_BYTES, BufferPool
from pylomin.io.files import Extent, WeightFile
from pylomin.io.modes import Mode
from pylomin.io.placed import Placement, can_map, place, read_run
from tests.io.common import open_descriptors, overwrite, touch_later
from tests.robustness.interrupting import InterruptAt, places

MODES: list[Mode] = ["mapped", "buffered", "direct"]
DATA = random.Random(5).randbytes(1 << 20)


@pytest.fixture(scope="module")
def data_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("placed") / "weights.bin"
    path.write_bytes(DATA)
    return path


def load(file: WeightFile, placement: Placement, *, pool: BufferPool | None = None, drop_cache: bool = False) -> Any:
    buffer = placement.try_take(pool or BufferPool())
    for placed in placement.runs:
        read_run(file, placed, buffer, drop_cache=drop_cache)
    return buffer


def check(file: WeightFile, extents: Sequence[Extent], mode: Mode, *, drop_cache: bool = False) -> None:
    placement = place(extents, mode)
    if placement.buffer_bytes == 0:
        assert placement.runs == ()
        return
    buffer = load(file, placement, drop_cache=drop_cache)
    for extent, offset in zip(extents, placement.offsets, strict=True):
        if extent.nbytes:
            tensor = torch.frombuffer(buffer, dtype=torch.uint8, count=extent.nbytes, offset=offset)
            assert tensor.data_ptr() % ALIGNMENT_BYTES == 0
            assert ctypes.string_at(tensor.data_ptr(), extent.nbytes) == DATA[extent.start : extent.stop]


NBYTES = st.sampled_from([0, 1, 63, 64, 100, 4096, 70_000, 200_000]) | st.integers(0, 5000)


@st.composite
def some_extents(draw: st.DrawFn) -> list[Extent]:
    step = draw(st.sampled_from([1, 2, 64, 4096]))
    extents, position = [], draw(st.integers(0, 9000)) // step * step
    for _ in range(draw(st.integers(0, 8))):
        nbytes = draw(NBYTES)
        position += draw(st.sampled_from([0, 0, 1, 10, 64, 5000, 70_000, -100])) // step * step
        position = max(0, -(-position // step) * step)
        extents.append(Extent(min(position, len(DATA)), min(position + nbytes, len(DATA))))
        position += nbytes
    return draw(st.permutations(extents))


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=60, deadline=None)
@given(extents=some_extents(), drop_cache=st.booleans())
def test_values_and_alignment(data_path: Path, mode: Mode, extents: list[Extent], drop_cache: bool) -> None:
    check(WeightFile(data_path), extents, mode, drop_cache=drop_cache)


@given(some_extents(), st.sampled_from(MODES))
def test_layout(extents: list[Extent], mode: Mode) -> None:
    placement = place(extents, mode)
    wanted = [(e, o) for e, o in zip(extents, placement.offsets, strict=True) if e.nbytes]
    ends = 0
    for extent, offset in sorted(wanted, key=lambda item: item[1]):
        assert offset % ALIGNMENT_BYTES == 0
        assert offset >= ends, "no two share bytes"
        ends = offset + extent.nbytes
    assert ends <= placement.buffer_bytes
    for placed in placement.runs:
        assert placed.offsets == tuple(placement.offsets[i] for i in placed.run.members)
        assert placed.mode == mode or (mode == "mapped" and not can_map(placed.run.extents))
        if placed.mode != "buffered":
            assert placed.at_bytes % PAGE_BYTES == 0
    used = sum(extent.nbytes for extent, _ in wanted)
    slack = 3 * PAGE_BYTES if mode != "buffered" else ALIGNMENT_BYTES
    each = slack + (PAGE_BYTES if mode != "buffered" else ALIGNMENT_BYTES)
    assert placement.buffer_bytes <= used * 9 / 8 + each * len(wanted)


@pytest.mark.parametrize("mode", MODES)
def test_interrupts(data_path: Path, mode: Mode) -> None:
    """Wherever Ctrl-C stops a read: no memory, mapping or descriptor is left, and the next read is right."""
    file, pool = WeightFile(data_path), BufferPool()
    placement = place([Extent(64, 5000), Extent(5056, 90_000), Extent(300_032, 400_000)], mode)
    expected = load(file, placement, pool=pool)
    descriptors, held_bytes = open_descriptors(), pool.in_use_bytes()
    for stopped_at in places(lambda: load(file, placement, pool=pool)):
        with InterruptAt(*stopped_at):
            load(file, placement, pool=pool)
        assert pool.in_use_bytes() == held_bytes, stopped_at
        buffer = load(file, placement, pool=pool)
        for offset in placement.offsets:
            assert buffer[offset : offset + 4900] == expected[offset : offset + 4900], stopped_at
        del buffer
    del expected
    assert (pool.in_use_bytes(), open_descriptors()) == (0, descriptors)


def test_can_map() -> None:
    assert can_map([])
    assert can_map([Extent(64, 65), Extent(128, 1000)])
    assert not can_map([Extent(64, 65), Extent(65, 1000)])


def test_mapped_pages_are_the_files_own(data_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And runs that cannot be used where they lie are read into the same buffer."""
    mapped: list[tuple[int, int]] = []
    map_file = syscalls.map_file

    def watch(address: int, nbytes: int, fd: int, offset: int) -> None:
        mapped.append((offset, nbytes))
        map_file(address, nbytes, fd, offset)

    monkeypatch.setattr(syscalls, "map_file", watch)
    aligned_run, other_run = [Extent(4096, 5000), Extent(5056, 6000)], [Extent(200_001, 300_000)]
    check(WeightFile(data_path), other_run + aligned_run, "mapped")
    assert mapped == [(4096, 4096)]
    check(WeightFile(data_path, watched=False), other_run + aligned_run, "mapped")
    assert len(mapped) == 1, "a private file is read"

    def refuse(address: int, nbytes: int, fd: int, offset: int) -> None:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(syscalls, "map_file", refuse)
    check(WeightFile(data_path), other_run + aligned_run, "mapped")


@pytest.mark.parametrize("mode", MODES)
class TestFaults:
    EXTENTS = (Extent(64, 5000), Extent(5056, 90_000), Extent(300_032, 400_000))

    @pytest.fixture
    def file(self, path: Path) -> WeightFile:
        path.write_bytes(DATA)
        return WeightFile(path)

    def test_truncated(self, file: WeightFile, path: Path, mode: Mode) -> None:
        overwrite(path, DATA[:350_000])
        with pytest.raises(StoreChangedError, match="found 350000 bytes"):
            load(file, place(self.EXTENTS, mode))
        with pytest.raises(StoreReadError, match="ends at byte 350000: expected 99968 bytes at offset 300032"):
            load(WeightFile(path), place(self.EXTENTS, mode))

    def test_changed_and_mended(self, file: WeightFile, path: Path, mode: Mode) -> None:
        file.set_validation(lambda read: True)
        touch_later(path)
        pool = BufferPool()
        with pytest.raises(StoreChangedError, match="the next read accepts the new content"):
            load(file, place(self.EXTENTS, mode), pool=pool)
        check(file, self.EXTENTS, mode)
        assert pool.in_use_bytes() == 0

    def test_deleted_then_closed(self, file: WeightFile, path: Path, mode: Mode) -> None:
        path.unlink()
        check(file, self.EXTENTS, mode)
        file.close()
        with pytest.raises(StoreReadError, match="is closed"):
            load(file, place(self.EXTENTS, mode))

    def test_no_room(self, file: WeightFile, mode: Mode) -> None:
        placement = place(self.EXTENTS, mode)
        assert placement.try_take(BufferPool(limit_bytes=placement.buffer_bytes - 1)) is None
        pool = BufferPool(limit_bytes=-(-placement.buffer_bytes // PAGE_BYTES) * PAGE_BYTES)
        for _ in range(3):
            assert load(file, placement, pool=pool) is not None
        assert pool.in_use_bytes() == 0
