from __future__ import annotations

import ctypes
import errno
import gc
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pylomin.errors import StoreChangedError, StoreReadError
from pylomin.io import syscalls
from pylomin.io.buffers import HUGE_PAGE_BYTES, PAGE_BYTES, BufferPool, observe
from pylomin.io.files import Extent, WeightFile
from pylomin.io.mapping import drop_shown, mapped_bytes
from pylomin.io.placed import place, read_run
from tests.io.common import CONTENT, open_descriptors, overwrite, shown_of, touch_later

linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own figures are those of Linux")


def mapped(
    file: WeightFile, offset: int = 0, nbytes: int = len(CONTENT), pool: BufferPool | None = None
) -> torch.Tensor:
    pages = (pool or BufferPool()).try_take_pages(mapped_bytes(offset, nbytes))
    assert pages is not None
    assert file.map(offset, nbytes, pages)
    return torch.frombuffer(pages, dtype=torch.uint8, count=nbytes, offset=offset % PAGE_BYTES)


def content(tensor: torch.Tensor) -> bytes:
    return ctypes.string_at(tensor.data_ptr(), tensor.numel())


def mappings_of(path: Path) -> int:
    return len(shown_of(path))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE_BYTES


def after(patch: pytest.MonkeyPatch, name: str, then: Callable[[], object]) -> None:
    """Do something else right after a system call."""
    call = getattr(syscalls, name)

    def both(*arguments: int) -> None:
        call(*arguments)
        then()

    patch.setattr(syscalls, name, both)


@pytest.mark.parametrize(
    ("offset", "nbytes", "expected"),
    [(0, 1, 1), (0, PAGE_BYTES, 1), (1, PAGE_BYTES, 2), (PAGE_BYTES - 1, 2, 2), (3 * PAGE_BYTES, PAGE_BYTES + 1, 2)],
)
def test_mapped_bytes(offset: int, nbytes: int, expected: int) -> None:
    assert mapped_bytes(offset, nbytes) == expected * PAGE_BYTES


@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [(0, len(CONTENT)), (0, 1), (len(CONTENT) - 1, 1), (5000, 7000), (64, 4032), (8192, 4096)],
)
def test_values(path: Path, offset: int, nbytes: int) -> None:
    assert content(mapped(WeightFile(path), offset, nbytes)) == CONTENT[offset : offset + nbytes]


def test_several_ranges_in_the_same_pages(path: Path) -> None:
    file = WeightFile(path)
    pages = BufferPool().try_take_pages(3 * PAGE_BYTES)
    assert pages is not None
    file.map(8192, 10, pages, 0)
    file.map(5, 4096, pages, PAGE_BYTES)
    assert pages[:10] == CONTENT[8192:8202]
    assert pages[PAGE_BYTES + 5 : PAGE_BYTES + 5 + 4096] == CONTENT[5:4101]


@pytest.mark.parametrize(
    ("at", "nbytes"), [(1, 10), (-PAGE_BYTES, 10), (2 * PAGE_BYTES, 1), (PAGE_BYTES, PAGE_BYTES + 1)]
)
def test_a_range_that_does_not_fit(path: Path, at: int, nbytes: int) -> None:
    pages = BufferPool().try_take_pages(2 * PAGE_BYTES)
    assert pages is not None
    with pytest.raises(ValueError, match="do not fit"):
        WeightFile(path).map(0, nbytes, pages, at)


def test_a_write_stays_in_memory(path: Path) -> None:
    file = WeightFile(path)
    tensor = mapped(file)
    tensor.fill_(7)
    assert bool((tensor == 7).all())
    assert path.read_bytes() == CONTENT
    assert content(mapped(file)) == CONTENT


