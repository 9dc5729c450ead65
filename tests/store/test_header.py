from __future__ import annotations

import json
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pylomin.errors import StoreFormatError
from pylomin.io.files import Extent
from pylomin.store.dtypes import STORED_DTYPES, TORCH_DTYPES, nbytes_of
from pylomin.store.header import (
    MAX_HEADER_BYTES,
    PREFIX_BYTES,
    Header,
    build_header,
    parse_header,
    parse_header_length,
)

from .files import entry, raw_file


def parse(raw: bytes) -> Header:
    length = parse_header_length(raw[:PREFIX_BYTES], len(raw), "model.safetensors")
    return parse_header(raw[PREFIX_BYTES : PREFIX_BYTES + length], len(raw), "model.safetensors")


def refuse(raw: bytes, message: str) -> None:
    with pytest.raises(StoreFormatError, match=message) as caught:
        parse(raw)
    assert "'model.safetensors'" in str(caught.value)


def refuse_entry(value: object, message: str, data: bytes = b"1234") -> None:
    """A fault of one weight: the error names it."""
    refuse(raw_file({"layer.weight": value}, data), rf"weight 'layer\.weight' .*{message}")


class TestLength:
    @pytest.mark.parametrize("size", range(8))
    def test_file_shorter_than_the_length(self, size):
        refuse(bytes(size), rf"holds {size} bytes; a safetensors file has at least 10")

    @pytest.mark.parametrize("length", [0, 1])
    def test_too_short_for_json(self, length):
        refuse(raw_file(b"{}", length=length), rf"header of {length} bytes; expected 2 to 2")

    def test_beyond_the_end_of_the_file(self):
        refuse(raw_file(b"{}", length=3), "header of 3 bytes; expected 2 to 2")

    @pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 1 << 40, (1 << 64) - 1])
    def test_huge(self, length):
        prefix = length.to_bytes(8, "little")
        tracemalloc.start()
        try:
            with pytest.raises(StoreFormatError, match=f"expected 2 to {MAX_HEADER_BYTES}"):
                parse_header_length(prefix, 1 << 50, "model.safetensors")
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()

    def test_largest(self):
        prefix = MAX_HEADER_BYTES.to_bytes(8, "little")
        assert parse_header_length(prefix, 1 << 40, "model.safetensors") == MAX_HEADER_BYTES


class TestJson:
    @pytest.mark.parametrize("text", [b"{,}", b"hello", b"{} {}", b'{"a": }', b"{'a': 1}", b"\xef\xbb\xbf{}", b"  "])
    def test_not_json(self, text):
        refuse(raw_file(text), "is not valid JSON")

    @pytest.mark.parametrize("text", [b'{"\xff": 1}', b'{"\xed\xa0\x80": 1}'])
    def test_not_utf8(self, text):
        refuse(raw_file(text), "is not valid UTF-8")

    @pytest.mark.parametrize(
        "text", [rb'{"\ud800": 1}', rb'{"__metadata__": {"a": "\udc00"}}', rb'{"a": {"\ud800": 1}}']
    )
    def test_half_a_surrogate_pair(self, text):
        refuse(raw_file(text), "is not valid UTF-8")

    @pytest.mark.parametrize("text", [b"[]", b'""', b"17", b"null", b"[[1]]"])
    def test_not_an_object(self, text):
        refuse(raw_file(text), "expected an object")

    def test_weight_twice(self):
        text = b'{"a": {}, "b": {}, "a": {}}'
        refuse(raw_file(text), r"key 'a' appears twice")

    def test_field_twice(self):
        text = b'{"a": {"dtype": "U8", "dtype": "I8", "shape": [0], "data_offsets": [0, 0]}}'
        refuse(raw_file(text), r"key 'dtype' appears twice")

    @pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
    def test_nesting_bomb(self, opening, closing):
        depth = 100_000
        refuse(raw_file(opening * depth + b"1" + closing * depth), "nested too deeply")

    def test_number_of_a_million_digits(self):
        text = b'{"layer.weight": {"dtype": "U8", "shape": [%s], "data_offsets": [0, 4]}}'
        refuse(raw_file(text % (b"9" * 1_000_000), b"1234"), r"shape is \[inf\]")

    @pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"1e400", b"-0", b"4.0", b"-4"])
    def test_numbers_that_are_no_sizes(self, number):
        text = b'{"layer.weight": {"dtype": "U8", "shape": [%s], "data_offsets": [0, 4]}}'
        refuse(raw_file(text % number, b"1234"), "expected a list of non-negative integers")

    def test_long_values_are_shortened_in_messages(self):
        with pytest.raises(StoreFormatError) as caught:
            parse(raw_file({"a" * 10_000: ["b" * 10_000] * 1000}))
        assert len(str(caught.value)) < 2000


