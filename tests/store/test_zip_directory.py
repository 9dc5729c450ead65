"""Zip files, good and bad ones. The oracle for good ones is the standard library."""

from __future__ import annotations

import random
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from pylomin.errors import StoreFormatError
from pylomin.io.files import WeightFile
from pylomin.store.open import open_store
from pylomin.store.torch_zip import TorchZipStore
from pylomin.store.zip_directory import ZipDirectory, read_zip_directory


def read(path: Path) -> ZipDirectory:
    file = WeightFile(path)
    try:
        return read_zip_directory(file)
    finally:
        file.close()


def write(path: Path, entries: dict[str, bytes], method: int = zipfile.ZIP_STORED, comment: bytes = b"") -> bytearray:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in entries.items():
            file.writestr(name, content)
        file.comment = comment
    return bytearray(path.read_bytes())


ENTRIES = {"a.txt": b"first", "folder/b": b"", "ü": bytes(range(256)) * 10}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("comment", [b"", b"a comment", b"x" * 65535])
def test_as_the_standard_library_reads_it(method, comment, tmp_path):
    raw = write(tmp_path / "x.zip", ENTRIES, method, comment)
    entries = read(tmp_path / "x.zip").entries
    assert list(entries) == list(ENTRIES)
    with zipfile.ZipFile(tmp_path / "x.zip") as file:
        for info in file.infolist():
            entry = entries[info.filename]
            assert (entry.method, entry.size_bytes) == (info.compress_type, info.file_size)
            assert entry.extent.nbytes == info.compress_size
            if method == zipfile.ZIP_STORED:
                assert raw[entry.extent.start : entry.extent.stop] == ENTRIES[info.filename]