def test_the_pool_counts_pages_until_the_last_view_dies(path: Path) -> None:
    seen: list[int] = []
    gc.collect()
    undo = observe(seen.append)
    pool = BufferPool(limit_bytes=4 * PAGE_BYTES)
    tensor = mapped(WeightFile(path), 100, PAGE_BYTES, pool)
    view = tensor[5:].view(-1)
    del tensor
    assert pool.in_use_bytes() == pool.peak_bytes == 2 * PAGE_BYTES
    assert pool.try_take_pages(3 * PAGE_BYTES) is None
    del view
    assert pool.in_use_bytes() == pool.free_bytes == 0
    assert pool.try_take_pages(4 * PAGE_BYTES) is not None
    assert pool.in_use_bytes() == sum(seen) == 0
    undo()


def test_idle_pages_do_not_count(path: Path) -> None:
    seen: list[int] = []
    gc.collect()
    undo = observe(seen.append)
    file, pool = WeightFile(path), BufferPool(limit_bytes=4 * PAGE_BYTES)
    pages = pool.try_take_pages(mapped_bytes(100, PAGE_BYTES))
    assert pages is not None
    for again in (False, True, True):
        assert file.map(100, PAGE_BYTES, pages, again=again)
        assert pool.in_use_bytes() == sum(seen) == pool.asked_bytes() == 2 * PAGE_BYTES
        assert pages[100:200] == CONTENT[100:200]
        pages[100:200] = bytes(100)
        drop_shown(100, PAGE_BYTES, pages, 0)
        pool.set_idle(pages)
        assert pool.in_use_bytes() == sum(seen) == pool.asked_bytes() == 0
        others = pool.try_take_pages(3 * PAGE_BYTES)
        assert others is not None
        assert not pool.try_use_again(pages), "their memory is in use by others now"
        assert pool.in_use_bytes() == 3 * PAGE_BYTES
        del others
        assert pool.try_use_again(pages)
    pool.set_idle(pages)
    pool.set_idle(pages)
    del pages
    assert pool.in_use_bytes() == sum(seen) == 0
    undo()


@linux
@pytest.mark.parametrize("offset", [0, 4096 + 64, (2 << 20) - 64, (3 << 20) + 64])
def test_whole_huge_pages(tmp_path: Path, offset: int) -> None:
    path, nbytes = tmp_path / "weights", 3 << 20
    path.write_bytes(bytes(random.Random(0).randbytes(offset + nbytes)))
    placement = place([Extent(offset, offset + nbytes)], "mapped", whole_huge=True)
    (placed,) = placement.runs
    file, pool = WeightFile(path), BufferPool(limit_bytes=placement.memory_bytes)
    assert placement.memory_bytes == mapped_bytes(offset, nbytes), "what lies around it is not counted"
    pages = placement.try_take(pool)
    assert pages is not None
    around = offset // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES, -(-(offset + nbytes) // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    for again in (False, True):
        assert read_run(file, placed, pages, again=again)
        values = torch.frombuffer(pages, dtype=torch.uint8, count=nbytes, offset=placement.offsets[0])
        assert content(values) == path.read_bytes()[offset:]
        (shown,) = shown_of(path)
        assert shown.nbytes == around[1] - around[0]
        assert shown.resident_bytes >= nbytes
        del values
        placement.drop(pages)
        (shown,) = shown_of(path)
        assert shown.resident_bytes == 0
    del pages
    assert shown_of(path) == []


