"""Counters of one residency."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(slots=True)
class Stats:
    """What happened to the weights of a model so far. Sizes in bytes, times in seconds.

    ``hits`` are uses that found their weights in memory, ``loads`` uses that had to read them; ``prefetched`` counts
    background reads, each of which ends as a hit or in ``wasted``. ``stall_s`` is the time forwards waited for bytes,
    ``read_s`` the time that reads took, in the background or not.
    ``peak_bytes`` is the most that was in memory since the budget was last set.
    ``pinned_bytes`` is host memory that bytes pass through on their way to a device; all models on it share that.
    ``reading_mode`` is how bytes of files come into memory: ``"mapped"``, ``"buffered"`` or ``"direct"``, and
    ``reading_why`` says in a sentence what decided it.
    """

    loads: int = 0
    hits: int = 0
    prefetched: int = 0
    wasted: int = 0
    bytes_read: int = 0
    read_s: float = 0.0
    stall_s: float = 0.0
    resident_bytes: int = 0
    peak_bytes: int = 0
    memory_budget: int | None = None
    reading_mode: str = "buffered"
    reading_why: str = ""
    pinned_bytes: int = 0

    def __add__(self, other: Stats) -> Stats:
        budgets = [s.memory_budget for s in (self, other) if s.memory_budget is not None]
        modes = sorted({self.reading_mode, other.reading_mode})
        return replace(
            self,
            loads=self.loads + other.loads,
            hits=self.hits + other.hits,
            prefetched=self.prefetched + other.prefetched,
            wasted=self.wasted + other.wasted,
            bytes_read=self.bytes_read + other.bytes_read,
            read_s=self.read_s + other.read_s,
            stall_s=self.stall_s + other.stall_s,
            resident_bytes=self.resident_bytes + other.resident_bytes,
            peak_bytes=self.peak_bytes + other.peak_bytes,
            pinned_bytes=max(self.pinned_bytes, other.pinned_bytes),
            memory_budget=sum(budgets) if budgets else None,
            reading_mode="+".join(modes),
            reading_why=" ".join(sorted({self.reading_why, other.reading_why} - {""})),
        )
