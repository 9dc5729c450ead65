"""Arrays of numpy: files, archives, directories and mappings. The oracle is numpy."""

from __future__ import annotations

import io
import os
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pylomin.errors import StoreChangedError, StoreFormatError
from pylomin.store.extents import StoredWeight
from pylomin.store.memory import MemoryStore
from pylomin.store.npy import NpyStore
from pylomin.store.npz import NpzStore
from pylomin.store.numpy_arrays import MemmapStore
from pylomin.store.open import open_store

from .files import open_descriptors, read_bytes, read_tensor, same_bits, touch_later

DTYPES = ["?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"]


def tensor_of(array: numpy.ndarray) -> torch.Tensor:
    return torch.from_numpy(numpy.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


@st.composite
def arrays(draw) -> numpy.ndarray:
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    dtype = numpy.dtype(draw(st.sampled_from(DTYPES))).newbyteorder(draw(st.sampled_from("<>")))
    return numpy.array(
        numpy.arange(numpy.prod(shape, dtype=int)).reshape(shape) % 100, dtype, order=draw(st.sampled_from("CF"))
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("arrays")


@settings(max_examples=100, deadline=None)
@given(array=arrays(), version=st.sampled_from([(1, 0), (2, 0), (3, 0)]), data=st.data())
def test_every_array(directory, array, version, data):
    with (directory / "x.npy").open("wb") as file:
        numpy.lib.format.write_array(file, array, version)
    numpy.savez(directory / "stored.npz", x=array)
    numpy.savez_compressed(directory / "deflated.npz", x=array)
    for store in (
        NpyStore(directory / "x.npy"),
        NpzStore(directory / "stored.npz"),
        NpzStore(directory / "deflated.npz"),
        open_store({"x": array}),
    ):
        whole = read_bytes(store, "x")
        assert list(store) == ["x"]
        assert same_bits(read_tensor(store, "x"), tensor_of(array))
        start = data.draw(st.integers(0, len(whole)))
        stop = data.draw(st.integers(start, len(whole)))
        assert read_bytes(store, "x", start, stop) == whole[start:stop]
        store.close()


def test_plain_arrays_are_extents(tmp_path):
    array = numpy.arange(6.0).reshape(2, 3)
    numpy.savez(tmp_path / "x.npz", a=array, b=array.T, c=array.astype(">f8"))
    store = NpzStore(tmp_path / "x.npz")
    assert [isinstance(store.weight(name), StoredWeight) for name in "abc"] == [True, False, False]


# -- malformed --------------------------------------------------------------------------------------------------------


def npy(text: str, data: bytes = b"", *, version: bytes = b"\1\0", length: int | None = None) -> bytes:
    raw = text.encode("latin-1")
    nbytes = 2 if version[:1] == b"\1" else 4
    return b"\x93NUMPY" + version + (len(raw) if length is None else length).to_bytes(nbytes, "little") + raw + data


GOOD = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }"


@pytest.mark.parametrize(
    "text", [GOOD, GOOD.replace(", }", "}"), GOOD.replace("2,", "2L,"), f"  {GOOD}  \n", GOOD.replace(" ", "")]
)
def test_spellings(text, tmp_path):
    (tmp_path / "x.npy").write_bytes(npy(text, bytes(8)))
    assert NpyStore(tmp_path / "x.npy").info("x").shape == (2,)


HOSTILE = {
    "call": "{'descr': __import__('os').system('true'), 'fortran_order': False, 'shape': (2,), }",
    "object": GOOD.replace("<f4", "|O"),
    "structured": "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2,), }",
    "text": GOOD.replace("<f4", "<U4"),
    "void": GOOD.replace("<f4", "|V2"),
    "long double": GOOD.replace("<f4", "<f16"),
    "bool": GOOD.replace("False", "0"),
    "negative": GOOD.replace("2,", "-2,"),
    "float": GOOD.replace("2,", "2.0,"),
    "huge": GOOD.replace("2,", "9" * 19 + ","),
    "more than huge": GOOD.replace("2,", "9" * 5000 + ","),
    "many": GOOD.replace("2,", "1," * 65),
    "hidden": GOOD.replace("2,", "0," + "9" * 18 + ","),
    "nested": GOOD.replace("(2,)", "(" * 5000 + ")" * 5000),
    "twice": GOOD.replace("}", "'shape': (3,)}"),
    "nothing": "",
    "long": GOOD + " " * 70_000,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_headers(kind, tmp_path):
    raw = npy(HOSTILE[kind], bytes(8), version=b"\2\0")
    (tmp_path / "x.npy").write_bytes(raw)
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x.npy", raw)
    for name in ("x.npy", "x.npz"):
        with pytest.raises(StoreFormatError) as caught:
            open_store(tmp_path / name)
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (npy(GOOD, bytes(8))[:4], "ends too early"),
        (npy(GOOD, bytes(8), version=b"\4\0"), "does not begin as"),
        (npy(GOOD, bytes(8), length=60_000), "ends too early"),
        (npy(GOOD, bytes(8), length=1 << 31, version=b"\2\0"), "claims a header of 2147483648 bytes"),
        (npy(GOOD, bytes(7)), "has 7 bytes of values; expected 8"),
        (npy(GOOD, bytes(9)), "has 9 bytes of values; expected 8"),
        (npy(GOOD.replace("<f4", ">M8"), bytes(8)), "has numpy dtype 'M8', which torch has not"),
    ],
)
def test_malformed(raw, message, tmp_path):
    (tmp_path / "x.npy").write_bytes(raw)
    with pytest.raises(StoreFormatError, match=message):
        NpyStore(tmp_path / "x.npy")


