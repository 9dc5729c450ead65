"""When uses begin to repeat, and what one repetition is."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import chain
from typing import Generic, TypeVar

CONFIRMED = 4  # uses of a repetition that show that it is one
UNSETTLED = 3  # uses for each distinct key, after which what was seen is taken for the cycle
FORGOTTEN = 32  # uses for each key of the plan's cycle, after which what was seen since is forgotten
OUTWEIGHED = 4  # times the length of the plan's cycle that a cycle over fewer keys must have lasted

K = TypeVar("K", bound=Hashable)


class Cycle(Generic[K]):
    """Fed with uses as they happen, finds the order that repeats.

    Where nothing is planned for the keys that are seen, speed counts: the first repetition is believed when it has
    gone on for a few uses; and where there is none soon (a loop over tokens after an encoder), the uses so far are
    taken, with their counts. Where the plan has all of them, only what has repeated in full and for as long as
    the plan's cycle replaces it; and what uses only some of them (the inner loop of a pass, a loop over tokens) must
    have lasted several times as long.

    Repetitions are found by the borders of the window (Knuth, Morris and Pratt 1977): constant time for each use,
    on average. The window is bounded by the number of distinct keys.

    Args:
        planned: the order that is planned for now, if any.

    >>> cycle = Cycle()
    >>> [cycle.record(key) for key in "abcabc"]
    [None, None, None, None, None, ('a', 'b', 'c')]
    """

    def __init__(self, planned: Sequence[K] = ()) -> None:
        self._covered = False  # all keys of the window are planned for
        self._plan(tuple(planned))

    def record(self, key: K) -> tuple[K, ...] | None:
        """``key`` is used now.

        Returns:
            One cycle, when it has become known and is to be planned for; the one that is planned for, as it was given,
            where that has come back, from whatever place in it on.
        """
        if self._covered and key not in self._planned_keys:
            self._forget()  # so that the inner loop it comes after does not count as uses without a repetition
            self._covered = False
        window = self._window
        border = _append(key, window, self._borders)
        self._distinct.add(key)
        period = len(window) - border
        if (border >= CONFIRMED or border == period) and border >= self._needed(period):
            return self._complete(window[:period])
        if self._covered:
            if len(window) >= self._longest:
                self._forget()
        elif len(window) > UNSETTLED * len(self._distinct):
            return self._complete(window)
        return None

    def _needed(self, period: int) -> int:
        """The uses that must have repeated."""
        if not self._covered:
            return min(period, CONFIRMED)
        # What repeats within the plan's cycle is not taken for a cycle.
        times = 1 if len(self._distinct) == len(self._planned_keys) else OUTWEIGHED
        return max(period, min(times * len(self._planned), self._longest // 2))

    def _complete(self, order: list[K]) -> tuple[K, ...]:
        cycle = self._planned if _is_rotation(order, self._planned) else tuple(order)
        self._plan(cycle)
        return cycle

    def _plan(self, planned: tuple[K, ...]) -> None:
        self._planned = planned
        self._planned_keys = frozenset(planned)
        self._longest = FORGOTTEN * len(self._planned_keys)
        self._forget()

    def _forget(self) -> None:
        self._window: list[K] = []
        self._borders: list[int] = []
        self._distinct: set[K] = set()
        self._covered = bool(self._planned)


def _append(key: K, sequence: list[K], borders: list[int]) -> int:
    """Append; ``borders`` holds, for each prefix, the length of the longest shorter one that it also ends with."""
    border = borders[-1] if borders else 0
    while border and sequence[border] != key:
        border = borders[border - 1]
    if sequence and sequence[border] == key:
        border += 1
    sequence.append(key)
    borders.append(border)
    return border


def _is_rotation(order: list[K], other: tuple[K, ...]) -> bool:
    if len(order) != len(other):
        return False
    sequence: list[object] = []
    borders: list[int] = []
    return any(_append(key, sequence, borders) == len(order) for key in chain(order, [object()], other, other))
