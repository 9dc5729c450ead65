"""What a pass through a model did: in which order groups were used, how long each computed, and what reading took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from pylomin.residency.simulation import Costs
from pylomin.residency.trace import Key

UNKNOWN_COSTS = Costs(bandwidth_bytes_per_s=2e9)  # where nothing was read


@dataclass(slots=True)
class Recording:
    """Filled while it is recorded; see :meth:`Residency.start_recording`."""

    uses: list[tuple[Key, float, float]] = field(default_factory=list)  # group, time, stall so far
    reads: list[tuple[float, float, int]] = field(default_factory=list)  # begin, end, bytes

    def use(self, key: Key, stall_s: float) -> None:
        """``key`` is used now, and its bytes are there."""
        self.uses.append((key, time.perf_counter(), stall_s))

    def read(self, nbytes: int, read_s: float) -> None:
        """So many bytes (> 0) were read, until now."""
        now = time.perf_counter()
        self.reads.append((now - read_s, now, nbytes))

    def measured(self, stall_s: float) -> Measured:
        """What the uses so far took; the last one ends now, with this stall."""
        ends = [*self.uses[1:], (None, time.perf_counter(), stall_s)]
        compute_s = [
            max(0.0, (end - start) - (stalled_then - stalled))
            for (_, start, stalled), (_, end, stalled_then) in zip(self.uses, ends, strict=True)
        ]
        costs = Costs(self._bandwidth()) if self.reads else UNKNOWN_COSTS
        return Measured(tuple(key for key, _, _ in self.uses), compute_s, costs)

    def _bandwidth(self) -> float:
        """Of the time in which anything was read: two reads at one time share the disk."""
        busy_s, busy_until = 0.0, 0.0
        for begin, end, _ in sorted(self.reads):
            busy_s += max(0.0, end - max(begin, busy_until))
            busy_until = max(busy_until, end)
        return sum(nbytes for _, _, nbytes in self.reads) / max(busy_s, 1e-9)


@dataclass(frozen=True, slots=True)
class Measured:
    """One cycle of uses, and what it takes."""

    order: tuple[Key, ...]
    compute_s: Sequence[float]  # for each use
    costs: Costs
