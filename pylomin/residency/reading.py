"""How the weights of one model come into memory: what can be seen of files and memory, and the choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pylomin.io.files import Extent, WeightFile
from pylomin.io.modes import CACHED, Mode, choose_mode
from pylomin.io.placed import can_map
from pylomin.residency.memory_limits import memory_limits
from pylomin.residency.weight import Weight

MOST_LOOKED_AT = 256  # weights, spread over the model
SPARE_BYTES = 64 << 20  # 64 MiB; for what computing needs beside weights


@dataclass(frozen=True, slots=True)
class Reading:
    """How the weights of files come into memory."""

    mode: Mode = "buffered"
    drop_cache: bool = False  # after buffered reads
    is_cached: bool = False
    why: str = "nothing was read from a file yet."


def choose_reading(weights: Sequence[Weight], requested: Mode | None, *, kept_bytes: int) -> Reading:
    """The reading mode for ``weights``, of which ``kept_bytes`` may be in memory at one time."""
    looked_at = weights[:: -(-len(weights) // MOST_LOOKED_AT) or 1]
    by_file: dict[WeightFile, list[Extent]] = {}
    for weight in looked_at:
        if (stored := weight.source.stored) is not None and stored.extent.nbytes:
            by_file.setdefault(stored.file, []).append(stored.extent)
    if not by_file:
        return Reading(why="no weight lies in a file that can be read past its store.")
    stored_bytes = sum(w.source.layout.nbytes for w in weights if w.source.stored is not None)
    limits = memory_limits()
    limited = limits.limit_bytes is not None
    cached = _cached_fraction(by_file)
    choice = choose_mode(
        requested,
        cached_fraction=cached,
        streamed_bytes=stored_bytes,
        other_bytes=kept_bytes + SPARE_BYTES,
        available_bytes=limits.available_bytes,
        limit_bytes=limits.available_bytes if limited else None,
        direct_refused=next(iter(by_file)).direct_refused,
        aligned=all(can_map(extents) for extents in by_file.values()),
    )
    return Reading(choice.mode, choice.drop_cache, cached is not None and cached >= CACHED, choice.why)


def _cached_fraction(by_file: dict[WeightFile, list[Extent]]) -> float | None:
    cached_bytes = total_bytes = 0.0
    for file, extents in by_file.items():
        fraction = file.cached_fraction(extents)
        if fraction is None:
            return None
        nbytes = sum(extent.nbytes for extent in extents)
        cached_bytes += fraction * nbytes
        total_bytes += nbytes
    return cached_bytes / total_bytes
