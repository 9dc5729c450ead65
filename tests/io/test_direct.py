from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pylomin.errors import StoreChangedError, StoreReadError
from pylomin.io import direct, syscalls
from pylomin.io.buffers import PAGE_BYTES
from pylomin.io.direct import direct_bytes
from pylomin.io.files import Extent, WeightFile
from tests.io.common import CONTENT, open_descriptors, overwrite, touch_later

O_DIRECT = getattr(os, "O_DIRECT", 0)
needs_direct = pytest.mark.skipif(not O_DIRECT, reason="this system has no O_DIRECT")


class Direct:
    """Stands for a file system with direct reads: checks what is asked of it, and then reads through the page cache."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[int, int]] = []  # offset, bytes
        self.descriptors: set[int] = set()
        self.most_bytes = 1 << 40  # that one call transfers
        self.error: OSError | None = None
        self._open, self._preadv = os.open, os.preadv
        patch.setattr(os, "open", self.open)
        patch.setattr(os, "preadv", self.preadv)
        patch.setattr(syscalls, "direct_alignment", lambda fd: (512, 512))

    def open(self, name: str, flags: int) -> int:
        fd = self._open(name, flags & ~O_DIRECT)
        (self.descriptors.add if flags & O_DIRECT else self.descriptors.discard)(fd)
        return fd

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if fd not in self.descriptors:
            return self._preadv(fd, buffers, offset)
        if self.error is not None:
            raise self.error
        (buffer,) = buffers
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        assert (offset % 512, len(buffer) % 512, address % 512) == (0, 0, 0)
        self.calls.append((offset, len(buffer)))
        return self._preadv(fd, [buffer[: self.most_bytes]], offset)


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> Direct:
    return Direct(monkeypatch)


def read(file: WeightFile, offset: int, nbytes: int) -> bytes:
    buffer = mmap.mmap(-1, direct_bytes(offset, nbytes))
    file.read_direct(offset, nbytes, memoryview(buffer))
    return buffer[offset % PAGE_BYTES :][:nbytes]


def refusal(number: int = errno.EINVAL) -> OSError:
    return OSError(number, os.strerror(number))


RANGES = [(0, len(CONTENT)), (1, 1), (4095, 2), (4096, 4096), (100, 9000), (len(CONTENT) - 1, 1), (8000, 0)]


@pytest.mark.parametrize(("offset", "nbytes"), RANGES)
def test_whatever_the_file_system(path: Path, offset: int, nbytes: int) -> None:
    """The real one of this machine, which may refuse."""
    assert read(WeightFile(path), offset, nbytes) == CONTENT[offset : offset + nbytes]


@pytest.mark.parametrize("size", [1, 511, 513, 5000, 12289])
def test_files_of_odd_sizes(path: Path, size: int) -> None:
    path.write_bytes(CONTENT[:size])
    file = WeightFile(path)
    assert read(file, 0, size) == CONTENT[:size]
    assert read(file, size - 1, 1) == CONTENT[size - 1 : size]


def test_threads(path: Path) -> None:
    file = WeightFile(path)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda start: read(file, start, 150), range(0, 16000, 200)))
    assert found == [CONTENT[start : start + 150] for start in range(0, 16000, 200)]


def test_nothing_stays_in_the_page_cache(path: Path) -> None:
    """Where the file system keeps its files in memory anyway, nothing is added."""
    path.write_bytes(CONTENT * 64)
    with open(path, "rb") as same:
        os.fsync(same.fileno())  # pages that are not written yet cannot be dropped
    file = WeightFile(path)
    whole = [Extent(0, file.size_bytes)]
    file.read(0, [memoryview(bytearray(file.size_bytes))], drop_cache=True)
    before = file.cached_fraction(whole)
    read(file, 5, 1 << 19)
    assert file.cached_fraction(whole) == before


@needs_direct
class TestAlignedReads:
    @pytest.mark.parametrize(("offset", "nbytes"), RANGES)
    def test_values(self, system: Direct, path: Path, offset: int, nbytes: int) -> None:
        file = WeightFile(path)
        assert read(file, offset, nbytes) == CONTENT[offset : offset + nbytes]
        assert file.direct_refused is None
        assert len(system.calls) == 1

    @pytest.mark.parametrize("most", [1, 512, 4096, 5000, 8192])
    def test_short_reads(self, system: Direct, path: Path, most: int) -> None:
        system.most_bytes = most
        assert read(WeightFile(path), 4000, 10000) == CONTENT[4000:14000]

    def test_a_fault_after_a_short_read(self, system: Direct, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The kernel returns what came before a bad sector, and only then the error."""

        def bad_sector(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            if offset <= 8704 < offset + sum(map(len, buffers)):
                if offset == 8704:
                    raise refusal(errno.EIO)
                system.most_bytes = 8704 - offset
            return system.preadv(fd, buffers, offset)

        monkeypatch.setattr(os, "preadv", bad_sector)
        with pytest.raises(StoreReadError, match="failed at offset 8704: Input/output error"):
            read(WeightFile(path), 4000, 10000)

    def test_more_bytes_than_one_call_takes(self, system: Direct, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(direct, "MOST_BYTES", PAGE_BYTES)
        assert read(WeightFile(path), 100, 10000) == CONTENT[100:10100]
        assert [offset for offset, _ in system.calls] == [0, PAGE_BYTES, 2 * PAGE_BYTES]

    def test_memory_that_is_not_aligned(self, system: Direct, path: Path) -> None:
        file = WeightFile(path)
        buffer = mmap.mmap(-1, 4 * PAGE_BYTES)
        file.read_direct(10, 100, memoryview(buffer)[64:])
        assert buffer[74:174] == CONTENT[10:110]
        assert system.calls == []
        assert file.direct_refused is None

    def test_deleted_and_replaced(self, system: Direct, path: Path) -> None:
        """The second descriptor is opened when the path is already another file's."""
        file = WeightFile(path)
        path.unlink()
        path.write_bytes(bytes(len(CONTENT)))
        assert read(file, 3, 5000) == CONTENT[3:5003]

    def test_never_another_file(self, system: Direct, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def without_proc(name: str, flags: int) -> int:
            if str(name).startswith("/proc"):
                raise refusal(errno.ENOENT)
            return system.open(name, flags)

        monkeypatch.setattr(os, "open", without_proc)
        file = WeightFile(path)
        assert read(file, 3, 5000) == CONTENT[3:5003]
        assert file.direct_refused is None
        replaced = WeightFile(path)
        path.unlink()
        path.write_bytes(bytes(len(CONTENT)))
        assert read(replaced, 3, 5000) == CONTENT[3:5003]
        assert "another file" in str(replaced.direct_refused)
        assert read(file, 3, 5000) == CONTENT[3:5003]

    def test_descriptors(self, system: Direct, path: Path) -> None:
        before = open_descriptors()
        file = WeightFile(path)
        for _ in range(3):
            read(file, 0, 10)
        assert open_descriptors() == before + 2
        file.close()
        assert open_descriptors() == before
        with pytest.raises(StoreReadError, match="is closed"):
            read(file, 0, 10)
        with pytest.raises(StoreReadError, match="is closed"):
            _ = file.direct_refused
        assert open_descriptors() == before

    def test_closed_while_opening(self, system: Direct, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = open_descriptors()
        file = WeightFile(path)

        def close_first(fd: int) -> None:
            file.close()

        monkeypatch.setattr(syscalls, "direct_alignment", close_first)
        assert read(file, 0, 10) == CONTENT[:10]
        assert open_descriptors() == before

    def test_truncated(self, system: Direct, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        message = rf"weight file '{path}' ends at byte 16384: expected 10 bytes at offset 16380, found 4"
        with pytest.raises(StoreReadError, match=message):
            read(WeightFile(path), 16380, 10)
        with pytest.raises(StoreReadError, match="ends at byte 20000: expected 10 bytes"):
            read(WeightFile(path), 20000, 10)

    def test_changed(self, system: Direct, path: Path) -> None:
        file = WeightFile(path)
        read(file, 0, 10)
        touch_later(path)
        with pytest.raises(StoreChangedError):
            read(file, 0, 10)

    def test_truncated_while_reading(self, system: Direct, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def truncate_first(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            overwrite(path, CONTENT[:100])
            return system.preadv(fd, buffers, offset)

        file = WeightFile(path)
        monkeypatch.setattr(os, "preadv", truncate_first)
        with pytest.raises(StoreReadError, match="ends at byte 100: expected 5000 bytes at offset 50, found 50"):
            read(file, 50, 5000)

    def test_system_error(self, system: Direct, path: Path) -> None:
        file = WeightFile(path)
        system.error = refusal(errno.EIO)
        message = rf"reading 4 bytes at offset 8 of weight file '{path}' failed at offset 8: Input/output error"
        with pytest.raises(StoreReadError, match=message) as caught:
            read(file, 8, 4)
        assert caught.value.__cause__ is system.error
        system.error = None
        assert file.direct_refused is None
        assert read(file, 8, 4) == CONTENT[8:12]


@needs_direct
class TestRefusal:
    """Then reads are buffered, and the file says why."""

    @pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
    def test_when_reading(self, system: Direct, path: Path, number: int) -> None:
        file = WeightFile(path)
        system.error = refusal(number)
        assert read(file, 100, 5000) == CONTENT[100:5100]
        assert f"the file system refuses O_DIRECT: {os.strerror(number)}" in str(file.direct_refused)
        system.error = None
        assert read(file, 100, 5000) == CONTENT[100:5100]
        assert system.calls == [], "not tried again"

    @pytest.mark.parametrize("number", [errno.EINVAL, errno.EACCES])
    def test_when_opening(self, path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        file = WeightFile(path)
        before = open_descriptors()

        def refuse(name: str, flags: int) -> int:
            assert flags & O_DIRECT
            raise refusal(number)

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", refuse)
            assert read(file, 100, 5000) == CONTENT[100:5100]
        assert os.strerror(number) in str(file.direct_refused)
        assert open_descriptors() == before

    @pytest.mark.parametrize("alignments", [(0, 0), (512, 2 * PAGE_BYTES), (2 * PAGE_BYTES, 512)])
    def test_alignment(self, system: Direct, path: Path, monkeypatch: pytest.MonkeyPatch, alignments) -> None:
        monkeypatch.setattr(syscalls, "direct_alignment", lambda fd: alignments)
        file = WeightFile(path)
        assert read(file, 100, 5000) == CONTENT[100:5100]
        assert f"memory aligned to {alignments[0]} and offsets aligned to {alignments[1]}" in str(file.direct_refused)

    def test_errors_are_the_same(self, system: Direct, path: Path) -> None:
        file = WeightFile(path)
        system.error = refusal()
        with pytest.raises(StoreReadError, match="ends at byte 16384: expected 10 bytes at offset 16380, found 4"):
            read(file, 16380, 10)


def test_a_system_without_direct_reads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    file = WeightFile(path)
    assert read(file, 100, 5000) == CONTENT[100:5100]
    assert "this system has none" in str(file.direct_refused)


def test_alignment_of_the_file_system(path: Path) -> None:
    """What the kernel says, where it does, are powers of two, or zeros."""
    file = WeightFile(path)
    for nbytes in syscalls.direct_alignment(file._descriptor.fd) or ():
        assert nbytes & (nbytes - 1) == 0
    assert syscalls.direct_alignment(-1) is None