class TestMetadata:
    def test_strings(self):
        assert parse(raw_file({"__metadata__": {"format": "pt"}})).metadata == {"format": "pt"}

    def test_absent(self):
        assert parse(raw_file({})).metadata == {}

    @pytest.mark.parametrize("metadata", [None, [], "text", 1, {"a": 1}, {"a": None}, {"a": {}}])
    def test_not_strings(self, metadata):
        refuse(raw_file({"__metadata__": metadata}), "__metadata__ of .* expected an object of str")


class TestEntry:
    def test_valid(self):
        raw = raw_file({"second": entry("F16", [2, 1], [3, 7]), "first": entry("U8", [3], [0, 3])}, b"1234567")
        header = parse(raw)
        data_start = len(raw) - 7
        assert header.data_start == data_start
        assert list(header.entries) == ["first", "second"]  # in file order
        second = header.entries["second"]
        assert second.info.dtype == torch.float16
        assert (second.info.shape, second.info.nbytes) == ((2, 1), 4)
        assert second.extent == Extent(data_start + 3, data_start + 7)

    @pytest.mark.parametrize("value", [None, [], "U8", 4, {}, ["U8", [4], [0, 4]]])
    def test_not_an_entry(self, value):
        refuse_entry(value, r"expected exactly \['data_offsets', 'dtype', 'shape'\]")

    @pytest.mark.parametrize("field", ["dtype", "shape", "data_offsets"])
    def test_field_missing(self, field):
        value = entry()
        del value[field]
        refuse_entry(value, "expected exactly")

    def test_unknown_field(self):
        refuse_entry({**entry(), "stride": [1]}, "expected exactly")

    @pytest.mark.parametrize("dtype", ["I4", "F6_E2M3", "f32", "", None, 8, ["U8"], {"U8": None}])
    def test_unknown_dtype(self, dtype):
        refuse_entry(entry(dtype), "dtype .* is not one that torch .* expected one of BOOL, U8")

    @pytest.mark.parametrize("shape", [None, 4, "4", {}, [-1], [True], [4.0], ["4"], [[4]], [None]])
    def test_shape_is_not_a_list_of_sizes(self, shape):
        refuse_entry(entry(shape=shape), "shape is .* expected a list of non-negative integers")

    @pytest.mark.parametrize("offsets", [None, 4, [0, -4], [False, 4], [0, 4.0], ["0", "4"]])
    def test_offsets_are_not_integers(self, offsets):
        refuse_entry(entry(offsets=offsets), "data_offsets is .* expected a list of non-negative")

    @pytest.mark.parametrize("offsets", [[], [4], [0, 4, 4], [4, 0]])
    def test_offsets_are_not_begin_and_end(self, offsets):
        refuse_entry(entry(offsets=offsets), r"expected \[begin, end\], begin <= end")

    @pytest.mark.parametrize(("dtype", "shape"), [("U8", [3]), ("F32", [4]), ("U8", []), ("U8", [0])])
    def test_size_is_not_that_of_dtype_and_shape(self, dtype, shape):
        refuse_entry(entry(dtype, shape), r"data_offsets \[0, 4\] hold 4 bytes; expected \d+ for")

    def test_beyond_the_end_of_the_file(self):
        refuse_entry(entry(shape=[5], offsets=[0, 5]), r"it ends at byte \d+, the file at \d+")

    @pytest.mark.parametrize("shape", [[0, 1 << 62, 1 << 62], [1 << 63, 0], [1 << 40, 1 << 40]])
    def test_shape_that_torch_cannot_count(self, shape):
        refuse_entry(entry(shape=shape, offsets=[0, 0]), "too large for a tensor", b"")

    def test_too_many_dimensions(self):
        parse(raw_file({"a": entry(shape=[1] * 64, offsets=[0, 1])}, b"1"))
        refuse_entry(entry(shape=[1] * 65, offsets=[0, 1]), "has 65 dimensions; torch takes 64")

    @pytest.mark.skipif("F4" not in TORCH_DTYPES, reason="this torch has no 4-bit floats")
    def test_four_bit_numbers(self):
        header = parse(raw_file({"a": entry("F4", [3, 2], [0, 3])}, b"123"))
        assert header.entries["a"].info.dtype == torch.float4_e2m1fn_x2
        assert header.entries["a"].info.shape == (3, 1)
        refuse_entry(entry("F4", [2, 3], [0, 3]), r"shape \[2, 3\] is not possible with dtype F4")
        refuse_entry(entry("F4", [], [0, 3]), r"shape \[\] is not possible with dtype F4")