def test_sizes_of_64_bits(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file, file.open("a", "w", force_zip64=True) as entry:
        entry.write(b"abc")
    extent = read(tmp_path / "x.zip").entries["a"].extent
    assert (tmp_path / "x.zip").read_bytes()[extent.start : extent.stop] == b"abc"


def test_offsets_beyond_32_bits(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a", b"abc")
        file.fp.seek(5 << 30)
        file.start_dir = 5 << 30  # a hole in the file, and in the disk space it takes
        file.writestr("b", b"def")
    extent = read(path).entries["b"].extent
    assert extent.start > 5 << 30
    with path.open("rb") as raw:
        raw.seek(extent.start)
        assert raw.read(3) == b"def"


def patched(tmp_path: Path, signature: bytes, offset: int, value: bytes, occurrence: int = 0) -> Path:
    """A file with other bytes ``offset`` behind a signature."""
    raw = write(tmp_path / "x.zip", ENTRIES)
    position = -1
    for _ in range(occurrence + 1):
        position = raw.index(signature, position + 1)
    raw[position + offset : position + offset + len(value)] = value
    (tmp_path / "x.zip").write_bytes(raw)
    return tmp_path / "x.zip"


CENTRAL, LOCAL, END = b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"


@pytest.mark.parametrize(
    ("signature", "offset", "value", "message"),
    [
        (END, 0, b"XX", "has no end of a zip directory"),
        (END, 4, b"\1\0", "one of several parts"),
        (END, 8, b"\2\0", "one of several parts"),
        (END, 8, b"\2\0\2\0", "more in its directory than it counts"),
        (END, 8, b"\xfe\xff\xfe\xff", "claims a directory of 65534 entries"),
        (END, 12, b"\xf0\xff\xff\xff", "claims a directory of 3 entries in 4294967280 bytes"),
        (END, 16, b"\0\0\0\0", "claims a directory of 3 entries"),
        (END, 20, b"\1\0", "has bytes behind its end"),
        (CENTRAL, 0, b"XX", "malformed directory"),
        (CENTRAL, 8, b"\1", "encrypted entry"),
        (CENTRAL, 10, b"\x08", "malformed header before its entry 'a.txt'"),
        (CENTRAL, 20, b"\xf0\xff\xff\x7f", "ends at byte 21474"),
        (CENTRAL, 20, b"\xff\xff\xff\xff", "lacks the 64-bit size"),
        (CENTRAL, 24, b"\x06", "uncompressed entry 'a.txt' of two sizes"),
        (CENTRAL, 28, b"\xff\xff", "malformed directory"),
        (CENTRAL, 30, b"\xff\xff", "malformed directory"),
        (CENTRAL, 34, b"\1", "one of several parts"),
        (CENTRAL, 42, b"\xf0\xff\xff\x7f", "an entry 'a.txt' outside of its place"),
        (CENTRAL, 46, b"b", "another name before its entry 'b.txt'"),
        (LOCAL, 0, b"XX", "malformed header"),
        (LOCAL, 6, b"\1", "malformed header"),
        (LOCAL, 8, b"\x08", "malformed header"),
        (LOCAL, 26, b"\x04", "another name before"),
        (LOCAL, 28, b"\xff\xff", "malformed header"),
        (LOCAL, 30, b"b", "another name before"),
    ],
)
def test_malformed(signature, offset, value, message, tmp_path):
    with pytest.raises(StoreFormatError, match=message):
        read(patched(tmp_path, signature, offset, value))


def test_entries_that_share_bytes(tmp_path):
    """The second entry's header is the first one's: the beginning of a zip bomb."""
    raw = write(tmp_path / "x.zip", {"same": b"x" * 50})
    start, end = raw.index(CENTRAL), raw.index(END)
    central = raw[start:end]
    raw = raw[:end] + central + raw[end:]
    position = raw.index(END)
    struct.pack_into("<2H2L", raw, position + 8, 2, 2, 2 * len(central), start)
    (tmp_path / "x.zip").write_bytes(raw)
    with pytest.raises(StoreFormatError, match="an entry 'same' outside of its place"):
        read(tmp_path / "x.zip")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_names(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("a", b"1")
        file.writestr("a", b"2")
    with pytest.raises(StoreFormatError, match="has two entries named 'a'"):
        read(tmp_path / "x.zip")


def test_names_that_are_no_text(tmp_path):
    raw = write(tmp_path / "x.zip", {"ü": b""})
    (tmp_path / "x.zip").write_bytes(raw.replace("ü".encode(), b"\xff\xff"))
    with pytest.raises(StoreFormatError, match="name is no text"):
        read(tmp_path / "x.zip")


def test_bytes_in_front_and_behind(tmp_path):
    raw = bytes(write(tmp_path / "x.zip", ENTRIES))
    for changed in (b"x" + raw, raw + b"x", raw + raw):
        (tmp_path / "x.zip").write_bytes(changed)
        with pytest.raises(StoreFormatError):
            read(tmp_path / "x.zip")


# -- in files of torch.save -------------------------------------------------------------------------------------------


def test_deflated_storages(tmp_path):
    torch.save({"x": torch.zeros(1000)}, tmp_path / "x.pt")
    for compressed in ("data.pkl", "data/0", "byteorder"):
        with zipfile.ZipFile(tmp_path / "x.pt") as old, zipfile.ZipFile(tmp_path / "y.pt", "w") as new:
            for info in old.infolist():
                method = zipfile.ZIP_DEFLATED if info.filename.endswith(compressed) else zipfile.ZIP_STORED
                new.writestr(info.filename, old.read(info), method)
        with pytest.raises(StoreFormatError, match=rf"{compressed}' of .* is compressed|has byte order"):
            TorchZipStore(tmp_path / "y.pt")


def test_storages_that_are_too_short_or_absent(tmp_path):
    torch.save({"x": torch.zeros(1000)}, tmp_path / "x.pt")
    for size, message in ((3999, "has 3999 bytes; expected 4000"), (None, "has no entry for storage '0'")):
        with zipfile.ZipFile(tmp_path / "x.pt") as old, zipfile.ZipFile(tmp_path / "y.pt", "w") as new:
            for name in old.namelist():
                if not name.endswith("data/0"):
                    new.writestr(name, old.read(name))
                elif size is not None:
                    new.writestr(name, bytes(size))
        with pytest.raises(StoreFormatError, match=message):
            TorchZipStore(tmp_path / "y.pt")


def test_two_pickles(tmp_path):
    write(tmp_path / "x.pt", {"a/data.pkl": b"\x80\x02}.", "b/data.pkl": b"\x80\x02}."})
    with pytest.raises(StoreFormatError, match=r"has 2 entries \*/data\.pkl; expected one"):
        open_store(tmp_path / "x.pt")


def test_huge_pickle(tmp_path):
    """A hole of 200 MB in place of a pickle."""
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", b"")
        file.fp.seek(200_000_000)
        file.start_dir = 200_000_000
    with path.open("r+b") as raw:
        raw.seek(200_000_000 + 20)  # into what the directory says of it
        raw.write(struct.pack("<2L", 199_000_000, 199_000_000))
    with pytest.raises(StoreFormatError, match=r"the pickle of .* has 199000000 bytes; expected at most 100000000"):
        open_store(path)


def test_random_bytes_behind_the_signature(tmp_path):
    generator = random.Random(0)
    for _ in range(200):
        (tmp_path / "x").write_bytes(LOCAL + generator.randbytes(generator.randrange(300)) + END)
        with pytest.raises(StoreFormatError):
            open_store(tmp_path / "x")
