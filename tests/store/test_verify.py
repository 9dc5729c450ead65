"""verify names what is not as it was written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import pylomin
from pylomin.store.digests import DIGESTS_KEY
from pylomin.store.open import open_store

TENSORS = {"a": torch.arange(6).view(2, 3), "b": torch.arange(6.0), "empty": torch.empty(0)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return pylomin.save_store(TENSORS, tmp_path)


def patch(path: Path, old: bytes, new: bytes) -> None:
    raw = path.read_bytes()
    assert raw.count(old) == 1
    path.write_bytes(raw.replace(old, new))


def edit_digests(path: Path, edit: Any) -> None:
    """The file with other digests in its header; everything else as it was."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"][DIGESTS_KEY] = edit(header["__metadata__"][DIGESTS_KEY])
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def test_all_is_well(path: Path) -> None:
    report = pylomin.verify(path)
    assert report.ok
    assert report.checked == ("a", "b", "empty")
    assert report.without_digest == report.differences == ()
    assert str(report) == "3 weights are as they were written, 0 differences, 0 without digest"


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("shard", [None, 30])
def test_one_bit(name: str, shard: int | None, tmp_path: Path) -> None:
    path = pylomin.save_store(TENSORS, tmp_path, max_shard_size=shard)
    place = open_store(path).location(name)
    with open(place.file.path, "r+b") as file:
        file.seek(place.extent.stop - 1)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([last ^ 1]))
    report = pylomin.verify(path)
    assert not report.ok
    assert [(difference.name, difference.path) for difference in report.differences] == [(name, place.file.path)]
    assert f"weight {name!r} of {place.file.path!r}: expected sha256" in str(report)
    assert set(report.checked) == set(TENSORS) - {name}


@pytest.mark.parametrize(
    ("old", "new"),
    [(b'"shape":[2,3]', b'"shape":[3,2]'), (b'"F32","shape":[6]', b'"I32","shape":[6]')],
    ids=["shape", "dtype"],
)
def test_the_header(old: bytes, new: bytes, path: Path) -> None:
    patch(path, old, new)
    report = pylomin.verify(path)
    assert [difference.name for difference in report.differences] == [None]
    assert "the header" in str(report)


def test_another_name(path: Path) -> None:
    patch(path, b'"b":{"dtype"', b'"c":{"dtype"')
    report = pylomin.verify(path)
    assert {difference.name for difference in report.differences} == {None, "b"}
    assert report.without_digest == ("c",)


def test_files_of_others(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    report = pylomin.verify(tmp_path)
    assert report.ok
    assert report.checked == ()
    assert set(report.without_digest) == set(TENSORS)


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda text: "x", "not valid JSON"),
        (lambda text: "[]", "expected an object"),
        (lambda text: text.replace("sha256", "crc32"), "algorithm 'crc32'"),
        (lambda text: text.replace('"weights":{', '"weights":{"x":7,'), "are no strings"),
        (lambda text: text.replace('"layout":', '"lay":'), "are no strings"),
    ],
)
def test_damaged_digests(edit: Any, problem: str, path: Path) -> None:
    edit_digests(path, edit)
    report = pylomin.verify(path)
    assert not report.ok
    assert problem in str(report)
    assert set(report.without_digest) == set(TENSORS)


def test_truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(pylomin.StoreFormatError, match="ends at byte"):
        pylomin.verify(path)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(pylomin.StoreReadError, match="does not exist"):
        pylomin.verify(tmp_path / "model.safetensors")


def test_progress_and_descriptors(path: Path) -> None:
    before = len(os.listdir("/dev/fd"))
    calls: list[tuple[int, int]] = []
    pylomin.verify(path, progress=lambda *call: calls.append(call))
    assert calls[-1] == (72, 72)
    assert len(os.listdir("/dev/fd")) == before