def test_changed_file(tmp_path):
    numpy.save(tmp_path / "x.npy", numpy.arange(4))
    numpy.savez_compressed(tmp_path / "x.npz", x=numpy.arange(4))
    for name in ("x.npy", "x.npz"):
        store = open_store(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes() + b" ")
        touch_later(tmp_path / name)
        with pytest.raises(StoreChangedError):
            read_tensor(store, "x")


# -- archives ---------------------------------------------------------------------------------------------------------


def bomb(size_bytes: int) -> bytes:
    """An array of zeros, deflated to a thousandth."""
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    head = npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({size_bytes},), }}")
    block = bytes(1 << 20)
    pieces = [deflater.compress(head)] + [deflater.compress(block) for _ in range(size_bytes >> 20)]
    return b"".join([*pieces, deflater.flush()]), len(head) + size_bytes


def test_zip_bomb(tmp_path):
    """Opening it decompresses a header; reading rows of it what lies before them."""
    size_bytes = 1 << 28
    raw, total_bytes = bomb(size_bytes)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        file.writestr("x.npy", raw)
    patched = bytearray((tmp_path / "x.npz").read_bytes())
    central = patched.index(b"PK\1\2")
    patched[8:10] = patched[central + 10 : central + 12] = b"\x08\0"
    patched[central + 24 : central + 28] = total_bytes.to_bytes(4, "little")
    (tmp_path / "x.npz").write_bytes(patched)
    tracemalloc.start()
    try:
        store = NpzStore(tmp_path / "x.npz")
        assert store.info("x").nbytes == size_bytes
        assert read_bytes(store, "x", 1 << 20, (1 << 20) + 5) == bytes(5)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def compressed(raw: bytes, path: Path, **changes: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x.npy", raw)
    return path


def test_deflated_data_of_another_length(tmp_path):
    for count in (7, 9):
        with pytest.raises(
            StoreFormatError, match=rf"has {len(npy(GOOD)) + count} bytes; expected {len(npy(GOOD)) + 8}"
        ):
            NpzStore(compressed(npy(GOOD, bytes(count)), tmp_path / "x.npz"))


def test_damaged_deflated_data(tmp_path):
    generator = numpy.random.default_rng(0)
    buffer = io.BytesIO()
    numpy.save(buffer, generator.integers(0, 4, 5000).astype("u1"))
    path = compressed(buffer.getvalue(), tmp_path / "x.npz")
    raw = path.read_bytes()
    path.write_bytes(raw[:700] + bytes(200) + raw[900:])
    store = NpzStore(path)
    with pytest.raises(StoreFormatError, match=r"could not read weight 'x': compressed data of .* is damaged"):
        read_tensor(store, "x")


def test_entries_that_are_no_arrays(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        file.writestr("x.npy", npy(GOOD, bytes(8)))
        file.writestr("evil.py", "")
    with pytest.raises(StoreFormatError, match=r"entries that are no arrays: \['evil\.py'\]"):
        NpzStore(tmp_path / "x.npz")


def test_other_compression(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_BZIP2) as file:
        file.writestr("x.npy", npy(GOOD, bytes(8)))
    with pytest.raises(StoreFormatError, match="compressed by method 12; expected none or deflate"):
        NpzStore(tmp_path / "x.npz")


# -- directories ------------------------------------------------------------------------------------------------------


def test_links_that_leave_the_directory(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    numpy.save(tmp_path / "secret.npy", numpy.ones(1))
    numpy.save(inside / "a.npy", numpy.ones(1))
    (inside / "b.npy").symlink_to(inside / "a.npy")
    assert set(NpyStore(inside)) == {"a", "b"}
    (inside / "c.npy").symlink_to(tmp_path / "secret.npy")
    before = open_descriptors()
    with pytest.raises(StoreFormatError, match="outside its directory"):
        NpyStore(inside)
    assert open_descriptors() == before


# -- mappings ---------------------------------------------------------------------------------------------------------


def test_memmaps_are_read_from_their_files(tmp_path):
    numpy.save(tmp_path / "x.npy", numpy.arange(24.0).reshape(4, 6))
    array = numpy.load(tmp_path / "x.npy", mmap_mode="r")
    raw = numpy.memmap(tmp_path / "x.npy", "u1", "r", offset=128)
    views = {"a": array, "row": array[2], "t": array.T, "step": array[::2, 1::2], "raw": raw[8:16], "empty": array[:0]}
    views["flat"] = array.reshape(-1)[3:]
    store = open_store(views)
    assert type(store) is MemmapStore
    for name, view in views.items():
        assert same_bits(read_tensor(store, name), tensor_of(view)), name
    assert store.location("row").extent.start == 128 + 2 * 48
    assert len(store.files) == 1


def test_what_was_written_to_a_memmap(tmp_path):
    array = numpy.memmap(tmp_path / "x", "f4", "w+", shape=(3,))
    store = open_store({"x": array})
    array[:] = [1, 2, 3]
    assert read_tensor(store, "x").tolist() == [1, 2, 3]


@pytest.mark.parametrize("change", [lambda array: array[::-1], numpy.array, lambda array: array + 1])
def test_arrays_that_are_no_part_of_a_file(change, tmp_path):
    numpy.save(tmp_path / "x.npy", numpy.arange(4.0))
    array = change(numpy.load(tmp_path / "x.npy", mmap_mode="r"))
    store = open_store({"x": array})
    assert same_bits(read_tensor(store, "x"), tensor_of(array))


def test_private_changes_of_a_memmap(tmp_path):
    numpy.save(tmp_path / "x.npy", numpy.arange(4.0))
    array = numpy.load(tmp_path / "x.npy", mmap_mode="c")
    array[0] = 7
    store = open_store({"x": array})
    assert type(store) is MemoryStore
    assert read_tensor(store, "x").tolist() == [7, 1, 2, 3]


def test_memmap_of_a_file_that_became_shorter(tmp_path):
    array = numpy.memmap(tmp_path / "x", "f4", "w+", shape=(3,))
    os.truncate(tmp_path / "x", 8)
    with pytest.raises(StoreFormatError, match="has become shorter"):
        open_store({"x": array})


def test_arrays_stay_where_they_are():
    array = numpy.arange(4.0)
    array.flags.writeable = False
    store = open_store({"x": array})
    assert store.tensor("x").data_ptr() == array.__array_interface__["data"][0]
    del array
    assert store.tensor("x").tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", ["O", "U3", "M8[s]", "V2"])
def test_other_arrays(dtype):
    with pytest.raises(StoreFormatError, match="array 'x' has numpy dtype"):
        open_store({"x": numpy.zeros(2, dtype)})


def test_numpy_is_not_imported():
    import subprocess
    import sys

    script = "import sys; sys.modules['numpy'] = None; import pylomin.store.open; print('ok')"
    assert (
        subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, check=True).stdout
        == b"ok\n"
    )
