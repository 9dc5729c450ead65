from __future__ import annotations

import copy
import errno
import gc
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import pytest
import torch

from pylomin.errors import OffloadedWriteError, ScratchError, StoreFormatError
from pylomin.store import scratch_place
from pylomin.store.base import ReadRequest
from pylomin.store.scratch import OverlayStore, ScratchDirectory
from pylomin.store.scratch_place import default_parent, is_in_memory

from .files import open_descriptors, read_bytes, read_tensor, same_bits


def run(script: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter: forking a process that has threads is not safe."""
    return subprocess.run([sys.executable, "-c", script, str(directory)], capture_output=True, text=True, timeout=120)


class TestDirectory:
    def test_is_private_and_new(self, tmp_path):
        first, second = ScratchDirectory(tmp_path), ScratchDirectory(tmp_path)
        assert first.path != second.path
        assert first.path.parent == tmp_path
        assert first.path.name.startswith("pylomin-")
        assert first.path.stat().st_mode & 0o777 == 0o700

    def test_close(self, tmp_path):
        scratch = ScratchDirectory(tmp_path)
        (scratch.path / "deep").mkdir()
        (scratch.path / "deep" / "file").write_text("x")
        scratch.close()
        scratch.close()
        assert os.listdir(tmp_path) == []

    def test_garbage_collection(self, tmp_path):
        scratch = ScratchDirectory(tmp_path)
        (scratch.path / "file").write_text("x")
        del scratch
        gc.collect()
        assert os.listdir(tmp_path) == []

    def test_already_removed(self, tmp_path):
        scratch = ScratchDirectory(tmp_path)
        scratch.path.rmdir()
        scratch.close()

    @pytest.mark.parametrize("ending", ["", "raise RuntimeError"])
    def test_exit(self, tmp_path, ending):
        script = (
            "import sys; from pylomin.store.scratch import ScratchDirectory\n"
            "kept = ScratchDirectory(sys.argv[1])\n"
            "(kept.path / 'file').write_text('x'); print('made', kept.path.is_dir())\n" + ending
        )
        assert run(script, tmp_path).stdout == "made True\n"
        assert os.listdir(tmp_path) == []

    def test_forked_child_does_not_remove_it(self, tmp_path):
        script = """
import os, sys
from pylomin.store.scratch import ScratchDirectory
kept = ScratchDirectory(sys.argv[1])
collected = ScratchDirectory(sys.argv[1])
child = os.fork()
if child == 0:
    del collected
    kept.close()
    sys.exit(0)  # runs the exit handlers
assert os.waitpid(child, 0)[1] == 0
print(kept.path.is_dir(), collected.path.is_dir())
"""
        done = run(script, tmp_path)
        assert done.stdout == "True True\n", done.stderr
        assert os.listdir(tmp_path) == []

    def test_cannot_be_created(self, tmp_path):
        with pytest.raises(ScratchError, match=r"'.*absent' failed: .*Create the directory"):
            ScratchDirectory(tmp_path / "absent")

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, pickle.dumps])
    def test_no_copies(self, tmp_path, duplicate):
        with pytest.raises(TypeError, match="neither be copied nor pickled"):
            duplicate(ScratchDirectory(tmp_path))


class TestPlace:
    MOUNTS = (
        "/dev/sda1 / ext4 rw 0 0\n"
        "tmpfs /tmp tmpfs rw 0 0\n"
        "/dev/sdb1 /tmp/disk xfs rw 0 0\n"
        "tmpfs /with\\040space tmpfs rw 0 0\n"
        "ramfs /ram ramfs rw 0 0\n"
        "/dev/sdc1 /hidden ext4 rw 0 0\n"
        "tmpfs /hidden tmpfs rw 0 0\n"
        "broken\n"
    )

    @pytest.mark.parametrize(
        ("directory", "expected"),
        [
            ("/tmp", True),
            ("/tmp/deeper", True),
            ("/tmp/disk/deeper", False),
            ("/tmpfile", False),
            ("/var/tmp", False),
            ("/with space", True),
            ("/ram/x", True),
            ("/hidden", True),
            ("/", False),
        ],
    )
    def test_is_in_memory(self, directory, expected):
        assert is_in_memory(directory, self.MOUNTS) is expected
        assert is_in_memory(directory, "") is False

    @pytest.fixture
    def place(self, monkeypatch, tmp_path):
        """A machine whose temporary directory ``ram`` is in memory and whose ``disk`` is not."""
        for name in ("ram", "disk"):
            (tmp_path / name).mkdir()
        mounts = f"/dev/sda1 / ext4 rw 0 0\ntmpfs {tmp_path.resolve() / 'ram'} tmpfs rw 0 0\n"
        (tmp_path / "mounts").write_text(mounts)
        monkeypatch.delenv("TMPDIR", raising=False)
        monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "ram"))
        monkeypatch.setattr(scratch_place, "_MOUNTS", str(tmp_path / "mounts"))
        monkeypatch.setattr(scratch_place, "_DISK_FALLBACK", str(tmp_path / "disk"))
        return tmp_path

    def test_not_into_memory(self, place):
        assert default_parent() == str(place / "disk")
        assert ScratchDirectory().path.parent == place / "disk"

    def test_unless_asked_for(self, place, monkeypatch):
        monkeypatch.setenv("TMPDIR", str(place / "ram"))
        assert ScratchDirectory().path.parent == place / "ram"

    def test_asked_for_and_missing(self, place, monkeypatch):
        monkeypatch.setenv("TMPDIR", str(place / "absent"))
        with pytest.raises(ScratchError, match=r"'.*absent' failed"):
            ScratchDirectory()

    def test_nowhere_else_to_go(self, place, monkeypatch):
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        assert default_parent() == str(place / "ram")

    def test_fallback_in_memory_too(self, place, monkeypatch):
        monkeypatch.setattr(scratch_place, "_DISK_FALLBACK", str(place / "ram" / "deeper"))
        assert default_parent() == str(place / "ram")

    def test_temporary_directory_on_disk(self, place, monkeypatch):
        monkeypatch.setattr(tempfile, "gettempdir", lambda: str(place))
        assert default_parent() == str(place)

    def test_no_table_of_mounts(self, place, monkeypatch):
        monkeypatch.setattr(scratch_place, "_MOUNTS", str(place / "absent"))
        assert default_parent() == str(place / "ram")


@pytest.fixture
def overlay(tmp_path: Path) -> OverlayStore:
    return OverlayStore(ScratchDirectory(tmp_path))


def file_size(overlay: OverlayStore, name: str = "a") -> int:
    return os.stat(overlay.describe(name)).st_size


class TestOverlay:
    def test_starts_empty(self, overlay):
        assert (list(overlay), len(overlay), "a" in overlay) == ([], 0, False)

    def test_new_value_replaces_the_old(self, overlay):
        overlay.write("a", torch.ones(3))
        overlay.write("b", torch.zeros(5))
        overlay.write("a", torch.arange(4, dtype=torch.int16).view(2, 2))
        assert overlay.info("a").shape == (2, 2)
        assert same_bits(read_tensor(overlay, "a"), torch.arange(4, dtype=torch.int16).view(2, 2))
        assert same_bits(read_tensor(overlay, "b"), torch.zeros(5))
        assert len(overlay) == 2

    def test_writes_a_copy(self, overlay):
        tensor = torch.ones(3)
        overlay.write("a", tensor)
        tensor.zero_()
        assert same_bits(read_tensor(overlay, "a"), torch.ones(3))

    @pytest.mark.parametrize(
        "tensor",
        [
            torch.arange(12.0).view(3, 4).t(),
            torch.randn(4, dtype=torch.complex128).conj(),
            torch.nn.Parameter(torch.ones(2)),
            torch.empty(0, 3),
        ],
    )
    def test_any_tensor(self, overlay, tensor):
        overlay.write("a", tensor)
        expected = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
        assert same_bits(read_tensor(overlay, "a"), expected)

    def test_half_precision_complex(self, overlay):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls it experimental
            tensor = torch.ones(3, dtype=torch.complex32)
            overlay.write("a", tensor)
        assert same_bits(read_tensor(overlay, "a"), tensor)

    def test_space_is_reused(self, overlay):
        overlay.write("a", torch.ones(1000))
        overlay.write("b", torch.ones(1000))
        for i in range(50):
            overlay.write("a", torch.full((1000,), float(i)))
            overlay.write("b", torch.full((1000,), float(-i)))
        assert file_size(overlay) == 3 * 4000  # two values, and one while it is written
        assert same_bits(read_tensor(overlay, "a"), torch.full((1000,), 49.0))
        assert same_bits(read_tensor(overlay, "b"), torch.full((1000,), -49.0))

    def test_discard(self, overlay):
        overlay.write("a", torch.ones(1000))
        overlay.write("b", torch.zeros(1000))
        overlay.discard("a")
        overlay.discard("a")
        assert list(overlay) == ["b"]
        overlay.write("c", torch.ones(1000))
        assert file_size(overlay, "c") == 2 * 4000

    def test_space_is_not_reused_under_a_read(self, overlay, monkeypatch):
        """Between a read's look-up and its bytes, others write: it still gets one whole value."""
        overlay.write("a", torch.ones(100))
        preadv = os.preadv

        def write_first(fd, buffers, offset):
            for _ in range(3):
                overlay.write("a", torch.full((100,), 2.0))
                overlay.write("b", torch.full((100,), 3.0))
            return preadv(fd, buffers, offset)

        monkeypatch.setattr(os, "preadv", write_first)
        assert same_bits(read_tensor(overlay, "a"), torch.ones(100))

    def test_one_read_sees_one_value(self, overlay, monkeypatch):
        overlay.write("a", torch.ones(2))
        first, second = bytearray(4), bytearray(4)
        preadv = os.preadv

        def write_first(fd, buffers, offset):
            overlay.write("a", torch.zeros(2))
            return preadv(fd, buffers, offset)

        monkeypatch.setattr(os, "preadv", write_first)
        overlay.read([ReadRequest("a", 4, memoryview(second)), ReadRequest("a", 0, memoryview(first))])
        assert first == second

    def test_threads(self, overlay):
        names = [f"w{i}" for i in range(4)]
        for name in names:
            overlay.write(name, torch.zeros(500))
        errors = []

        def write(number: int) -> None:
            for i in range(60):
                overlay.write(names[number], torch.full((500,), float(number + 4 * i)))

        def read() -> None:
            for i in range(200):
                values = read_tensor(overlay, names[i % 4])
                if not (values == values[0]).all() or (values[0] % 4 not in (0, i % 4)):
                    errors.append(values)

        threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
        threads += [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        for number, name in enumerate(names):
            assert same_bits(read_tensor(overlay, name), torch.full((500,), number + 236.0))

    def test_no_values(self, overlay):
        with pytest.raises(StoreFormatError, match=r"weight 'a' .* has no values in memory"):
            overlay.write("a", torch.empty(3, device="meta"))


class TestOverlayFailures:
    def test_disk_full(self, overlay, monkeypatch):
        overlay.write("a", torch.ones(1000))
        pwrite = os.pwrite

        def fill(fd, data, offset):
            if len(data) < 4000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return pwrite(fd, data[:100], offset)

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", fill)
            message = r"No space left on device. Needed: 4000 bytes .*output_dir="
            with pytest.raises(ScratchError, match=message):
                overlay.write("a", torch.zeros(1000))
            with pytest.raises(ScratchError, match=message):
                overlay.write("new", torch.zeros(1000))
        assert same_bits(read_tensor(overlay, "a"), torch.ones(1000))
        assert "new" not in overlay
        overlay.write("a", torch.zeros(1000))
        assert same_bits(read_tensor(overlay, "a"), torch.zeros(1000))
        assert file_size(overlay) == 8000

    def test_file_size_limit(self, overlay):
        """A real refusal by the system, at 64 KiB."""
        overlay.write("a", torch.ones(10_000))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
        try:
            with pytest.raises(ScratchError, match="File too large"):
                overlay.write("a", torch.zeros(10_000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert same_bits(read_tensor(overlay, "a"), torch.ones(10_000))

    def test_cannot_be_created(self, tmp_path):
        scratch = ScratchDirectory(tmp_path)
        scratch.close()
        before = open_descriptors()
        with pytest.raises(ScratchError, match=r"Create the directory"):
            OverlayStore(scratch)
        assert open_descriptors() == before

    def test_write_after_close(self, overlay):
        overlay.write("a", torch.ones(3))
        path = overlay.describe("a")
        overlay.close()
        overlay.close()
        assert not os.path.exists(path)
        with pytest.raises(OffloadedWriteError, match=r"weight 'a' cannot be .* file is closed"):
            overlay.write("a", torch.ones(3))

    def test_scratch_closed_first(self, overlay):
        overlay.write("a", torch.ones(3))
        shutil.rmtree(Path(overlay.describe("a")).parent)
        overlay.write("b", torch.ones(3))
        assert read_bytes(overlay, "a") == read_bytes(overlay, "b")
        overlay.close()

    def test_keeps_its_directory(self, tmp_path):
        overlay = OverlayStore(ScratchDirectory(tmp_path))
        overlay.write("a", torch.ones(3))
        gc.collect()
        assert read_bytes(overlay, "a")
        del overlay
        gc.collect()
        assert os.listdir(tmp_path) == []

    def test_forked_child(self, tmp_path):
        """The child reads what was there when it was forked, and can write nothing."""
        script = """
import os, sys
import torch
from pylomin.errors import OffloadedWriteError
from pylomin.store.base import ReadRequest
from pylomin.store.scratch import OverlayStore, ScratchDirectory

def read(name):
    buffer = bytearray(400)
    overlay.read([ReadRequest(name, 0, memoryview(buffer))])
    return set(torch.frombuffer(buffer, dtype=torch.float32).tolist())

overlay = OverlayStore(ScratchDirectory(sys.argv[1]))
overlay.write("a", torch.full((100,), 1.0))
overlay.write("a", torch.full((100,), 2.0))
ready, go = os.pipe()
child = os.fork()
if child == 0:
    os.read(ready, 1)
    assert read("a") == {2.0}, read("a")
    try:
        overlay.write("a", torch.zeros(100))
    except OffloadedWriteError as error:
        assert "the process this one was forked from" in str(error), error
    else:
        sys.exit("wrote")
    overlay.close()
    sys.exit(0)
for value in (3.0, 4.0, 5.0):
    overlay.write("a", torch.full((100,), value))
    overlay.write("b", torch.full((100,), -value))
os.write(go, b"x")
assert os.waitpid(child, 0)[1] == 0
assert os.path.exists(overlay.describe("a"))
assert (read("a"), read("b")) == ({5.0}, {-5.0})
print("good")
"""
        done = run(script, tmp_path)
        assert done.stdout == "good\n", done.stderr
        assert os.listdir(tmp_path) == []
