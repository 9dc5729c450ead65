"""Memory of other kinds that blocks of a pool can be made of: that of a device."""

from __future__ import annotations

from typing import Any, Protocol


class Space(Protocol):
    """Where blocks lie that are no ordinary pages. Called under the lock of the pool."""

    @property
    def alignment_bytes(self) -> int:
        """Of the start of every block."""
        ...

    def allocate(self, nbytes: int) -> Any:
        """Memory that lives as long as what is returned. Raises torch.cuda.OutOfMemoryError."""
        ...

    def hand_out(self, memory: Any, offset_bytes: int, nbytes: int) -> Any:
        """An object that can be weakly referred to: these bytes are in use as long as it lives.

        It has an attribute ``uses``, for :meth:`take_back`.
        """
        ...

    def take_back(self, memory: Any, offset_bytes: int, nbytes: int, uses: Any) -> None:
        """Nobody can begin to use these bytes any more. What was begun may not have ended."""
        ...
