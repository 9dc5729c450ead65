from __future__ import annotations

import copy
import errno
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest

from pylomin.errors import PylominError, StoreChangedError, StoreReadError
from pylomin.io import reading
from pylomin.io.files import Extent, WeightFile
from tests.io.common import CONTENT, open_descriptors, overwrite, read, touch_later


def same_start(read) -> bool:
    """Mended means: the first 16 bytes are as in CONTENT."""
    start = bytearray(16)
    read(0, [memoryview(start)])
    return start == CONTENT[:16]


def test_extent():
    assert Extent(8, 20).nbytes == 12


class TestRead:
    def test_consecutive_buffers(self, path):
        file = WeightFile(path)
        assert file.size_bytes == len(CONTENT)
        assert read(file, 100, 5, 0, 1, 300) == [
            CONTENT[100:105],
            b"",
            CONTENT[105:106],
            CONTENT[106:406],
        ]

    def test_to_the_last_byte(self, path):
        assert read(WeightFile(path), len(CONTENT) - 3, 3) == [CONTENT[-3:]]

    def test_nothing(self, path):
        assert read(WeightFile(path), 5) == []
        assert read(WeightFile(path), 5, 0, 0) == [b"", b""]

    def test_more_buffers_than_one_call_takes(self, path):
        pieces = read(WeightFile(path), 1, *[5] * 3000)
        assert b"".join(pieces) == CONTENT[1:15001]

    def test_more_bytes_than_one_call_takes(self, path, monkeypatch):
        calls = []
        preadv = os.preadv

        def counting(fd, buffers, offset):
            calls.append(sum(map(len, buffers)))
            return preadv(fd, buffers, offset)

        monkeypatch.setattr(reading, "_MAX_READ_BYTES", 1000)
        monkeypatch.setattr(os, "preadv", counting)
        assert read(WeightFile(path), 0, 300, 2500, 700) == [
            CONTENT[:300],
            CONTENT[300:2800],
            CONTENT[2800:3500],
        ]
        assert calls == [1000, 1000, 1000, 500]

    @pytest.mark.parametrize("step", [1, 7, 64, 100])
    def test_short_reads(self, path, monkeypatch, step):
        preadv = os.preadv

        def short(fd, buffers, offset):
            return preadv(fd, [buffers[0][:step]], offset)

        monkeypatch.setattr(os, "preadv", short)
        assert read(WeightFile(path), 10, 64, 100, 1) == [
            CONTENT[10:74],
            CONTENT[74:174],
            CONTENT[174:175],
        ]

    def test_without_preadv(self, path, monkeypatch):
        monkeypatch.delattr(os, "preadv")
        monkeypatch.setattr(reading, "_COPY_BYTES", 50)
        assert read(WeightFile(path), 10, 64, 100) == [CONTENT[10:74], CONTENT[74:174]]

    def test_end_of_file(self, path):
        message = rf"weight file '{path}' ends at byte 16384: expected 10 bytes at offset 16380, found 4"
        with pytest.raises(StoreReadError, match=message):
            read(WeightFile(path), 16380, 10)

    def test_system_error(self, path, monkeypatch):
        def fail(fd, buffers, offset):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        file = WeightFile(path)
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", fail)
            message = rf"reading 4 bytes at offset 8 of weight file '{path}'.*Input/output error"
            with pytest.raises(StoreReadError, match=message) as caught:
                read(file, 8, 4)
        assert isinstance(caught.value, OSError)
        assert isinstance(caught.value, PylominError)
        assert caught.value.__cause__.errno == errno.EIO
        assert read(file, 8, 4) == [CONTENT[8:12]]

    def test_examining_fails(self, path, monkeypatch):
        def fail(fd):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

        file = WeightFile(path)
        with monkeypatch.context() as patch:  # pytest itself uses fstat
            patch.setattr(os, "fstat", fail)
            with pytest.raises(StoreReadError, match=r"cannot examine .*Stale"):
                read(file, 0, 1)

    def test_threads(self, path):
        file = WeightFile(path)
        with ThreadPoolExecutor(8) as pool:
            results = pool.map(lambda start: read(file, start, 100, 50), range(0, 16000, 10))
            for start, (first, second) in zip(range(0, 16000, 10), results, strict=True):
                assert first + second == CONTENT[start : start + 150]


