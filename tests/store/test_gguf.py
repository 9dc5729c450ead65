"""GGUF files, good and bad ones. The oracle for good ones is the ``gguf`` package."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from pylomin.errors import StoreChangedError, StoreFormatError
from pylomin.store.extents import StoredWeight
from pylomin.store.gguf import GGUFStore
from pylomin.store.gguf_blocks import BLOCK_TYPES

from .files import open_descriptors, read_bytes, read_tensor, same_bits, touch_later
from .gguf_files import ARRAY, NUMBERS, STRING, UINT32, gguf_file, listed, text

SCALES = {"Q4_0": [0], "Q8_0": [0], "Q4_K": [0, 2], "Q6_K": [208]}  # where float16 numbers are
QUANTISED = {name: GGMLQuantizationType[name] for name in BLOCK_TYPES}


def store_of(raw: bytes, directory: Path) -> GGUFStore:
    (directory / "x.gguf").write_bytes(raw)
    return GGUFStore(directory / "x.gguf")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("gguf")


def random_blocks(name: str, shape: tuple[int, ...], seed: int = 0) -> numpy.ndarray:
    block = BLOCK_TYPES[name]
    generator = numpy.random.default_rng(seed)
    blocks = generator.integers(0, 256, (*shape[:-1], shape[-1] // block.elements, block.nbytes), dtype=numpy.uint8)
    for position in SCALES[name]:
        blocks[..., position + 1] &= 0xBF  # finite: which NaN a product is depends on the library
    return blocks.reshape(*shape[:-1], blocks.shape[-2] * block.nbytes)


def test_as_the_library_writes_it(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b" * 1000, ""])
    writer.add_array("tokenizer.ggml.scores", [0.5] * 1000)
    writer.add_array("flags", [True, False])
    writer.add_float64("x", 0.5)
    writer.add_string("long", "y" * 100_000)
    generator = numpy.random.default_rng(0)
    plain = {
        "a": generator.standard_normal((3, 5)).astype("f4"),
        "b": generator.standard_normal((2, 3, 4)).astype("f2"),
        "c": generator.standard_normal(7),
        "d": generator.integers(-9, 9, (4, 2)).astype("i2"),
    }
    expected = {name: torch.from_numpy(array) for name, array in plain.items()}
    for name, array in plain.items():
        writer.add_tensor(name, array)
    for name, kind in QUANTISED.items():
        raw = random_blocks(name, (3, 512))
        writer.add_tensor(name, raw, raw_dtype=kind)
        expected[name] = torch.from_numpy(quants.dequantize(raw, kind))
    bfloat = quants.quantize(plain["a"], GGMLQuantizationType.BF16)
    writer.add_tensor("e", bfloat, raw_dtype=GGMLQuantizationType.BF16)
    expected["e"] = torch.from_numpy(plain["a"]).bfloat16()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    store = GGUFStore(tmp_path / "x.gguf")
    assert set(store) == set(expected)
    for name, tensor in expected.items():
        assert same_bits(read_tensor(store, name), tensor), name
        assert isinstance(store.weight(name), StoredWeight) == (name not in QUANTISED)


@pytest.mark.parametrize("name", QUANTISED)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_decoders(directory, name, data):
    """Any bytes, any part of them, bit for bit."""
    elements = BLOCK_TYPES[name].elements
    shape = (*data.draw(st.lists(st.integers(0, 3), max_size=2)), elements * data.draw(st.integers(1, 3)))
    raw = random_blocks(name, shape, data.draw(st.integers(0, 99)))
    expected = quants.dequantize(raw, QUANTISED[name]).reshape(shape) if raw.size else numpy.empty(shape, "f4")
    store = store_of(gguf_file({}, blocks={"x": (shape, int(QUANTISED[name]), raw.tobytes())}), directory)
    assert store.info("x").shape == shape
    assert store.info("x").dtype == torch.float32
    assert read_bytes(store, "x") == expected.tobytes()
    start = data.draw(st.integers(0, expected.nbytes))
    stop = data.draw(st.integers(start, expected.nbytes))
    assert read_bytes(store, "x", start, stop) == expected.tobytes()[start:stop]
    store.close()


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_decoders_of_what_was_quantised(name, tmp_path):
    weights = numpy.random.default_rng(0).standard_normal((8, 256)).astype("f4")
    raw = quants.quantize(weights, QUANTISED[name])
    store = store_of(gguf_file({}, blocks={"x": ((8, 256), int(QUANTISED[name]), raw.tobytes())}), tmp_path)
    error = (read_tensor(store, "x") - torch.from_numpy(weights)).norm() / numpy.linalg.norm(weights)
    assert error < {"Q8_0": 0.01, "Q4_0": 0.12}[name]


def test_a_large_weight_is_decoded_in_pieces(tmp_path):
    shape = (64, 1 << 16)  # 16 MiB of float32
    raw = random_blocks("Q4_0", shape)
    store = store_of(gguf_file({}, blocks={"x": (shape, 2, raw.tobytes())}), tmp_path)
    expected = quants.dequantize(raw, QUANTISED["Q4_0"])
    assert read_bytes(store, "x") == expected.tobytes()


def test_rows_read_their_blocks_only(tmp_path, monkeypatch):
    shape = (100, 256)
    store = store_of(gguf_file({}, blocks={"x": (shape, 12, random_blocks("Q4_K", shape).tobytes())}), tmp_path)
    read = []
    file = store.files[0]
    monkeypatch.setattr(type(file), "read", lambda self, start, to: read.append(sum(map(len, to))))
    read_bytes(store, "x", 5 * 1024, 7 * 1024)
    assert read == [2 * 144]


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [32, 64, 4096])
def test_versions_and_alignments(version, alignment, tmp_path):
    values = [text("general.alignment") + struct.pack("<II", UINT32, alignment)]
    tensors = {"a": torch.arange(3.0), "b": torch.arange(5.0)}
    store = store_of(gguf_file(tensors, values=values, alignment=alignment, version=version), tmp_path)
    assert all(store.location(name).extent.start % alignment == 0 for name in store)
    assert all(same_bits(read_tensor(store, name), tensor) for name, tensor in tensors.items())


def test_values_are_passed_over(tmp_path):
    strings = struct.pack("<IQ", STRING, 2) + text("a") + text("b" * 300_000)
    values = [
        *[
            text(f"k{kind}") + struct.pack("<I", kind) + bytes(size)
            for kind, size in enumerate([1, 1, 2, 2, 4, 4, 4, 1])
        ],
        *[text(f"k{kind}") + struct.pack("<I", kind) + bytes(8) for kind in (10, 11, 12)],
        text("strings") + struct.pack("<I", ARRAY) + strings,
        text("arrays") + struct.pack("<IIQ", ARRAY, ARRAY, 2) + strings + struct.pack("<IQ", UINT32, 1) + bytes(4),
        text("none") + struct.pack("<IIQ", ARRAY, UINT32, 0),
    ]
    store = store_of(gguf_file({"x": torch.arange(3.0)}, values=values), tmp_path)
    assert read_tensor(store, "x").tolist() == [0, 1, 2]


def test_changed_file(tmp_path):
    shape = (4, 32)
    raw = gguf_file({"a": torch.ones(3)}, blocks={"q": (shape, 8, random_blocks("Q8_0", shape).tobytes())})
    store = store_of(raw, tmp_path)
    (tmp_path / "x.gguf").write_bytes(raw[:-1])
    touch_later(tmp_path / "x.gguf")
    for name in ("a", "q"):
        with pytest.raises(StoreChangedError, match=f"could not read weight '{name}'"):
            read_tensor(store, name)


# -- malformed --------------------------------------------------------------------------------------------------------

GOOD = gguf_file({"a": torch.arange(3.0), "b": torch.arange(5.0)})


def with_tensors(*infos: bytes, count: int | None = None, values: bytes = b"", kv: int = 0) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos) if count is None else count, kv) + values + b"".join(infos)
    return head + bytes(-len(head) % 32) + bytes(64)


ALIGNMENT = text("general.alignment")
HUGE = (1 << 64) - 1
F32 = NUMBERS[torch.float32]
MALFORMED = {
    "magic": (b"GGML" + GOOD[4:], "does not begin with GGUF"),
    "version": (b"GGUF" + struct.pack("<I", 1) + GOOD[8:], "is of version 1; expected 2 or 3"),
    "big endian": (b"GGUF" + struct.pack(">I", 3) + GOOD[8:], "is of version 50331648"),
    "many tensors": (with_tensors(listed("a", (3,), F32, 0), count=HUGE), "claims 18446744073709551615 weights"),
    "many values": (with_tensors(kv=HUGE), "ends too early|value of type"),
    "long name": (with_tensors(struct.pack("<Q", HUGE)), "claims a name of"),
    "long key": (with_tensors(kv=1, values=struct.pack("<Q", 1 << 20)), "claims a name of"),
    "long text": (with_tensors(kv=1, values=text("k") + struct.pack("<IQ", STRING, HUGE)), "ends too early"),
    "long array": (with_tensors(kv=1, values=text("k") + struct.pack("<IIQ", ARRAY, UINT32, HUGE)), "ends too early"),
    "array of texts": (
        with_tensors(kv=1, values=text("k") + struct.pack("<IIQ", ARRAY, STRING, HUGE)),
        "ends too early",
    ),
    "nested": (
        with_tensors(kv=1, values=text("k") + struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 3000),
        "arrays in arrays",
    ),
    "type of value": (with_tensors(kv=1, values=text("k") + struct.pack("<I", 13)), "has a value of type 13"),
    "dimensions": (with_tensors(listed("a", (1,) * 9, F32, 0)), "of 9 dimensions"),
    "all dimensions": (with_tensors(text("a") + struct.pack("<I", 0xFFFFFFFF)), "of 4294967295 dimensions"),
    "size": (with_tensors(listed("a", (1 << 32, 1 << 32), F32, 0)), "shape .*, not possible with type F32"),
    "hidden size": (with_tensors(listed("a", (0, 1 << 62, 4), F32, 0)), "not possible with type F32"),
    "blocks": (with_tensors(listed("a", (4, 33), 8, 0)), "shape .4, 33., not possible with type Q8_0"),
    "scalar block": (with_tensors(listed("a", (), 8, 0)), "not possible with type Q8_0"),
    "offset": (with_tensors(listed("a", (3,), F32, 64)), "ends at byte .*, beyond byte"),
    "huge offset": (with_tensors(listed("a", (3,), F32, HUGE - 31)), "ends at byte .*, beyond byte"),
    "odd offset": (with_tensors(listed("a", (3,), F32, 4)), "no multiple of 32"),
    "overlap": (with_tensors(listed("a", (9,), F32, 0), listed("b", (3,), F32, 32)), "weight 'a' .* ends at byte"),
    "same bytes": (with_tensors(listed("a", (3,), F32, 0), listed("b", (3,), F32, 0)), "ends at byte"),
    "same name": (with_tensors(listed("a", (3,), F32, 0), listed("a", (3,), F32, 32)), "two weights named 'a'"),
    "alignment": (with_tensors(kv=1, values=ALIGNMENT + struct.pack("<II", UINT32, 3)), "power of two"),
    "no alignment": (
        with_tensors(kv=1, values=ALIGNMENT + struct.pack("<II", UINT32, 0)),
        "power of two",
    ),
    "other type": (with_tensors(listed("a", (256,), 16, 0)), "is of type IQ2_XXS; expected one of F32, .*Q6_K"),
    "no type": (with_tensors(listed("a", (256,), 4, 0)), "is of type number 4"),
    "truncated": (GOOD[:-1], "ends at byte"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed(kind, tmp_path):
    raw, message = MALFORMED[kind]
    before = open_descriptors()
    tracemalloc.start()
    try:
        with pytest.raises(StoreFormatError, match=message) as caught:
            store_of(raw, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 1000
    del caught
    assert open_descriptors() == before


def test_every_truncation_is_noticed(tmp_path):
    for size in range(len(GOOD)):
        with pytest.raises(StoreFormatError):
            store_of(GOOD[:size], tmp_path)
