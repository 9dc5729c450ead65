"""Encoding while writing: pieces of any size, schemes that turn out not to suit, and what is left behind."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pylomin
from pylomin.errors import StoreReadError
from pylomin.quantize.choose import chooser
from pylomin.quantize.codec import encode
from pylomin.store.pieces import AHEAD, made_ahead
from pylomin.store.quantizing import QuantizingEncoder, Rejected, runs_of, write_quantized
from pylomin.store.saving import SaveOptions, save_weights
from pylomin.store.writer import WeightToWrite

from .files import open_descriptors, read_tensor, same_bits


def reused_pieces(tensor: torch.Tensor, sizes: list[int]) -> Iterator[torch.Tensor]:
    """Runs of elements in a few buffers, in turn, each overwritten with nonsense when it is no longer to be used."""
    flat, start = tensor.reshape(-1), 0
    buffers = [torch.empty(max(sizes, default=1), dtype=tensor.dtype) for _ in range(1 + AHEAD)]
    for number in itertools.count():
        buffer = buffers[number % len(buffers)].fill_(-1)
        if start >= flat.numel():
            return
        piece = buffer[: min(sizes[number % len(sizes)], flat.numel() - start)]
        piece.copy_(flat[start : start + len(piece)])
        start += len(piece)
        yield piece


def weight(tensor: torch.Tensor, sizes: list[int]) -> WeightToWrite:
    return WeightToWrite("w", tensor.dtype, tuple(tensor.shape), partial(reused_pieces, tensor, sizes))


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 5), st.lists(st.integers(1, 30), min_size=1, max_size=3))
def test_runs_are_of_whole_units(units, unit, most_units, sizes):
    tensor = torch.arange(units * unit + unit // 2)
    most = most_units * unit + unit // 2
    runs = [run.clone() for run in runs_of(made_ahead(weight(tensor, sizes).pieces()), unit, most)]
    assert all(0 < len(run) <= max(unit, most) for run in runs)
    assert not any(len(run) % unit for run in runs[:-1])
    assert torch.equal(torch.cat(runs) if runs else torch.empty(0, dtype=torch.int64), tensor)


def write(tensors: dict[str, torch.Tensor], path, encoder: QuantizingEncoder, sizes: list[int]) -> None:
    weights = [
        WeightToWrite(name, t.dtype, tuple(t.shape), partial(reused_pieces, t, sizes)) for name, t in tensors.items()
    ]
    save = partial(save_weights, weights, path, SaveOptions(encoder=encoder, progress=False), metadata={}, aliases={})
    write_quantized(encoder, partial(save, where="here"))


@pytest.mark.parametrize("sizes", [[1000], [77, 130], [1 << 20]])
@pytest.mark.parametrize("scheme", ["int8", "int4", "bf16"])
def test_pieces_change_nothing(tmp_path, sizes, scheme):
    tensors = {"w": torch.randn(130, 77), "b": torch.randn(5)}
    write(tensors, tmp_path / "w.safetensors", QuantizingEncoder(chooser(scheme, None), tensors), sizes)
    store = pylomin.open_store(tmp_path / "w.safetensors")
    encoded = encode(tensors["w"], scheme)
    for part, expected in zip(encoded.packing.parts, encoded.parts, strict=True):
        assert same_bits(read_tensor(store.file, "w" + part.suffix), expected)


def test_schemes_that_do_not_suit_are_replaced_together(tmp_path):
    torch.manual_seed(0)
    tensors = {"good": torch.randn(64, 64), "rough": torch.randn(64, 64) ** 3, "bad": torch.full((64, 64), torch.nan)}
    encoder = QuantizingEncoder(chooser("int8", None), tensors, max_error=0.0062)
    times = 0
    encode_weight = encoder.encode

    def counted(weight):
        nonlocal times
        times += weight.name == "good"
        return encode_weight(weight)

    encoder.encode = counted
    write(tensors, tmp_path / "w.safetensors", encoder, [5000])
    assert {name: entry.scheme for name, entry in encoder.report().items()} == {
        "good": "int8",
        "rough": "bf16",
        "bad": "full",
    }
    assert times == 2, "once with int8 for all, once with what suits each"
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_rejection_is_raised_at_the_end():
    tensors = {"w": torch.full((64, 64), torch.inf)}
    encoder = QuantizingEncoder(chooser("int8", None), tensors)
    parts = encoder.encode(weight(tensors["w"], [4096]))
    before = encoder.metadata(["w", "w_scale"])
    written = [torch.cat(list(part.pieces())) for part in parts]
    assert [len(values) for values in written] == [4096, 64]
    with pytest.raises(Rejected):
        encoder.metadata(["w", "w_scale"])
    assert [part.name for part in encoder.encode(weight(tensors["w"], [4096]))] == ["w"]
    assert len(before) == 1


@pytest.mark.parametrize("group_size", [0, -1, 1.5, True])
def test_group_sizes(group_size, tmp_path):
    with pytest.raises(pylomin.PassError, match=r"group_size is .*; expected a positive integer"):
        pylomin.save_store({"w": torch.zeros(64, 64)}, tmp_path / "w", quantize="int8", group_size=group_size)
    assert list(tmp_path.iterdir()) == []


def test_metadata_does_not_grow():
    """Room for it is set aside before the errors are known."""
    tensors = {"w": torch.randn(64, 64) * 1e-30}
    encoder = QuantizingEncoder(chooser("int4", None), tensors)
    parts = encoder.encode(weight(tensors["w"], [4096]))
    before = encoder.metadata(["w"])
    for part in parts:
        list(part.pieces())
    after = encoder.metadata(["w"])
    assert all(len(after[key]) <= len(before[key]) for key in after)


def test_an_error_of_the_source_comes_up(tmp_path):
    def pieces() -> Iterator[torch.Tensor]:
        yield torch.zeros(64)
        raise StoreReadError("the disk is gone")

    encoder = QuantizingEncoder(chooser("int8", None), ["w"])
    weights = [WeightToWrite("w", torch.float32, (64, 64), pieces)]
    before = threading.active_count()
    with pytest.raises(StoreReadError, match="the disk is gone"):
        save_weights(
            weights,
            tmp_path / "w.safetensors",
            SaveOptions(encoder=encoder, progress=False),
            metadata={},
            aliases={},
            where="here",
        )
    assert threading.active_count() == before
    assert os.listdir(tmp_path) == []


def test_no_descriptor_is_left(tmp_path):
    old = pylomin.save_checkpoint(pylomin.Checkpoint({"model": {"w": torch.zeros(64, 64)}}), tmp_path / "a")
    before = open_descriptors()
    new = pylomin.Checkpoint({"model": {"w": torch.ones(64, 64)}})
    pylomin.save_checkpoint(new, tmp_path / "b", reference=old, lossless=True)
    assert open_descriptors() == before


def test_what_was_begun_ends_with_an_error(tmp_path):
    """Pieces are read and encoded by other threads."""

    def broken() -> Iterator[torch.Tensor]:
        yield torch.ones(64 * 64)
        raise ArithmeticError("half of it")

    good = torch.randn(64, 64)
    weights = [
        WeightToWrite("first", torch.float32, (128, 64), broken),
        WeightToWrite("second", torch.float32, (64, 64), partial(reused_pieces, good, [1000])),
    ]
    before, threads = open_descriptors(), set(threading.enumerate())
    encoder = QuantizingEncoder(lambda name, info: "int8", ["first", "second"])
    save = partial(save_weights, weights, tmp_path / "m.safetensors", SaveOptions(encoder=encoder, progress=False))
    with pytest.raises(ArithmeticError, match="half of it"), contextlib.closing(encoder):
        write_quantized(encoder, partial(save, metadata={}, aliases={}, where="here"))
    assert set(threading.enumerate()) <= threads
    assert open_descriptors() == before
    assert not list(tmp_path.iterdir())