class TestOpen:
    def test_missing(self, tmp_path):
        with pytest.raises(StoreReadError, match=r"'.*absent' does not exist"):
            WeightFile(tmp_path / "absent")

    def test_directory(self, tmp_path):
        with pytest.raises(StoreReadError, match="is a directory; expected a file"):
            WeightFile(tmp_path)

    def test_fifo_does_not_block(self, tmp_path):
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(StoreReadError, match="is not a regular file"):
            WeightFile(tmp_path / "fifo")

    @pytest.mark.parametrize(
        ("number", "message"),
        [(errno.EACCES, "may not be read by this user"), (errno.EMFILE, "Too many open files")],
    )
    def test_refused(self, path, monkeypatch, number, message):
        def refuse(*args):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(StoreReadError, match=message):
            WeightFile(path)

    def test_not_inherited_by_programs(self, path):
        file = WeightFile(path)
        assert not os.get_inheritable(file._descriptor.fd)


class TestClose:
    def test_reading_afterwards(self, path):
        file = WeightFile(path)
        file.close()
        file.close()
        with pytest.raises(StoreReadError, match=rf"'{path}' is closed"):
            read(file, 0, 1)
        file.prefetch_hint(0, 100)

    def test_descriptors(self, path, tmp_path):
        before = open_descriptors()
        kept = [WeightFile(path) for _ in range(10)]
        assert open_descriptors() == before + 10
        for file in kept[:5]:
            file.close()
        del file, kept
        assert open_descriptors() == before
        errors = []
        for bad in (tmp_path, tmp_path / "absent"):
            with pytest.raises(StoreReadError) as caught:
                WeightFile(bad)
            errors.append(caught.value)  # a kept traceback must not keep a descriptor
        assert open_descriptors() == before

    def test_failing_constructor(self, path, monkeypatch):
        fstat = os.fstat
        calls = []

        def fail_second(fd):
            calls.append(fd)
            if len(calls) == 2:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return fstat(fd)

        before = open_descriptors()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fstat", fail_second)
            with pytest.raises(StoreReadError, match="cannot examine") as caught:
                WeightFile(path)
        assert open_descriptors() == before
        assert caught.value is not None

    def test_failed_read_keeps_no_descriptor(self, path):
        before = open_descriptors()
        file = WeightFile(path)
        with pytest.raises(StoreReadError) as caught:
            read(file, 10**6, 1)
        file.close()
        assert open_descriptors() == before
        assert caught.value is not None

    def test_while_another_thread_reads(self, path, tmp_path, monkeypatch):
        """The descriptor's number must not be handed out again while a read uses it."""
        file = WeightFile(path)
        other = tmp_path / "other"
        other.write_bytes(b"\xff" * 100)
        preadv = os.preadv
        opened = []

        def close_then_read(fd, buffers, offset):
            file.close()
            opened.append(WeightFile(other))
            return preadv(fd, buffers, offset)

        monkeypatch.setattr(os, "preadv", close_then_read)
        assert read(file, 3, 20) == [CONTENT[3:23]]

    @pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
    def test_no_copies(self, path, duplicate):
        file = WeightFile(path)
        with pytest.raises(TypeError, match="neither be copied nor pickled"):
            duplicate(file)
        with pytest.raises(TypeError, match="neither be copied nor pickled"):
            duplicate(file._descriptor)