def test_rows_here_and_there_ask_for_no_huge_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are not cached, the system would read 2 MiB for each."""
    path, asked = tmp_path / "table", []
    path.write_bytes(bytes(5 << 20))
    monkeypatch.setattr(syscalls, "prefer_huge_pages", lambda address, nbytes: asked.append(nbytes))
    assert WeightFile(path).copy_cached([Extent(i << 20, (i << 20) + 64) for i in range(5)], memoryview(bytearray(320)))
    assert asked == []
    mapped(WeightFile(path), 0, 5 << 20)
    assert asked == [5 << 20]


def test_free_blocks_make_room_for_pages() -> None:
    pool = BufferPool(limit_bytes=1 << 20)
    pool.try_take(1 << 20)
    assert pool.free_bytes + pool.live_bytes == 1 << 20
    assert pool.try_take_pages(1 << 20) is not None


@linux
def test_thousands_leave_nothing(path: Path) -> None:
    file, pool = WeightFile(path), BufferPool()
    descriptors = open_descriptors()
    for i in range(3000):
        tensor = mapped(file, i, 5000, pool)
        assert int(tensor[0]) == CONTENT[i]
    assert open_descriptors() == descriptors
    assert mappings_of(path) == 1
    del tensor
    assert mappings_of(path) == 0, "unmapped at once, not when the pool is used again"
    assert pool.in_use_bytes() == 0


@linux
def test_many_at_a_time_need_no_descriptors(path: Path) -> None:
    file = WeightFile(path)
    descriptors = open_descriptors()
    tensors = [mapped(file, 4096 * (i % 4), 4096) for i in range(500)]
    assert (open_descriptors(), mappings_of(path)) == (descriptors, 500)
    tensors.clear()
    assert mappings_of(path) == 0


@linux
def test_memory_goes_with_the_mapping(path: Path) -> None:
    nbytes = 48 << 20
    path.write_bytes(bytes(nbytes))
    file = WeightFile(path)
    before = resident_bytes()
    tensor = mapped(file, 0, nbytes)
    assert resident_bytes() - before > 0.9 * nbytes, "faulted in ahead"
    del tensor
    assert resident_bytes() - before < 0.1 * nbytes


def test_closing_while_mapped(path: Path) -> None:
    file = WeightFile(path)
    tensor = mapped(file)
    file.close()
    del file
    assert content(tensor) == CONTENT


def test_closed(path: Path) -> None:
    file = WeightFile(path)
    file.close()
    with pytest.raises(StoreReadError, match="is closed"):
        mapped(file)


def test_deleted_and_replaced(path: Path) -> None:
    file = WeightFile(path)
    tensor = mapped(file)
    path.unlink()
    path.write_bytes(bytes(len(CONTENT)))
    assert content(tensor) == content(mapped(file)) == CONTENT


def test_a_private_file_is_not_mapped(path: Path) -> None:
    file, pages = WeightFile(path, watched=False), BufferPool().try_take_pages(PAGE_BYTES)
    assert pages is not None
    assert file.map_refused == "this process writes to it"
    assert not file.map(0, PAGE_BYTES, pages)
    assert pages[:] == bytes(PAGE_BYTES)


@pytest.mark.parametrize(("number", "remembered"), [(errno.ENODEV, True), (errno.ENOMEM, False)])
@pytest.mark.parametrize("left_a_hole", [False, pytest.param(True, marks=linux)])
def test_a_mapping_that_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remembered: bool, left_a_hole: bool
) -> None:
    """The pages stay ours, also where the kernel unmapped them before it failed."""
    file, pages = WeightFile(path), BufferPool().try_take_pages(2 * PAGE_BYTES)
    assert pages is not None

    def refuse(address: int, nbytes: int, fd: int, offset: int) -> None:
        if left_a_hole:
            assert ctypes.CDLL(None).munmap(ctypes.c_void_p(address), ctypes.c_size_t(nbytes)) == 0
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(syscalls, "map_file", refuse)
        assert not file.map(5, 100, pages, PAGE_BYTES)
    pages[PAGE_BYTES : PAGE_BYTES + 3] = b"abc"
    assert pages[:] == bytes(PAGE_BYTES) + b"abc" + bytes(PAGE_BYTES - 3)
    assert (file.map_refused is not None) == remembered
    assert file.map(5, 100, pages, PAGE_BYTES) != remembered
    if remembered:
        assert str(file.map_refused) == f"the file system refuses to map it: {os.strerror(number)} (errno {number})"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork(path: Path) -> None:
    """A child sees the values, writes to its own copy, drops its views, and maps anew; the parent notices nothing."""
    file, pool = WeightFile(path), BufferPool()
    tensor = mapped(file, pool=pool)
    pid = os.fork()
    if pid == 0:
        try:
            right = content(tensor) == CONTENT
            tensor.zero_()
            del tensor
            right = right and pool.in_use_bytes() == 0 and content(mapped(file, pool=pool)) == CONTENT
            os._exit(0 if right else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert content(tensor) == CONTENT
    assert pool.in_use_bytes() == len(CONTENT)


class TestFaults:
    def test_beyond_the_end(self, path: Path) -> None:
        message = rf"weight file '{path}' ends at byte 16384: expected 10 bytes at offset 16380, found 4"
        with pytest.raises(StoreReadError, match=message):
            mapped(WeightFile(path), 16380, 10)

    def test_pages_beyond_the_end(self, path: Path) -> None:
        with pytest.raises(StoreReadError, match=r"ends at byte 1000000: expected 10 bytes .*found 0"):
            mapped(WeightFile(path), 10**6, 10)

    def test_changed(self, path: Path) -> None:
        file = WeightFile(path)
        overwrite(path, CONTENT[:100])
        with pytest.raises(StoreChangedError, match=r"expected 16384 bytes .*found 100 bytes"):
            mapped(file)
        overwrite(path, CONTENT)

    @pytest.mark.parametrize("left", [0, 100, PAGE_BYTES, len(CONTENT) - 1])
    def test_truncated_while_mapping(self, path: Path, monkeypatch: pytest.MonkeyPatch, left: int) -> None:
        """No bus error, wherever the file ends."""
        file = WeightFile(path)
        with monkeypatch.context() as patch:
            after(patch, "map_file", lambda: overwrite(path, CONTENT[:left]))
            with pytest.raises(StoreReadError, match=f"ends at byte {left}|found {left} bytes"):
                mapped(file)
        overwrite(path, CONTENT)
        assert path.read_bytes() == CONTENT

    @pytest.mark.parametrize("name", ["map_file", "populate"])
    def test_changed_while_mapping(self, path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        file = WeightFile(path)
        after(monkeypatch, name, lambda: touch_later(path))
        with pytest.raises(StoreChangedError, match="was changed after it was opened"):
            mapped(file)

    def test_bad_disk(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The kernel says no more than "bad address"; a read says what it is."""

        def fail(*arguments: object) -> None:
            number = errno.EFAULT if isinstance(arguments[-1], int) and len(arguments) == 2 else errno.EIO
            raise OSError(number, os.strerror(number))

        file, pool = WeightFile(path), BufferPool()
        with monkeypatch.context() as patch:
            patch.setattr(syscalls, "populate", fail)
            patch.setattr(os, "preadv", fail)
            message = rf"reading 100 bytes at offset 5 of weight file '{path}' failed at offset 5: Input/output error"
            with pytest.raises(StoreReadError, match=message):
                mapped(file, 5, 100, pool)
        gc.collect()
        assert pool.in_use_bytes() == 0
        assert content(mapped(file, 5, 100, pool)) == CONTENT[5:105]

    def test_only_the_mapping_fails(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*arguments: int) -> None:
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))

        monkeypatch.setattr(syscalls, "populate", fail)
        with pytest.raises(StoreReadError, match=r"16384 bytes at offset 0 of .*Bad address \(errno 14\)"):
            mapped(WeightFile(path))

    def test_a_kernel_that_cannot_populate(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(syscalls, "_MADV_POPULATE_READ", 9999)
        assert content(mapped(WeightFile(path))) == CONTENT

    def test_an_impossible_mapping(self) -> None:
        with pytest.raises(OSError, match="Bad file descriptor"):
            syscalls.map_file(ctypes.addressof(ctypes.c_char.from_buffer(BufferPool().try_take_pages(1))), 4096, -1, 0)

    def test_no_descriptor_is_kept_by_an_error(self, path: Path) -> None:
        before = open_descriptors()
        file = WeightFile(path)
        with pytest.raises(StoreReadError) as caught:
            mapped(file, 10**6, 1)
        file.close()
        assert open_descriptors() == before
        assert caught.value is not None
