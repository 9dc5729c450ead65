"""Rooms that show pages of files, and are kept between uses of what they hold."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pylomin.io.buffers import BufferPool
from pylomin.residency.loading import Room
from pylomin.residency.places import Places


def _references(objects: Sequence[object]) -> list[int]:
    return [sys.getrefcount(kept) for kept in objects]


UNVIEWED = _references([object()])[0]  # of what only one list has


class MappedRoom(Room):
    """Pages of files that show the weights of one group, to be used again and again.

    To map and unmap files takes longer than to fault pages in again. Between uses the room is *idle*: its pages are
    dropped, the ledger does not count it, and its places keep it. Tensors are made anew for each use: what torch
    allocates for them would lie between the hidden states of the first pass for good, and hinder malloc from giving
    the memory of those back.

    Args:
        room: what was loaded, by nothing but mapping it.
    """

    __slots__ = ()
    again = True

    def __init__(self, room: Room) -> None:
        super().__init__(room.places)
        self._buffers, room.mapped = [*room.mapped], ()

    def try_set_idle(self, pool: BufferPool) -> bool:
        """False where somebody still views the pages; then they go with the last view."""
        places = self.places
        if places.idle_room is not None or any(count > UNVIEWED for count in _references(self._buffers)):
            return False
        for part, pages in zip(places.from_files, self._buffers, strict=True):
            part.placement.drop(pages)
            pool.set_idle(pages)
        del self.places  # which has this room now, and would never go with it
        places.idle_room = self
        return True

    def try_use_again(self, pool: BufferPool, places: Places) -> MappedRoom | None:
        """Itself, counted again and ready to be loaded; None where the budget leaves no room."""
        places.idle_room = None  # from here on it goes with its user, also where that is interrupted
        for i, pages in enumerate(self._buffers):
            if not pool.try_use_again(pages):
                for others in self._buffers[:i]:
                    pool.set_idle(others)
                places.idle_room = self
                return None
        self.places = places
        return self

    def _clear(self) -> None:
        """It keeps its pages."""