class TestCoverage:
    def test_empty_weights_at_borders(self):
        header = parse(
            raw_file(
                {
                    "end": entry(shape=[0], offsets=[4, 4]),
                    "full": entry(),
                    "start": entry(shape=[0], offsets=[0, 0]),
                },
                b"1234",
            )
        )
        assert list(header.entries) == ["start", "full", "end"]

    def test_empty_weight_inside_another(self):
        raw = raw_file({"a": entry(), "empty": entry(shape=[0], offsets=[2, 2])}, b"1234")
        refuse(raw, "weight 'empty' .* overlaps the one before it")

    def test_overlap(self):
        raw = raw_file({"a": entry(), "b": entry(offsets=[3, 7])}, b"1234567")
        refuse(raw, r"weight 'b' .* overlaps the one before it: it starts at byte \d+; expected")

    def test_same_bytes_twice(self):
        raw = raw_file({"a": entry(), "b": entry()}, b"1234")
        refuse(raw, "weight 'b' .* overlaps the one before it")

    def test_hole(self):
        raw = raw_file({"a": entry(), "b": entry(offsets=[5, 9])}, b"123456789")
        refuse(raw, "weight 'b' .* leaves a hole before it")

    def test_hole_at_the_start(self):
        raw = raw_file({"a": entry(offsets=[1, 5])}, b"12345")
        refuse(raw, "weight 'a' .* leaves a hole before it")

    def test_bytes_after_the_last_weight(self):
        raw = raw_file({"a": entry()}, b"123456")
        refuse(raw, "2 bytes belong to no weight")

    def test_bytes_without_weights(self):
        refuse(raw_file({}, b"1"), "1 bytes belong to no weight")


class TestBuild:
    def test_data_is_aligned(self):
        for count in (0, 1, 50, 1000):
            weights = [(f"weight.{i}", torch.float32, (i,)) for i in range(count)]
            raw = build_header(weights, {"format": "pt"})
            assert len(raw) % 4096 == 0
            assert raw[8:9] == b"{"

    def test_offsets_follow_the_given_order(self):
        raw = build_header([("b", torch.float32, (2,)), ("a", torch.bool, (3,))])
        fields = json.loads(raw[8:])
        assert fields == {
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "a": {"dtype": "BOOL", "shape": [3], "data_offsets": [8, 11]},
        }

    @pytest.mark.parametrize("dtype", [torch.complex128, torch.complex32, torch.qint8])
    def test_dtype_without_a_name(self, dtype):
        with pytest.raises(StoreFormatError, match=rf"weight 'w' has dtype {dtype}.*cannot hold"):
            build_header([("good", torch.float32, (1,)), ("w", dtype, (1,))])

    @pytest.mark.parametrize("names", [["a", "a"], ["__metadata__"]])
    def test_name_that_cannot_be_used(self, names):
        with pytest.raises(StoreFormatError, match=rf"weight name '{names[-1]}' is reserved or"):
            build_header([(name, torch.float32, (1,)) for name in names])

    def test_name_that_is_no_text(self):
        with pytest.raises(StoreFormatError, match="not valid text"):
            build_header([("\ud800", torch.float32, (1,))])

    def test_too_long(self):
        with pytest.raises(StoreFormatError, match="safetensors allows 100000000"):
            build_header([], {"text": "a" * MAX_HEADER_BYTES})


def test_every_dtype_has_one_name():
    assert len(TORCH_DTYPES) == len(STORED_DTYPES)
    assert {"F8_E4M3", "F8_E5M2", "BF16", "U16", "U32", "U64", "C64", "BOOL"} <= set(TORCH_DTYPES)


shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
weights = st.lists(
    st.tuples(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__"),
        st.sampled_from(sorted(STORED_DTYPES, key=str)),
        shapes,
    ).filter(lambda weight: STORED_DTYPES[weight[1]] != "F4" or weight[2] != ()),
    unique_by=lambda weight: weight[0],
    max_size=8,
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@settings(deadline=None)
@given(weights, st.dictionaries(texts, texts, max_size=3))
def test_round_trip(weights, metadata):
    raw = build_header(weights, metadata)
    data_start = len(raw)
    header = parse(raw + bytes(sum(nbytes_of(dtype, shape) for _, dtype, shape in weights)))
    assert header.metadata == metadata
    assert header.data_start == data_start
    position = data_start
    for name, dtype, shape in weights:
        entry = header.entries[name]
        assert (entry.info.dtype, entry.info.shape) == (dtype, shape)
        assert entry.extent == Extent(position, position + nbytes_of(dtype, shape))
        position = entry.extent.stop
