"""What a pass through a model did: in which order groups were used, how long each computed, and what reading took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from pylomin.residency.simulation import Costs
from pylomin.residency.stats import Stats
from pylomin.residency.trace import Key

UNKNOWN_COSTS = Costs(bandwidth_bytes_per_s=2e9)  # where nothing was read


@dataclass(slots=True)
class Recording:
    """Filled while it is recorded; see :meth:`Residency.start_recording`."""

    before: Stats
    uses: list[tuple[Key, float, float]] = field(default_factory=list)  # group, time, stall so far

    def use(self, key: Key, stall_s: float) -> None:
        """``key`` is used now, and its bytes are there."""
        self.uses.append((key, time.perf_counter(), stall_s))

    def measured(self, after: Stats) -> Measured:
        """What the uses so far took; the last one ends now."""
        ends = [*self.uses[1:], (None, time.perf_counter(), after.stall_s)]
        compute_s = [
            max(0.0, (end - start) - (stalled_then - stalled))
            for (_, start, stalled), (_, end, stalled_then) in zip(self.uses, ends, strict=True)
        ]
        read_bytes, read_s = after.bytes_read - self.before.bytes_read, after.read_s - self.before.read_s
        costs = Costs(read_bytes / read_s) if read_bytes and read_s > 0 else UNKNOWN_COSTS
        return Measured(tuple(key for key, _, _ in self.uses), compute_s, costs)


@dataclass(frozen=True, slots=True)
class Measured:
    """One cycle of uses, and what it takes."""

    order: tuple[Key, ...]
    compute_s: Sequence[float]  # for each use
    costs: Costs
