from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pylomin.io.modes import choose_mode

GIB = 1 << 30
REFUSED = "the file system refuses O_DIRECT: Invalid argument (errno 22)"
AMPLE: dict[str, Any] = {
    "cached_fraction": 1.0,
    "streamed_bytes": GIB,
    "available_bytes": 8 * GIB,
    "limit_bytes": None,
    "direct_refused": None,
    "aligned": True,
}


@pytest.mark.parametrize(
    ("changed", "mode", "drop_cache", "why"),
    [
        ({}, "mapped", False, "is cached, and there is room"),
        ({"available_bytes": None}, "mapped", False, "is cached"),
        ({"cached_fraction": 0.9}, "mapped", False, "is cached"),
        ({"limit_bytes": 2 * GIB}, "mapped", False, "is cached"),
        ({"available_bytes": 100}, "mapped", False, "is cached"),  # what is cached needs no new memory
        ({"aligned": False}, "buffered", False, "not aligned"),
        ({"cached_fraction": 0.89}, "mapped", False, "only 89% of the file is cached, and there is room"),
        (
            {"cached_fraction": 0.0, "aligned": False},
            "buffered",
            False,
            "only 0% of the file is cached, and there is room",
        ),
        ({"limit_bytes": GIB - 1}, "direct", False, "memory is too small"),
        ({"limit_bytes": 2 * GIB, "other_bytes": GIB + 1}, "direct", False, "memory is too small"),
        ({"available_bytes": GIB, "other_bytes": GIB + 1}, "direct", False, "memory is too small"),
        ({"cached_fraction": 0.0, "available_bytes": GIB - 1}, "direct", False, "memory is too small"),
        ({"limit_bytes": GIB - 1, "direct_refused": REFUSED}, "buffered", True, "memory is too small .* refuses"),
        ({"cached_fraction": None}, "buffered", False, "does not say whether the file is cached"),
        ({"cached_fraction": None, "limit_bytes": GIB - 1}, "direct", False, "memory is too small"),
    ],
)
def test_automatic(changed: dict[str, Any], mode: str, drop_cache: bool, why: str) -> None:
    choice = choose_mode(None, **(AMPLE | changed))
    assert (choice.mode, choice.drop_cache) == (mode, drop_cache)
    assert re.search(why, choice.why)


@pytest.mark.parametrize("requested", ["mapped", "buffered", "direct"])
@pytest.mark.parametrize("cached", [0.0, 1.0, None])
def test_requested(requested: Any, cached: float | None) -> None:
    choice = choose_mode(requested, **(AMPLE | {"cached_fraction": cached}))
    assert (choice.mode, choice.why) == (requested, f"{requested} was asked for.")


def test_requested_and_refused() -> None:
    choice = choose_mode("direct", **(AMPLE | {"direct_refused": REFUSED}))
    assert (choice.mode, choice.drop_cache) == ("buffered", True)
    assert choice.why == f"direct was asked for, but {REFUSED}."


def test_buffered_in_tight_memory_drops() -> None:
    assert choose_mode("buffered", **(AMPLE | {"limit_bytes": 1})).drop_cache
    assert not choose_mode("buffered", **AMPLE).drop_cache


@given(
    st.sampled_from([None, "mapped", "buffered", "direct"]),
    st.none() | st.floats(0, 1),
    st.integers(0, 1 << 40),
    st.integers(0, 1 << 40),
    st.none() | st.integers(0, 1 << 40),
    st.none() | st.integers(0, 1 << 40),
    st.sampled_from([None, REFUSED]),
    st.booleans(),
)
def test_what_always_holds(requested: Any, cached: Any, streamed, other, available, limit, refused, aligned) -> None:
    choice = choose_mode(
        requested,
        cached_fraction=cached,
        streamed_bytes=streamed,
        other_bytes=other,
        available_bytes=available,
        limit_bytes=limit,
        direct_refused=refused,
        aligned=aligned,
    )
    assert choice.mode != "direct" or refused is None
    assert choice.mode == "buffered" or not choice.drop_cache
    assert choice.why.endswith(".")
    if requested is None and choice.mode == "mapped":
        assert aligned
        assert limit is None or streamed + other <= limit
