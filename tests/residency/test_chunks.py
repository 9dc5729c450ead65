from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import given
from hypothesis import strategies as st

from pylomin.io.buffers import PAGE_BYTES
from pylomin.io.direct import direct_bytes
from pylomin.residency.chunks import Copy, Wanted, file_chunks, store_chunks

ITEMSIZES = st.sampled_from([1, 2, 4, 8])


@st.composite
def extents(draw: st.DrawFn) -> list[Wanted]:
    """Of one file, which do not overlap; of any alignment and order."""
    found = []
    position, target = draw(st.integers(0, 3 * PAGE_BYTES)), 0
    for piece in range(draw(st.integers(1, 8))):
        itemsize = draw(ITEMSIZES)
        nbytes = itemsize * draw(st.integers(1, 3_000))
        found.append(Wanted(piece, position, nbytes, target, itemsize))
        position += nbytes + draw(st.sampled_from([0, 0, 0, 1, 100, 5000, 1 << 17]))
        target += nbytes
    return draw(st.permutations(found))


def placed(wanted: list[Wanted], copies: list[tuple[int, Copy]]) -> None:
    """Each byte comes to its place, once. ``copies`` with where their source begins."""
    size = max(one.target + one.nbytes for one in wanted)
    expected, lies = torch.full((size,), -1), torch.full((size,), -1)
    for one in wanted:
        expected[one.target : one.target + one.nbytes] = torch.arange(one.first, one.first + one.nbytes)
    for start, copy in copies:
        place = lies[copy.target : copy.target + copy.nbytes]
        assert bool((place == -1).all()), "copied twice"
        place.copy_(torch.arange(start + copy.source, start + copy.source + copy.nbytes))
    assert torch.equal(lies, expected)


@given(extents(), st.integers(2, 12))
def test_every_byte_of_a_file_comes_to_its_place_once(wanted: list[Wanted], pages: int) -> None:
    most_bytes = pages * PAGE_BYTES
    chunks = list(file_chunks(wanted, most_bytes))
    placed(wanted, [(chunk.start, copy) for chunk in chunks for copy in chunk.copies])
    by_piece = {one.piece: one for one in wanted}
    for chunk in chunks:
        assert 0 < direct_bytes(chunk.start, chunk.nbytes) <= most_bytes
        for copy in chunk.copies:
            assert copy.source >= 0
            assert copy.source + copy.nbytes <= chunk.nbytes
            assert copy.nbytes % by_piece[copy.piece].itemsize == 0, "an element is cut"
            assert (copy.target - by_piece[copy.piece].target) % by_piece[copy.piece].itemsize == 0


@given(extents(), st.integers(1, 12))
def test_every_byte_of_a_store_comes_to_its_place_once(wanted: list[Wanted], pages: int) -> None:
    most_bytes = pages * PAGE_BYTES
    for chunk in store_chunks(wanted, most_bytes, 64):
        assert all(read.nbytes > 0 for read in chunk.reads)
        ends = [read.source + read.nbytes for read in chunk.reads]
        assert ends[-1] <= most_bytes
        assert all(end <= read.source for end, read in zip(ends, chunk.reads[1:], strict=False))
        # What is copied is what was read there.
        for copy in chunk.copies:
            read_bytes = sum(
                read.nbytes
                for read in chunk.reads
                if read.piece == copy.piece and copy.source <= read.source < copy.source + copy.nbytes
            )
            assert read_bytes == copy.nbytes
    placed(wanted, [*_as_copies(wanted, most_bytes)])


def _as_copies(wanted: list[Wanted], most_bytes: int) -> Iterator[tuple[int, Copy]]:
    """Each read of a chunk with the place that its bytes are copied to."""
    for chunk in store_chunks(wanted, most_bytes, 64):
        for read in chunk.reads:
            (copy,) = [one for one in chunk.copies if one.source <= read.source < one.source + one.nbytes]
            target = copy.target + read.source - copy.source
            yield read.offset_bytes - read.source, Copy(read.piece, read.source, target, read.nbytes)


def test_neighbouring_rows_are_one_copy() -> None:
    rows = [Wanted(0, row * 1000, 100, i * 100) for i, row in enumerate((3, 9, 12, 40))]
    (chunk,) = store_chunks(rows, PAGE_BYTES, 64)
    assert len(chunk.reads) == 4
    assert chunk.copies == (Copy(0, 0, 0, 400),)


def test_adjacent_weights_are_one_read() -> None:
    weights = [Wanted(i, 4096 + i * 100, 100, i * 512) for i in range(20)]
    (chunk,) = file_chunks(weights, 2 * PAGE_BYTES)
    assert (chunk.start, chunk.nbytes, len(chunk.copies)) == (4096, 2000, 20)
