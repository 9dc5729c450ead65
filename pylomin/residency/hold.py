"""A hold keeps weights resident for the length of a ``with`` block."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pylomin.residency.weight import Weight

if TYPE_CHECKING:
    from pylomin.residency.residency import Residency


class Hold:
    """Made by :meth:`Residency.hold`.

    It lets go also when it is merely dropped, because a KeyboardInterrupt can arrive between taking the weights and
    entering the block.
    """

    __slots__ = ("claimed", "pinned", "residency", "thread_id", "weights")

    def __init__(self, residency: Residency, weights: Sequence[Weight]) -> None:
        self.pinned: list[Weight] = []
        self.claimed: list[Weight] = []  # being loaded by this hold
        self.residency = residency
        self.weights = weights
        self.thread_id = threading.get_ident()

    def __enter__(self) -> None:
        try:
            self.residency.acquire(self)
        except BaseException:
            self.residency.release(self)
            raise

    def __exit__(self, *exc_info: object) -> None:
        self.residency.release(self)

    def __del__(self) -> None:
        if getattr(self, "pinned", None):  # an interrupt may have come before it was made
            self.residency.release(self)
