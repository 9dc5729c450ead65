from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pylomin.io.buffers import PAGE_BYTES
from pylomin.io.files import Extent
from pylomin.io.runs import _MAX_GAP_BYTES, coalesce

EXTENTS = st.lists(
    st.builds(
        lambda start, nbytes: Extent(start, start + nbytes),
        st.integers(0, 4).map(lambda n: n * _MAX_GAP_BYTES) | st.integers(0, 10 * _MAX_GAP_BYTES),
        st.sampled_from([0, 1, 100, _MAX_GAP_BYTES, 3 * _MAX_GAP_BYTES]),
    ),
    max_size=12,
)


@given(EXTENTS)
def test_every_extent_is_in_one_run(extents: list[Extent]) -> None:
    runs = list(coalesce(extents))
    assert sorted(i for run in runs for i in run.members) == list(range(len(extents)))
    for run in runs:
        assert run.extents == tuple(extents[i] for i in run.members)
        for before, after in zip(run.extents, run.extents[1:], strict=False):
            assert 0 <= after.start - before.stop <= _MAX_GAP_BYTES
    assert [run.start for run in runs] == sorted(run.start for run in runs)
    for before, after in zip(runs, runs[1:], strict=False):
        assert not 0 <= after.start - before.stop <= _MAX_GAP_BYTES


@given(EXTENTS)
def test_gaps_that_take_memory_are_small(extents: list[Extent]) -> None:
    runs = list(coalesce(extents, gaps_take_memory=True))
    assert sorted(i for run in runs for i in run.members) == list(range(len(extents)))
    for run in runs:
        for i, (before, after) in enumerate(zip(run.extents, run.extents[1:], strict=False)):
            so_far = run.extents[i].stop - run.start
            assert 0 <= after.start - before.stop <= min(_MAX_GAP_BYTES, max(PAGE_BYTES, so_far // 8))


@given(EXTENTS)
def test_scatter_covers_the_run(extents: list[Extent]) -> None:
    for run in coalesce(extents):
        destinations = [memoryview(bytearray(extent.nbytes)) for extent in run.extents]
        buffers = run.scatter(destinations)
        assert sum(map(len, buffers)) == run.nbytes
        assert [b for b in buffers if any(b is d for d in destinations)] == destinations


def test_gaps() -> None:
    near = [Extent(0, 10), Extent(10 + _MAX_GAP_BYTES, 20 + _MAX_GAP_BYTES)]
    far = [Extent(0, 10), Extent(11 + _MAX_GAP_BYTES, 20 + _MAX_GAP_BYTES)]
    assert [run.nbytes for run in coalesce(near)] == [20 + _MAX_GAP_BYTES]
    assert [run.nbytes for run in coalesce(far)] == [10, 9]
    assert list(coalesce([])) == []
