from __future__ import annotations

import errno
import fcntl
import itertools
import os
import resource
import shutil
import threading
import time
import weakref
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pylomin.errors import (
    OutputExistsError,
    ScratchError,
    StoreFormatError,
    StoreReadError,
    WeightMismatchError,
)
from pylomin.store.dtypes import STORED_DTYPES
from pylomin.store.pieces import PIECE_BYTES
from pylomin.store.safetensors import SafetensorsStore
from pylomin.store.writer import WeightToWrite, write_safetensors

from .contract import sample_tensors
from .files import open_descriptors, read_tensor, same_bits

TENSORS = sample_tensors()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def weights(tensors: dict[str, torch.Tensor] = TENSORS) -> list[WeightToWrite]:
    return [
        WeightToWrite(name, tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: tensor)
        for name, tensor in tensors.items()
    ]


def failing(error: BaseException) -> list[WeightToWrite]:
    def fail() -> torch.Tensor:
        raise error

    return [*weights(), WeightToWrite("last", torch.float32, (4,), fail)]


def assert_untouched(target: Path, descriptors: int) -> None:
    assert os.listdir(target.parent) == []
    assert open_descriptors() == descriptors


class TestResult:
    @pytest.mark.parametrize("durable", [False, True])
    def test_the_library_reads_it(self, target, durable):
        write_safetensors(target, weights(), metadata={"format": "pt"}, durable=durable)
        loaded = load_file(target)
        assert set(loaded) == set(TENSORS)
        assert all(same_bits(loaded[name], tensor) for name, tensor in TENSORS.items())
        with safe_open(target, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        assert os.listdir(target.parent) == [target.name]

    @pytest.mark.parametrize("dtype", STORED_DTYPES, ids=str)
    def test_every_dtype(self, target, dtype):
        tensor = torch.arange(64, dtype=torch.uint8).view(2, 32).view(dtype)
        write_safetensors(target, weights({"w": tensor}))
        assert same_bits(load_file(target)["w"], tensor)
        assert same_bits(read_tensor(SafetensorsStore(target), "w"), tensor)

    def test_data_is_aligned_and_in_the_given_order(self, target):
        write_safetensors(target, weights())
        store = SafetensorsStore(target)
        assert list(store) == list(TENSORS)
        assert store.location(next(iter(TENSORS))).extent.start % 4096 == 0

    @pytest.mark.parametrize(
        "tensor",
        [torch.arange(12.0).view(3, 4).t(), torch.randn(4, dtype=torch.complex64).conj()],
    )
    def test_strided_and_conjugated(self, target, tensor):
        write_safetensors(target, weights({"w": tensor}))
        assert torch.equal(load_file(target)["w"], tensor)

    def test_parameters(self, target):
        linear = torch.nn.Linear(2, 3)
        write_safetensors(target, weights(dict(linear.named_parameters())))
        assert torch.equal(load_file(target)["weight"], linear.weight)

    def test_no_weights(self, target):
        write_safetensors(target, [])
        assert load_file(target) == {}

    def test_permissions_follow_the_umask(self, target):
        old = os.umask(0o027)
        try:
            write_safetensors(target, weights())
        finally:
            os.umask(old)
        assert target.stat().st_mode & 0o777 == 0o640

    def test_relative_path(self, target, monkeypatch):
        monkeypatch.chdir(target.parent)
        write_safetensors(target.name, weights(), durable=True)
        assert target.exists()

    def test_short_writes(self, target, monkeypatch):
        pwrite = os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:7], offset))
        write_safetensors(target, weights())
        assert all(same_bits(load_file(target)[name], TENSORS[name]) for name in TENSORS)

    def test_one_tensor_at_a_time(self, target):
        made = []

        def make() -> torch.Tensor:
            assert all(tensor() is None for tensor in made)
            tensor = torch.ones(numel)
            made.append(weakref.ref(tensor))
            return tensor

        numel = PIECE_BYTES // 4 + 1
        write_safetensors(target, [WeightToWrite(str(i), torch.float32, (numel,), make) for i in range(4)])
        assert len(made) == 4

    @pytest.mark.parametrize("nbytes", [0, 1, 5000, (4 << 20) - 1, 4 << 20, (9 << 20) + 17])
    def test_past_the_page_cache(self, target, monkeypatch, nbytes):
        """Whole blocks, and a rest; where the system refuses, in the middle too, the file is the same."""
        data = torch.randint(256, (nbytes,), dtype=torch.uint8)
        sizes = {"small": 100, "data": nbytes, "last": 3}
        layout = {
            name: data[:n] if n <= nbytes else torch.full((n,), 7, dtype=torch.uint8) for name, n in sizes.items()
        }
        write_safetensors(target, weights(layout), durable=True)
        plain = target.with_name("plain")
        write_safetensors(plain, weights(layout))
        assert target.read_bytes() == plain.read_bytes()
        pwrite, calls = os.pwrite, itertools.count()

        def refuse_second(fd, data, offset):
            if next(calls) == 1 and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return pwrite(fd, data, offset)

        monkeypatch.setattr(os, "pwrite", refuse_second)
        write_safetensors(target, weights(layout), durable=True, overwrite=True)
        assert target.read_bytes() == plain.read_bytes()

    def test_an_interrupt_while_another_thread_writes(self, target, monkeypatch):
        pwrite = os.pwrite
        began = threading.Event()

        def slow(fd, data, offset):
            began.set()
            time.sleep(0.05)
            return pwrite(fd, data, offset)

        def stop() -> torch.Tensor:
            assert began.wait(10)
            raise KeyboardInterrupt

        big = WeightToWrite("big", torch.uint8, (9 << 20,), lambda: torch.zeros(9 << 20, dtype=torch.uint8))
        before, threads = open_descriptors(), set(threading.enumerate())
        monkeypatch.setattr(os, "pwrite", slow)
        with pytest.raises(KeyboardInterrupt):
            write_safetensors(target, [big, WeightToWrite("w", torch.uint8, (1,), stop)], durable=True)
        assert_untouched(target, before)
        assert set(threading.enumerate()) <= threads


