"""Which elements of a weight are wanted, and where their bytes are in it. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Interval = tuple[int, int]
"""Indices ``[first, last)`` along one dimension."""


@dataclass(frozen=True, slots=True)
class Selection:
    """The elements of a weight whose index along each dimension is in one of the intervals of that dimension.

    They make a tensor of :attr:`selected_shape`: along each dimension the intervals one after the other.
    """

    shape: tuple[int, ...]  # of the weight
    intervals: tuple[tuple[Interval, ...], ...]  # for each dimension

    @property
    def selected_shape(self) -> tuple[int, ...]:
        return tuple(sum(last - first for first, last in kept) for kept in self.intervals)

    @property
    def is_whole(self) -> bool:
        return self._cut_dim is None

    @property
    def is_run(self) -> bool:
        """The selected elements follow each other in the weight; so they do where there are none."""
        if 0 in self.selected_shape:
            return True
        # Up to some dimension one index is selected, along that one an interval, and everything along the rest.
        dims = [dim for dim in range(len(self.shape)) if self.shape[dim] != 1]
        single = list(itertools.takewhile(lambda dim: self.selected_shape[dim] == 1, dims))
        rest = dims[len(single) :]
        return all(len(self.intervals[dim]) == 1 for dim in rest[:1]) and all(map(self._is_whole_along, rest[1:]))

    def runs(self, itemsize: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Where in the weight bytes ``[start, stop)`` of the selected elements are, both in row-major order.

        Yields (first byte, last exclusive) in the order of the selected elements; what touches is one run.
        """
        if start >= stop:
            return
        begin, end = -1, -1
        for first, last in self._pieces(itemsize, start, stop):
            if first == end:
                end = last
                continue
            if end > begin:
                yield begin, end
            begin, end = first, last
        yield begin, end

    def _pieces(self, itemsize: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
        cut = self._cut_dim
        if cut is None:
            yield start, stop
            return
        unit = itemsize * math.prod(self.shape[cut + 1 :])  # bytes of one index along the last dimension that is cut
        kept = [(first * unit, last * unit) for first, last in self.intervals[cut]]
        block_bytes = sum(last - first for first, last in kept)
        first_block, last_block = start // block_bytes, -(-stop // block_bytes)
        position = first_block * block_bytes  # in what is selected
        for at in self._blocks(cut, unit * self.shape[cut], first_block, last_block):
            for first, last in kept:
                length = last - first
                low, high = max(start - position, 0), min(stop - position, length)
                if low < high:
                    yield at + first + low, at + first + high
                position += length

    def _blocks(self, cut: int, block_bytes: int, first: int, last: int) -> Iterator[int]:
        """Where in the weight the blocks ``[first, last)`` begin: all that has the same indices before ``cut``."""
        sizes = self.selected_shape[:cut]
        for number in range(first, last):
            at, step = 0, block_bytes
            for dim in range(cut - 1, -1, -1):
                number, index = divmod(number, sizes[dim])
                at += step * _index(self.intervals[dim], index)
                step *= self.shape[dim]
            yield at

    @property
    def _cut_dim(self) -> int | None:
        """The last dimension along which not everything is selected, in order."""
        return next((dim for dim in range(len(self.shape) - 1, -1, -1) if not self._is_whole_along(dim)), None)

    def _is_whole_along(self, dim: int) -> bool:
        return self.intervals[dim] == ((0, self.shape[dim]),)


def intervals_of(indices: Sequence[int]) -> tuple[Interval, ...]:
    """Runs of consecutive numbers, in the order given."""
    found: list[Interval] = []
    for index in indices:
        if found and found[-1][1] == index:
            found[-1] = (found[-1][0], index + 1)
        else:
            found.append((index, index + 1))
    return tuple(found)


def _index(intervals: Sequence[Interval], number: int) -> int:
    """The index at a position in what the intervals select."""
    for first, last in intervals:
        if number < last - first:
            return first + number
        number -= last - first
    raise IndexError(number)
