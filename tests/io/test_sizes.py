from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pylomin.io.sizes import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (1, 1),
        (1 << 50, 1 << 50),
        ("1", 1),
        ("512", 512),
        ("512B", 512),
        ("1kB", 1000),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("512MiB", 512 << 20),
        ("512mib", 512 << 20),
        (" 512 MiB ", 512 << 20),
        ("2GB", 2 * 10**9),
        ("1.5GiB", 3 << 29),
        ("0.5kb", 500),
        ("1TiB", 1 << 40),
        ("1TB", 10**12),
    ],
)
def test_parse_bytes(text: int | str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "MiB", "12 apples", "1e9", "-5", "-5MiB", "1,5GB", "1.GB", ".5GB", "0x10", "5 5", "1MiBs", "inf", "nan"],
)
def test_text_that_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"memory_budget is .*512MiB") as error:
        parse_bytes(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("size", [0, -1, "0", "0MiB", "0.0001B"])
def test_sizes_that_are_not_positive(size: int | str) -> None:
    with pytest.raises(ValueError, match="expected a positive number of bytes"):
        parse_bytes(size)


@pytest.mark.parametrize("size", [1.5, True, None, b"5", [5]])
def test_types_that_are_no_size(size: object) -> None:
    with pytest.raises(TypeError, match=r"window is .*expected bytes as int"):
        parse_bytes(size, what="window")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("nbytes", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1 << 20, "1.0 MiB"),
        (489684992, "467.0 MiB"),
        (1 << 30, "1.0 GiB"),
        (3 << 40, "3.0 TiB"),
        (5000 << 40, "5000.0 TiB"),
    ],
)
def test_format_bytes(nbytes: int, expected: str) -> None:
    assert format_bytes(nbytes) == expected


@given(st.integers(1, 1 << 60))
def test_a_plain_number_is_itself(nbytes: int) -> None:
    assert parse_bytes(nbytes) == nbytes
    if nbytes < 1 << 53:
        assert parse_bytes(str(nbytes)) == nbytes
    assert parse_bytes(f"{nbytes % 1000 + 1}MiB") == (nbytes % 1000 + 1) << 20


@given(st.integers(1, 1 << 55))
def test_formatted_sizes_parse_to_nearly_the_same(nbytes: int) -> None:
    assert abs(parse_bytes(format_bytes(nbytes)) - nbytes) <= 0.06 * nbytes


@given(st.integers(1 << 53, 1 << 70))
def test_large_numbers_in_text_are_exact(nbytes: int) -> None:
    assert parse_bytes(str(nbytes)) == nbytes