class TestExistingTarget:
    def test_refused(self, target):
        target.write_text("precious")
        with pytest.raises(OutputExistsError, match=r"already exists.*overwrite=True") as caught:
            write_safetensors(target, failing(AssertionError("made a tensor")))
        assert isinstance(caught.value, FileExistsError)
        assert target.read_text() == "precious"

    def test_that_appears_meanwhile(self, target):
        def create_target() -> torch.Tensor:
            target.write_text("precious")
            return torch.ones(1)

        with pytest.raises(OutputExistsError):
            write_safetensors(target, [WeightToWrite("w", torch.float32, (1,), create_target)])
        assert target.read_text() == "precious"
        assert os.listdir(target.parent) == [target.name]

    def test_overwritten(self, target):
        target.write_text("old")
        write_safetensors(target, weights(), overwrite=True)
        assert set(load_file(target)) == set(TENSORS)

    def test_not_overwritten_on_failure(self, target):
        target.write_text("precious")
        with pytest.raises(RuntimeError, match="no tensor"):
            write_safetensors(target, failing(RuntimeError("no tensor")), overwrite=True)
        assert target.read_text() == "precious"
        assert os.listdir(target.parent) == [target.name]

    def test_directory(self, target):
        target.mkdir()
        with pytest.raises(OutputExistsError):
            write_safetensors(target, weights(), overwrite=True)


