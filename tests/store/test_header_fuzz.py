"""Damaged headers give a StoreFormatError, or what the safetensors library makes of them too."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from pylomin.errors import StoreFormatError
from pylomin.store.dtypes import TORCH_DTYPES
from pylomin.store.safetensors import SafetensorsStore

from .files import read_tensor, same_bits

GOOD = save(
    {
        "layer.weight": torch.arange(6, dtype=torch.float32).view(2, 3),
        "layer.bias": torch.arange(3, dtype=torch.bfloat16),
        "empty": torch.empty(0, 2, dtype=torch.int64),
    },
    {"format": "pt"},
)


# A slow machine is no failure.
unhurried = settings(max_examples=300, deadline=None)


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


def check(raw: bytes, directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(raw)
    try:
        store = SafetensorsStore(path)
    except StoreFormatError:
        return
    with safe_open(path, "pt") as library:
        assert set(store) == set(library.keys())
        assert dict(store.metadata) == (library.metadata() or {})
        for name in store:
            assert store.info(name).dtype == TORCH_DTYPES[library.get_slice(name).get_dtype()]
            assert same_bits(read_tensor(store, name), library.get_tensor(name))
    store.close()


def test_undamaged(directory):
    check(GOOD, directory)
    assert len(SafetensorsStore(directory / "model.safetensors")) == 3


@unhurried
@given(flips=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=4))
def test_changed_bytes(directory, flips):
    raw = bytearray(GOOD)
    for position, value in flips:
        raw[position] = value
    check(bytes(raw), directory)


@unhurried
@given(size=st.integers(0, len(GOOD)), tail=st.binary(max_size=8))
def test_cut_and_extended(directory, size, tail):
    check(GOOD[:size] + tail, directory)


@unhurried
@given(start=st.integers(8, len(GOOD)), length=st.integers(0, 20), new=st.binary(max_size=20))
def test_header_bytes_replaced(directory, start, length, new):
    header_length = int.from_bytes(GOOD[:8], "little")
    header = bytearray(GOOD[8 : 8 + header_length])
    header[start - 8 : start - 8 + length] = new
    raw = len(header).to_bytes(8, "little") + bytes(header) + GOOD[8 + header_length :]
    check(raw, directory)


numbers = st.integers(-2, 12) | st.sampled_from(
    [1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, -(1 << 63), 0.0, True, None]
)
dtypes = st.sampled_from([*TORCH_DTYPES, "F6_E2M3", "I4", "", None, 0])
entries = st.fixed_dictionaries(
    {
        "dtype": dtypes,
        "shape": st.lists(numbers, max_size=4) | numbers,
        "data_offsets": st.lists(numbers, min_size=1, max_size=3) | numbers,
    },
    optional={"extra": numbers},
)
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
headers = st.dictionaries(
    st.sampled_from(["a", "b", "c", "__metadata__"]) | st.text(max_size=3),
    entries | junk,
    max_size=4,
)


@unhurried
@given(header=headers | junk, data=st.binary(max_size=24))
def test_random_structures(directory, header, data):
    text = json.dumps(header).encode()
    check(len(text).to_bytes(8, "little") + text + data, directory)


@st.composite
def nearly_valid(draw: st.DrawFn) -> bytes:
    """Weights that do cover the data, then perhaps one number off by a little."""
    fields = {}
    offset = 0
    for name in draw(st.lists(st.text(max_size=3), unique=True, max_size=5)):
        dtype = draw(st.sampled_from(["U8", "F16", "I64", "F4", "F8_E8M0", "BOOL"]))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        bits = {"U8": 8, "F16": 16, "I64": 64, "F4": 4, "F8_E8M0": 8, "BOOL": 8}[dtype]
        for size in shape:
            bits *= size
        fields[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [offset, offset + bits // 8],
        }
        offset += bits // 8
    if fields and draw(st.booleans()):
        damaged = fields[draw(st.sampled_from(sorted(fields)))]
        which = damaged[draw(st.sampled_from(["shape", "data_offsets"]))]
        if which:
            which[draw(st.integers(0, len(which) - 1))] += draw(st.sampled_from([-1, 1, 8]))
    text = json.dumps(fields, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + bytes(offset)


@unhurried
@given(raw=nearly_valid())
def test_nearly_valid(directory, raw):
    check(raw, directory)
