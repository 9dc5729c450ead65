"""What is free of one stretch of memory."""

from __future__ import annotations

import mmap

from hypothesis import given, settings
from hypothesis import strategies as st

from pylomin.io.arena import Arena


def arena(pages: int) -> Arena:
    return Arena(mmap.mmap(-1, pages), pages)


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 60), st.lists(st.tuples(st.integers(1, 40), st.integers(0, 5)), max_size=60))
def test_blocks_never_overlap_and_all_comes_back(size: int, steps: list[tuple[int, int]]) -> None:
    """Each step takes a block, and gives one of those that are out back if its second number finds one."""
    memory = arena(size)
    out: list[tuple[int, int]] = []
    for nbytes, chosen in steps:
        free = memory.free_bytes
        offset = memory.take(nbytes)
        if offset is None:
            assert memory.free_bytes == free
        else:
            assert 0 <= offset <= offset + nbytes <= size
            assert all(offset + nbytes <= start or start + length <= offset for start, length in out)
            assert memory.free_bytes == free - nbytes
            out.append((offset, nbytes))
        if chosen < len(out):
            memory.give(*out.pop(chosen))
    for block in out:
        memory.give(*block)
    assert memory.take(size) == 0, "neighbours became one"


def test_a_large_block_after_small_ones_leaves_room_for_another() -> None:
    """As in a transformer: projections, then two large layers; each is read while the one before it computes."""
    memory = arena(36)
    small = [offset for _ in range(4) if (offset := memory.take(4)) is not None]
    for offset in small[:3]:
        memory.give(offset, 4)
    assert memory.take(16) is not None
    memory.give(small[3], 4)
    assert memory.take(16) is not None, "what was small has left, and the large one does not lie in the middle"
