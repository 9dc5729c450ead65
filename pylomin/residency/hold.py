"""A hold keeps weights resident for the length of a ``with`` block."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pylomin.errors import BudgetError
from pylomin.residency.weight import Weight

if TYPE_CHECKING:
    from pylomin.residency.contents import Loaded
    from pylomin.residency.residency import Residency


class Hold:
    """Made by :meth:`Residency.hold`.

    It lets go also when it is merely dropped, because a KeyboardInterrupt can arrive between taking the weights and
    entering the block.
    """

    __slots__ = ("claimed", "counted", "group", "pinned", "residency", "thread_id", "unsettled", "weights")

    def __init__(self, residency: Residency, weights: Sequence[Weight], group: Sequence[Weight] | None) -> None:
        self.pinned: list[Weight] = []
        self.unsettled: list[Loaded] = []  # let go, and not decided yet whether it stays
        self.claimed: list[Weight] = []  # being loaded by this hold
        self.counted = False  # among the holds of its thread
        self.residency = residency
        self.weights = weights
        self.group = group  # if given, what is too large for now may be used by tiles instead
        self.thread_id = threading.get_ident()

    def __enter__(self) -> None:
        try:
            self.residency.acquire(self)
        except BudgetError:
            self.residency.release(self)
            if not self.residency.use_by_tiles(self):
                raise
            self.__enter__()
        except BaseException:
            self.residency.release(self)
            raise

    def __exit__(self, *exc_info: object) -> None:
        self.residency.release(self)

    def __del__(self) -> None:
        # Interrupted on the way out; or on the way in, perhaps before it was made.
        if getattr(self, "pinned", None) or getattr(self, "unsettled", None) or getattr(self, "counted", False):
            self.residency.release(self)


class DeviceHold(Hold):
    """Of weights on a device, which need not be there yet: what is begun inside waits for them, and not the host."""

    __slots__ = ()

    def __enter__(self) -> None:
        self.residency.refuse_capture()
        super().__enter__()
        try:
            for weight in self.weights:
                for arrival in weight.loaded.arrivals:
                    arrival.use()
        except BaseException:
            self.residency.release(self)
            raise


class UnpackingHold:
    """Keeps quantised weights decoded, and what they are decoded from in memory.

    Args:
        kept: of the parts, and of weights that are not quantised; as a plan says, they stay afterwards.
        unpacked: of the decoded weights, which leave.
    """

    __slots__ = ("_kept", "_unpacked")

    def __init__(self, kept: Hold, unpacked: Hold) -> None:
        self._kept, self._unpacked = kept, unpacked

    def __enter__(self) -> None:
        self._kept.__enter__()
        try:
            self._unpacked.__enter__()
        except BaseException:
            self._kept.__exit__()
            raise

    def __exit__(self, *exc_info: object) -> None:
        try:
            self._unpacked.__exit__()
        finally:
            self._kept.__exit__()
