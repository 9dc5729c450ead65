"""How much of a large weight is in memory at one time. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from pylomin.io.buffers import ALIGNMENT_BYTES, PAGE_BYTES, SMALL_BYTES, block_bytes
from pylomin.residency.weight import Layout, Weight

# What a weight is decoded into takes room from what stays, so it should be a small share of the budget; else it is used
# by tiles. Its packed bytes are loaded whole all the same where they are a small share.
PACKED_TIMES = 8
TILE_BYTES = 4 << 20  # 4 MiB; one read of it takes much longer than starting it, and it is small beside what it feeds
LARGE_TILE_BYTES = 16 << 20  # 16 MiB; where all processors compute, a read takes long to start
LARGE_TIMES = 6  # a tile is larger than ``TILE_BYTES`` where it fits so often into the budget: three take half of it


def tile_rows(weight: Weight, memory_budget: int | None) -> int | None:
    """Rows of ``weight`` (lines of its memory) that are used at one time; None where it is loaded whole.

    A row's bytes in memory, with its conversions, are ``weight.element_bytes`` times the numel of ``lines_of``.
    """
    if not weight.tileable:
        return None
    times = times_to_fit(weight)
    if weight.tile_rows is None and fits(weight.layout.numel * weight.element_bytes, memory_budget, times):
        return None  # most weights in most forwards
    if not weight.keeps_order or not weight.nbytes:
        return None
    count, numel = lines_of(weight.layout)
    return lines_per_tile(count, numel * weight.element_bytes, weight.tile_rows, memory_budget, times=times)


def runs_of_tiles(weight: Weight, memory_budget: int | None) -> list[tuple[int, int]]:
    """The runs of elements, each (first, last exclusive), that a tiled weight is used by."""
    count, numel = lines_of(weight.layout)
    lines = tile_rows(weight, memory_budget)
    return [(first * numel, last * numel) for first, last in tiles_of(count, lines, weight.tile_rows)]


def tiles_of(count: int, lines: int | None, wanted: int | None) -> Iterator[tuple[int, int]]:
    """First line and last (exclusive) of each tile, of at most ``lines`` of ``count``; None: all are one tile.

    Where nobody ``wanted`` so many, they are even: the last could be a few lines, which take as long to ask for.
    """
    if lines is None:
        lines = count
    elif wanted is None:
        lines = -(-count // -(-count // lines))
    return ((first, min(first + lines, count)) for first in range(0, count, lines))


def bytes_per_tile(weight: Weight, memory_budget: int | None) -> int:
    """What one tile of a tiled weight takes in the ledger."""
    lines = tile_rows(weight, memory_budget) or 0
    return block_bytes(lines * lines_of(weight.layout)[1] * weight.element_bytes)


def lines_per_tile(
    count: int, line_bytes: int, wanted: int | None, memory_budget: int | None, *, times: int = 2
) -> int | None:
    """Of ``count`` lines that lie one after the other in memory, how many to load at one time; None for all.

    Args:
        wanted: as many as the user asked for.
        memory_budget: what does not fit ``times`` is tiled, so that there is room for it and for what comes next. One
            tile takes at most a quarter: there is one in use and one on its way, beside what is held; a second is read
            ahead where there is room.
    """
    if wanted is None or wanted >= count:
        if fits(count * line_bytes, memory_budget, times):
            return None
        wanted = _tile_bytes(memory_budget, times) // max(1, line_bytes)
    if memory_budget is not None:
        quarter = memory_budget // 4
        quarter -= PAGE_BYTES if quarter >= SMALL_BYTES else ALIGNMENT_BYTES  # which its memory is rounded up to
        wanted = min(wanted, quarter // max(1, line_bytes))
    lines = max(1, wanted)
    return lines if lines < count else None


def _tile_bytes(memory_budget: int | None, times: int) -> int:
    if memory_budget is None or times == PACKED_TIMES:
        return TILE_BYTES
    return min(max(TILE_BYTES, memory_budget // LARGE_TIMES), LARGE_TILE_BYTES)


def times_to_fit(weight: Weight) -> int:
    """How often a weight has to fit into the budget to be loaded whole."""
    return PACKED_TIMES if weight.source.packing is not None or weight.is_part else 2


def fits(nbytes: int, memory_budget: int | None, times: int) -> bool:
    return memory_budget is None or times * nbytes <= memory_budget


def lines_of(layout: Layout) -> tuple[int, int]:
    """How many lines a dense layout has, and the elements of one: rows, where it is row-major."""
    sizes = [(step, size) for step, size in zip(layout.stride, layout.shape, strict=True) if size > 1]
    count = max(sizes)[1] if sizes else 1
    return count, layout.numel // count
