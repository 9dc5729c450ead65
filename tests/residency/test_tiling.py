"""How large tiles are, and what budgets they fit in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pylomin.lazy.offload import Footprint, smallest_budget, use_bytes
from pylomin.residency.residency import Residency
from pylomin.residency.tiling import (
    LARGE_TILE_BYTES,
    LARGE_TIMES,
    PACKED_TIMES,
    TILE_BYTES,
    lines_of,
    lines_per_tile,
    tile_rows,
)
from pylomin.residency.weight import Layout, Weight

from .common import CPU, CountingStore, layout, weight_of

MIB = 1 << 20


def weight_like(*shape: int) -> Weight:
    weight = weight_of(CountingStore({"w": torch.zeros(shape)}), "w", Residency())
    weight.tileable = True
    return weight


def test_without_budget_only_what_was_asked_for() -> None:
    weight = weight_like(100, 8)
    assert tile_rows(weight, None) is None
    weight.tile_rows = 30
    assert tile_rows(weight, None) == 30
    weight.tile_rows = 100
    assert tile_rows(weight, None) is None


def test_what_fits_twice_is_whole() -> None:
    weight = weight_like(100, 8)
    assert tile_rows(weight, 2 * weight.nbytes) is None
    rows = tile_rows(weight, 2 * weight.nbytes - 2)
    assert rows is not None
    assert rows * 32 <= weight.nbytes // 2


def test_budget_makes_chosen_tiles_smaller() -> None:
    weight = weight_like(1000, 8)
    weight.tile_rows = 900
    assert tile_rows(weight, 2 * weight.nbytes) is not None
    assert tile_rows(weight, 2 * weight.nbytes) < 500  # type: ignore[operator]


def test_tiles_are_not_larger_than_they_need_to_be() -> None:
    assert lines_per_tile(1 << 15, 4096, None, 20 << 20) == TILE_BYTES // 4096
    assert lines_per_tile(1 << 16, 4096, None, 64 << 20) == (64 << 20) // LARGE_TIMES // 4096
    assert lines_per_tile(1 << 20, 4096, None, 64 << 20) == (64 << 20) // LARGE_TIMES // 4096  # however large it is
    assert lines_per_tile(1 << 20, 4096, None, 128 << 20) == LARGE_TILE_BYTES // 4096
    assert lines_per_tile(1 << 20, 4096, None, 1 << 30) == LARGE_TILE_BYTES // 4096
    assert lines_per_tile(1 << 20, 4096, None, 1 << 30, times=PACKED_TIMES) == TILE_BYTES // 4096


def test_weights_that_are_held_are_not_tiled() -> None:
    weight = weight_like(100, 8)
    weight.tile_rows = 3
    weight.tileable = False
    assert tile_rows(weight, 10) is None


def test_conversions_count() -> None:
    store = CountingStore({"w": torch.zeros(100, 8)})
    weight = weight_of(store, "w", Residency(), layout(torch.float64, 100, 8))
    weight.tileable = True
    assert weight.element_bytes == 12
    assert tile_rows(weight, 9600 * 2) is None
    assert tile_rows(weight, 9600 * 2 - 2) == (4799 - 64) // 96


@pytest.mark.parametrize(
    ("shape", "stride", "expected"),
    [((6, 4), (4, 1), (6, 4)), ((6, 4), (1, 6), (4, 6)), ((1, 4), (4, 1), (4, 1)), ((4, 1), (1, 1), (4, 1))],
)
def test_lines(shape: tuple[int, ...], stride: tuple[int, ...], expected: tuple[int, int]) -> None:
    assert lines_of(Layout(torch.float32, shape, stride, CPU)) == expected


@given(
    held=st.integers(0, 1 << 18),
    line_bytes=st.integers(1, 1 << 18),
    converted=st.integers(0, 1 << 12),
    lines=st.integers(1, 5000),
    wanted=st.none() | st.integers(1, 5000),
    beyond=st.integers(0, 1 << 25),
)
def test_smallest_budget_and_every_greater_one_hold_a_use(
    held: int, line_bytes: int, converted: int, lines: int, wanted: int | None, beyond: int
) -> None:
    group = [Footprint("weight", line_bytes, converted, lines, wanted), Footprint("bias", held, 0)]
    for budget in (smallest_budget(group), smallest_budget(group) + beyond):
        assert use_bytes(group, budget) <= budget
