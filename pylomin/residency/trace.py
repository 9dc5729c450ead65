"""The order in which groups are used, as it happens, and what it says comes next."""

from __future__ import annotations

from collections.abc import Iterator

from pylomin.residency.lane import Lanes

Key = tuple[int, ...]
"""A group: the indices of its weights."""


class Trace:
    """Predicts the next use from the last two.

    Two uses are context enough for what models do: loops over layers, the next token's forward after this one's,
    a module that is shared by two places. The order is kept per thread (lane), so that threads do not see each other's
    uses as a sequence; what was learnt is shared. A wrong prediction costs a read, never a wrong result.
    """

    def __init__(self, lanes: Lanes | None = None) -> None:
        self._after: dict[tuple[Key | None, Key], Key] = {}
        self._lanes = lanes or Lanes()

    def record(self, key: Key) -> None:
        """``key`` is used now, by this thread."""
        lane = self._lanes.here
        before, last = lane.last_two
        if last is not None:
            self._after[before, last] = key
            self._after[None, last] = key  # for contexts never seen
        lane.last_two = (last, key)

    def resume(self, before: Key, last: Key) -> None:
        """These were the last two uses of this thread, whatever was recorded of it."""
        self._lanes.here.last_two = (before, last)

    def upcoming(self, limit: int) -> Iterator[Key]:
        """The next uses of this thread, nearest first, as far as the order is known; at most ``limit``."""
        before, last = self._lanes.here.last_two
        for _ in range(limit):
            if last is None:
                return
            following = self._after.get((before, last)) or self._after.get((None, last))
            if following is None:
                return
            yield following
            before, last = last, following
