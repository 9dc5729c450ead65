"""Parts of weights, read from any store: the values that indexing gives, and no page that they do not touch."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import torch

from pylomin.errors import StoreReadError
from pylomin.io.buffers import PAGE_BYTES
from pylomin.io.page_cache import cached_fraction, drop
from pylomin.io.scattered import _reads
from pylomin.store.base import ReadRequest
from pylomin.store.extents import ExtentStore, StoredWeight
from pylomin.store.memory import MemoryStore
from pylomin.store.open import open_store
from pylomin.store.selection import Selection, intervals_of
from pylomin.store.sliced import Part, sliced
from pylomin.store.tensor_bytes import byte_view
from pylomin.store.writer import WeightToWrite, write_safetensors

SHAPE = (4, 5, 6)
CHOICES = (None, [1], [0, 1], [0, 2, 3], [3])


def test_every_selection_has_the_values_of_indexing(tmp_path: Path) -> None:
    values = torch.arange(120, dtype=torch.int16).reshape(SHAPE)
    write_safetensors(tmp_path / "a.safetensors", [WeightToWrite("a", torch.int16, SHAPE, lambda: values)])
    torch.save({"a": values.transpose(0, 2).contiguous().transpose(0, 2)}, tmp_path / "a.pt")
    stores = [open_store(tmp_path / "a.safetensors"), open_store(tmp_path / "a.pt"), MemoryStore({"a": values})]
    for chosen in itertools.product(CHOICES, repeat=3):
        indices = [list(range(size)) if one is None else one for size, one in zip(SHAPE, chosen, strict=True)]
        selection = Selection(SHAPE, tuple(map(intervals_of, indices)))
        expected = values[indices[0]][:, indices[1]][:, :, indices[2]].contiguous()
        assert selection.selected_shape == expected.shape
        for store in stores:
            part = sliced(store, {"part": Part("a", selection)})
            found = torch.empty_like(expected)
            part.read([ReadRequest("part", 0, byte_view(found))])
            assert torch.equal(found, expected), (store, chosen)
            if found.numel() > 2:
                some = torch.empty(found.numel() - 2, dtype=torch.int16)
                part.read([ReadRequest("part", 2, byte_view(some))])
                assert torch.equal(some, expected.flatten()[1:-1])


def test_rows_are_an_extent() -> None:
    whole = (0, 5), (0, 6)
    assert Selection(SHAPE, (((1, 3),), whole[:1], whole[1:])).is_run
    assert Selection(SHAPE, (((1, 2),), ((2, 4),), whole[1:])).is_run
    assert not Selection(SHAPE, (((1, 3),), ((2, 4),), whole[1:])).is_run
    assert not Selection(SHAPE, (((0, 1), (2, 3)), whole[:1], whole[1:])).is_run
    assert Selection(SHAPE, (((0, 0),), whole[:1], whole[1:])).is_run


def test_only_the_pages_of_a_part_are_read(tmp_path: Path) -> None:
    shape = (64, 4 * PAGE_BYTES)
    path = tmp_path / "a.safetensors"
    write_safetensors(path, [WeightToWrite("a", torch.uint8, shape, lambda: torch.ones(shape, dtype=torch.uint8))])
    store = open_store(path)
    columns = Selection(shape, (((0, 64),), ((0, 2 * PAGE_BYTES),)))
    part = sliced(store, {"a": Part("a", columns)})
    assert isinstance(store, ExtentStore)
    stored = store.weight("a")
    assert isinstance(stored, StoredWeight)
    with path.open("r+b") as file:
        os.fsync(file.fileno())  # dirty pages do not leave
        size = path.stat().st_size
        drop(file.fileno(), 0, size)
        if cached_fraction(file.fileno(), [(0, size)], 64) != 0:
            pytest.skip("the pages of this file system do not leave the cache")
        found = torch.zeros(64, 2 * PAGE_BYTES, dtype=torch.uint8)
        part.read([ReadRequest("a", 0, byte_view(found))])
        assert found.all()
        rows = [stored.extent.start + row * shape[1] for row in range(64)]
        rest = [(at + 2 * PAGE_BYTES, at + 4 * PAGE_BYTES) for at in rows]
        assert cached_fraction(file.fileno(), [(at, at + 2 * PAGE_BYTES) for at in rows], 64) == 1
        assert cached_fraction(file.fileno(), rest, 64) == 0


def test_runs_with_no_page_between_them_are_one_read() -> None:
    page, buffer = PAGE_BYTES, memoryview(bytearray(1 << 20))
    ranges = [
        (0, page // 2),
        (page, 2 * page),
        (2 * page + 1, 2 * page + 2),
        (4 * page - 1, 4 * page),
        (6 * page, 6 * page + 9),
    ]
    assert [(start, nbytes) for start, _, nbytes in _reads(ranges, buffer)] == [
        (0, 4 * page),
        (6 * page, 9),
    ]


def test_a_truncated_file_is_an_error(tmp_path: Path) -> None:
    path, shape = tmp_path / "a.safetensors", (64, 64)
    write_safetensors(path, [WeightToWrite("a", torch.float32, shape, lambda: torch.ones(shape))])
    part = sliced(open_store(path), {"half": Part("a", Selection(shape, (((0, 64),), ((0, 32),))))})
    path.write_bytes(path.read_bytes()[:-6000])
    with pytest.raises(StoreReadError, match="could not read weight 'half'"):
        part.read([ReadRequest("half", 0, byte_view(torch.empty(64, 32)))])
