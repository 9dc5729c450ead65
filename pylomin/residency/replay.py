"""A known order of uses, replayed: where each thread (lane) is in it, and which groups have to be read next."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence

from pylomin.residency.lane import Lanes
from pylomin.residency.trace import Key


class Replay:
    """The uses of one cycle in order; the last is followed by the first.

    Following costs a comparison per use, where predicting from a trace costs some look-ups per step looked ahead.

    Args:
        order: the groups that are used, one after the other; not empty.
        resident: those that stay in memory, so that nothing of them has to be read.
    """

    def __init__(self, order: Sequence[Key], resident: Collection[Key], lanes: Lanes | None = None) -> None:
        self.order = tuple(order)
        self.latest = -1  # the place of the thread that used something last
        self._places: dict[Key, list[int]] = {}
        for place, key in enumerate(self.order):
            self._places.setdefault(key, []).append(place)
        self._streamed = [place for place, key in enumerate(self.order) if key not in resident]
        self._lanes = lanes or Lanes()

    @property
    def streams(self) -> bool:
        """Whether there is something to read at all."""
        return bool(self._streamed)

    def follow(self, key: Key) -> bool:
        """``key`` is used now, by this thread. Whether that is what the order says; if so, go on to it."""
        lane = self._lanes.here
        if lane.place_in is not self:
            lane.place_in, lane.place = self, -1
        place = lane.place
        if place is None:
            return False
        place = place + 1 if place + 1 < len(self.order) else 0
        if self.order[place] != key:
            return False
        lane.place = self.latest = place
        return True

    def seek(self, key: Key) -> None:
        """``key`` is used now, not as the order says: go on from where it comes next, if it does."""
        lane, place = self._lanes.here, self._place()
        lane.place_in = self
        places = self._places.get(key)
        if places is None:
            lane.place = None
            return
        after = self.latest if place is None else place
        lane.place = self.latest = places[bisect_right(places, after) % len(places)]

    def last_two(self) -> tuple[Key, Key] | None:
        """The last uses of this thread, if it followed the order."""
        place = self._place()
        return None if place is None else (self.order[place - 1], self.order[place])

    def _place(self) -> int | None:
        """Of this lane; None where it has not begun, or left the order."""
        lane = self._lanes.here
        return None if lane.place_in is not self or lane.place == -1 else lane.place

    def last(self) -> Key:
        """The latest use."""
        return () if self.latest == -1 else self.order[self.latest]

    def streamed_ahead(self) -> Iterator[Key]:
        """What is not resident of the uses after the latest, nearest first, once round."""
        first = self.next_streamed()
        for i in range(len(self._streamed)):
            yield self.order[self._streamed[(first + i) % len(self._streamed)]]

    def next_streamed(self) -> int:
        """The number of the next use that is not of a resident, counted among such uses."""
        return bisect_right(self._streamed, self.latest) % max(1, len(self._streamed))
