"""Rooms that show pages of files, and are kept between uses of what they hold."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from pylomin.errors import without_frames
from pylomin.io.buffers import BufferPool, Pages
from pylomin.residency.loading import Places, Room
from pylomin.store.extents import read_placed


class MappedRoom(Room):
    """Pages of files that show the weights of one group, and tensors on them, to be used again and again.

    To map and unmap files and to make tensors takes longer than to fault pages in again. Between uses the room is
    *idle*: its pages are dropped, the ledger does not count it, and its places keep it.

    Args:
        room: what was loaded.
        values: the tensors that came of it.
    """

    __slots__ = ("_pages", "_references", "_storages", "_values")

    def __init__(self, room: Room, values: list[torch.Tensor]) -> None:
        super().__init__(room.places)
        self._values = values
        self._pages: Sequence[Pages] = room.mapped
        self._storages = [tensor.untyped_storage() for tensor in values]
        self._references = self._count_references()

    def try_set_idle(self, pool: BufferPool) -> bool:
        """False where somebody still views the pages; then they go with the last view."""
        places = self.places
        if places.idle_room is not None or self._count_references() != self._references:
            return False
        for part, pages in zip(places.from_files, self._pages, strict=True):
            part.placement.drop(pages)
            pool.set_idle(pages)
        del self.places  # which has this room now, and would never go with it
        places.idle_room = self
        return True

    def try_use_again(self, pool: BufferPool, places: Places) -> MappedRoom | None:
        """Itself, counted again and ready to be loaded; None where the budget leaves no room."""
        places.idle_room = None  # from here on it goes with its user, also where that is interrupted
        for i, pages in enumerate(self._pages):
            if not pool.try_use_again(pages):
                for others in self._pages[:i]:
                    pool.set_idle(others)
                places.idle_room = self
                return None
        self.places = places
        return self

    def load(self, *, urgent: bool = False) -> list[torch.Tensor]:
        """Fault the pages in; the same tensors each time."""
        try:
            for part, pages in zip(self.places.from_files, self._pages, strict=True):
                read_placed(part.file, part.placement, part.names, pages, again=True)
        except BaseException as error:
            raise without_frames(error)  # noqa: B904
        return [*self._values]

    def _count_references(self) -> list[tuple[int, int, int]]:
        """To each storage: of tensors, of Python objects; and its address, which changes when a process is to share it.

        What is handed out is a parameter of its own for each use: while one of them, or a view of it, is there, the
        storage has a reference more.
        """
        return [
            (torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(storage), storage.data_ptr())
            for storage in self._storages
        ]
