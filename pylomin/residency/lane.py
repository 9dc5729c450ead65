"""Whose uses follow each other: those of one thread, or of a forward and the backward that belongs to it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pylomin.residency.cycle import Cycle
    from pylomin.residency.trace import Key


class Lane:
    """Where one sequence of uses stands."""

    __slots__ = ("cycle", "cycle_of", "last_two", "place", "place_in")

    def __init__(self) -> None:
        self.last_two: tuple[Key | None, Key | None] = (None, None)
        self.place: int | None = -1  # in the order that is replayed; None: it left that order
        self.place_in: Any = None  # the replay that the place is in
        self.cycle: Cycle[Key] | None = None
        self.cycle_of: Any = None  # the plan that it was observed beside


class Lanes(threading.local):
    """``here`` is the lane of this thread. Threads that autograd runs backward in take that of the forward."""

    def __init__(self) -> None:
        self.here = Lane()