class TestRefusals:
    def test_dtype(self, target):
        bad = WeightToWrite("layer.w", torch.complex128, (1,), lambda: torch.ones(1))
        with pytest.raises(StoreFormatError, match=r"weight 'layer\.w' has dtype torch\.complex128"):
            write_safetensors(target, [*failing(AssertionError("made a tensor")), bad])
        assert os.listdir(target.parent) == []

    @pytest.mark.parametrize("tensor", [torch.ones(4, 1), torch.ones(4, dtype=torch.float64)])
    def test_other_tensor_than_announced(self, target, tensor):
        before = open_descriptors()
        with pytest.raises(WeightMismatchError, match=r"weight 'w' was to be .*the tensor has"):
            write_safetensors(target, [WeightToWrite("w", torch.float32, (4,), lambda: tensor)])
        assert_untouched(target, before)

    def test_tensor_without_values(self, target):
        before = open_descriptors()
        with pytest.raises(StoreFormatError, match=r"weight 'w' .* has no values"):
            write_safetensors(target, weights({"w": torch.ones(4, device="meta")}))
        assert_untouched(target, before)

    def test_no_room(self, target, monkeypatch):
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 30, 1 << 30, 1000))
        message = (
            rf"writing weights to '{target.parent}' failed: No space left on device. Needed: "
            r"\d+ bytes \(0\.0 MiB\); free there: 1000 bytes .*output_dir=.*TMPDIR"
        )
        with pytest.raises(ScratchError, match=message):
            write_safetensors(target, failing(AssertionError("made a tensor")))
        assert os.listdir(target.parent) == []

    def test_missing_directory(self, tmp_path):
        with pytest.raises(ScratchError, match=r"No such file or directory.*Create the directory"):
            write_safetensors(tmp_path / "absent" / "model.safetensors", weights())


class TestFailures:
    @pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), SystemExit(), StoreReadError("x")])
    def test_a_tensor_cannot_be_made(self, target, error):
        before = open_descriptors()
        with pytest.raises(type(error)) as caught:
            write_safetensors(target, failing(error))
        assert caught.value is error
        assert_untouched(target, before)

    @pytest.mark.parametrize(
        ("number", "advice"),
        [
            (errno.ENOSPC, "Free some space there"),
            (errno.EDQUOT, "Free some space there"),
            (errno.EROFS, "Make it writable"),
            (errno.EIO, "Check the disk"),
        ],
    )
    @pytest.mark.parametrize("call", ["pwrite", "fsync", "replace"])
    def test_a_system_call_fails(self, target, monkeypatch, call, number, advice):
        def fail(*args):
            raise OSError(number, os.strerror(number))

        before = open_descriptors()
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(ScratchError, match=rf"{os.strerror(number)}.*{advice}") as caught:
                write_safetensors(target, weights(), durable=True)
        assert caught.value.__cause__.errno == number
        assert_untouched(target, before)

    def test_disk_full_half_way(self, target, monkeypatch):
        pwrite = os.pwrite

        def fill(fd, data, offset):
            if offset + len(data) > 5000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return pwrite(fd, data, offset)

        before = open_descriptors()
        monkeypatch.setattr(os, "pwrite", fill)
        with pytest.raises(ScratchError, match="No space left on device"):
            write_safetensors(target, weights())
        assert_untouched(target, before)

    def test_file_size_limit(self, target):
        """A real refusal by the system, at 64 KiB."""
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = open_descriptors()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
        try:
            with pytest.raises(ScratchError, match=r"File too large.*Free some space"):
                write_safetensors(target, weights({"w": torch.zeros(1 << 16)}))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert_untouched(target, before)

    def test_not_permitted(self, target, monkeypatch):
        open_ = os.open

        def refuse(path, flags, *args, **kwargs):
            if flags & os.O_CREAT:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return open_(path, flags, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", refuse)
            with pytest.raises(ScratchError, match=r"Permission denied.*Make it writable"):
                write_safetensors(target, weights())
        assert os.listdir(target.parent) == []

    @pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
    def test_directory_that_cannot_be_synced(self, target, monkeypatch, number):
        fsync = os.fsync
        synced = []

        def second_fails(fd):
            synced.append(fd)
            if len(synced) == 2:
                raise OSError(number, os.strerror(number))
            fsync(fd)

        before = open_descriptors()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", second_fails)
            if number == errno.EINVAL:  # no such thing on that file system
                write_safetensors(target, weights(), durable=True)
            else:
                with pytest.raises(ScratchError, match="Check the disk"):
                    write_safetensors(target, weights(), durable=True)
        assert open_descriptors() == before
        assert set(load_file(target)) == set(TENSORS)  # whole, in either case