class TestChanges:
    @pytest.fixture
    def file(self, path) -> WeightFile:
        file = WeightFile(path)
        file.set_validation(same_start)
        return file

    def test_truncated(self, file, path):
        overwrite(path, CONTENT[:100])
        message = r"was changed after it was opened: expected 16384 bytes .*found 100 bytes"
        for _ in range(3):
            with pytest.raises(StoreChangedError, match=message):
                read(file, 0, 1)

    def test_grown(self, file, path):
        overwrite(path, CONTENT + b"more")
        for _ in range(3):
            with pytest.raises(StoreChangedError, match="found 16388 bytes"):
                read(file, 0, 1)

    def test_mended(self, file, path):
        overwrite(path, CONTENT[:100])
        with pytest.raises(StoreChangedError):
            read(file, 0, 1)
        overwrite(path, CONTENT)
        assert read(file, 50, 100) == [CONTENT[50:150]]
        assert read(file, 0, 4) == [CONTENT[:4]]

    def test_mended_before_the_next_read(self, file, path):
        overwrite(path, CONTENT[:100])
        overwrite(path, CONTENT)
        with pytest.raises(StoreChangedError, match="the next read accepts the new content"):
            read(file, 0, 1)
        assert read(file, 50, 100) == [CONTENT[50:150]]

    def test_mended_with_its_old_time(self, file, path):
        status = path.stat()
        overwrite(path, b"")
        with pytest.raises(StoreChangedError):
            read(file, 0, 1)
        overwrite(path, CONTENT)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert read(file, 0, 4) == [CONTENT[:4]]
        touch_later(path)
        with pytest.raises(StoreChangedError):
            read(file, 0, 4)

    def test_other_content_of_the_same_layout(self, file, path):
        overwrite(path, CONTENT[:16] + bytes(len(CONTENT) - 16))
        with pytest.raises(StoreChangedError):
            read(file, 16, 4)
        assert read(file, 16, 4) == [bytes(4)]

    def test_other_layout(self, file, path):
        overwrite(path, bytes(len(CONTENT)))
        for _ in range(3):
            with pytest.raises(StoreChangedError, match="open it again to use what it holds now"):
                read(file, 16, 4)
        overwrite(path, CONTENT)
        assert read(file, 16, 4) == [CONTENT[16:20]]

    def test_every_change_raises(self, file, path):
        for _ in range(3):
            touch_later(path)
            with pytest.raises(StoreChangedError):
                read(file, 0, 4)
            assert read(file, 0, 4) == [CONTENT[:4]]

    def test_without_validation(self, path):
        file = WeightFile(path)
        touch_later(path)
        for _ in range(3):
            with pytest.raises(StoreChangedError):
                read(file, 0, 1)

    def test_truncated_during_validation(self, path):
        def read_beyond(read) -> bool:
            read(len(CONTENT), [memoryview(bytearray(1))])
            return True

        file = WeightFile(path)
        file.set_validation(read_beyond)
        touch_later(path)
        with pytest.raises(StoreChangedError):
            read(file, 0, 1)

    def test_truncated_during_a_read(self, file, path, monkeypatch):
        preadv = os.preadv

        def truncate_first(fd, buffers, offset):
            overwrite(path, CONTENT[:10])
            return preadv(fd, buffers, offset)

        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", truncate_first)
            with pytest.raises(StoreReadError, match="ends at byte 10: expected 20"):
                read(file, 0, 20)
        overwrite(path, CONTENT)
        assert read(file, 0, 20) == [CONTENT[:20]]

    def test_replaced_by_rename(self, file, path, tmp_path):
        (tmp_path / "new").write_bytes(b"new")
        os.replace(tmp_path / "new", path)
        assert read(file, 20, 100) == [CONTENT[20:120]]

    def test_deleted(self, file, path):
        path.unlink()
        assert read(file, 20, 100) == [CONTENT[20:120]]

    def test_unwatched(self, path):
        file = WeightFile(path, watched=False)
        with open(path, "ab") as appended:
            appended.write(b"more")
        touch_later(path)
        assert read(file, len(CONTENT), 4) == [b"more"]


class TestIsAtPath:
    def test_it_is(self, tmp_path):
        path = tmp_path / "file"
        path.write_bytes(b"abc")
        file = WeightFile(path)
        assert file.is_at_path()
        file.close()
        assert not file.is_at_path()

    @pytest.mark.parametrize("change", ["deleted", "renamed over", "written to"])
    def test_it_is_not(self, tmp_path, change):
        path = tmp_path / "file"
        path.write_bytes(b"abc")
        file = WeightFile(path)
        if change == "deleted":
            path.unlink()
        elif change == "renamed over":
            (tmp_path / "other").write_bytes(b"abc")
            os.replace(tmp_path / "other", path)
        else:
            path.write_bytes(b"abcd")
        assert not file.is_at_path()


class TestPrefetchHint:
    def test_pieces(self, path, monkeypatch):
        calls = []
        monkeypatch.setattr(os, "posix_fadvise", lambda fd, *rest: calls.append(rest), raising=False)
        monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", 3, raising=False)
        WeightFile(path).prefetch_hint(100, (1 << 18) + 1)
        assert calls == [
            (100, 1 << 17, 3),
            (100 + (1 << 17), 1 << 17, 3),
            (100 + (1 << 18), 1, 3),
        ]

    def test_real(self, path):
        WeightFile(path).prefetch_hint(0, len(CONTENT))

    def test_not_available(self, path, monkeypatch):
        monkeypatch.delattr(os, "posix_fadvise", raising=False)
        WeightFile(path).prefetch_hint(0, 100)

    def test_refused(self, path, monkeypatch):
        def refuse(*args):
            raise OSError(errno.ESPIPE, os.strerror(errno.ESPIPE))

        monkeypatch.setattr(os, "posix_fadvise", refuse, raising=False)
        monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", 3, raising=False)
        WeightFile(path).prefetch_hint(0, 100)
