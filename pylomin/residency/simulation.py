"""How long a cycle of uses takes when some groups stay in memory and the others stream through a window.

The runtime in a few rules. Compute takes the uses in order; it waits for the bytes of a streamed group, and gives
their memory back when it is done with them. One reader reads the streamed uses one after the other, from the last of a
cycle on to the first of the next, each as soon as it fits into the window beside those that are not yet given back.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from operator import sub

MAX_CYCLES = 64  # simulated before the mean of the last half is taken for what does not settle


@dataclass(frozen=True, slots=True)
class Group:
    """What is loaded together.

    Args:
        size_bytes: memory when resident; what is read when streamed.
        streamed_bytes: memory when streamed, where the group is computed tile by tile; default: all of it.
    """

    size_bytes: int
    streamed_bytes: int | None = None

    @property
    def need_bytes(self) -> int:
        """Memory when streamed."""
        if self.streamed_bytes is None or self.streamed_bytes > self.size_bytes:
            return self.size_bytes
        return self.streamed_bytes


@dataclass(frozen=True, slots=True)
class Costs:
    """What reading takes: ``latency_s`` for each read, and the bytes at a bandwidth."""

    bandwidth_bytes_per_s: float
    latency_s: float = 0.0

    def read_s(self, group: Group) -> float:
        """Time to read one group, tile by tile where it streams so."""
        reads = -(-group.size_bytes // max(group.need_bytes, 1)) or 1
        return reads * self.latency_s + group.size_bytes / self.bandwidth_bytes_per_s


@dataclass(frozen=True, slots=True)
class Simulation:
    """One cycle in the steady state."""

    elapsed_s: float
    stall_s: float  # of elapsed_s, the part in which compute waits for bytes
    read_bytes: int
    peak_bytes: int  # resident, read or being read at one time


def simulate(
    order: Sequence[int],
    groups: Sequence[Group],
    residents: Set[int],
    window_bytes: int,
    compute_s: Sequence[float],
    costs: Costs,
) -> Simulation:
    """Repeat ``order`` until every cycle is like the one before.

    Args:
        order: the groups of one cycle in order of use, as indices into ``groups``.
        groups: sizes.
        residents: groups that are in memory all the time.
        window_bytes: memory for the others; holds each of them.
        compute_s: for each use of ``order``, the time it computes.
        costs: what reading takes.

    A streamed group that is computed tile by tile begins when one window's worth of it is there, and the rest is read
    while it computes.
    """
    cycle = StreamedCycle(order, groups, residents, window_bytes, compute_s, costs)
    elapsed_s = cycle.run()
    return Simulation(
        elapsed_s,
        max(0.0, elapsed_s - sum(compute_s)),
        sum(groups[index].size_bytes for index in order if index not in residents),
        sum(groups[index].size_bytes for index in residents) + cycle.peak_bytes(),
    )


def lower_bound(
    order: Sequence[int],
    groups: Sequence[Group],
    residents: Set[int],
    compute_s: Sequence[float],
    costs: Costs,
) -> float:
    """No cycle is quicker: ``max(compute, reading)``, as if they overlapped all the way."""
    read_s = sum(costs.read_s(groups[index]) for index in order if index not in residents)
    return max(sum(compute_s), read_s)


@dataclass(slots=True)
class _Use:
    """A streamed use."""

    need_bytes: int
    head_s: float  # reading before it can compute
    tail_s: float  # reading while it computes, of a tiled group
    gap_s: float  # compute of the resident groups before it
    compute_s: float
    last_tile_s: float  # compute that remains when all is read, of a tiled group
    waits_for: int = 0  # the latest use that must be over before this one fits; own index: that of the cycle before


class StreamedCycle:
    """One cycle of streamed uses; what ``simulate`` and the search for a schedule share."""

    def __init__(
        self,
        order: Sequence[int],
        groups: Sequence[Group],
        residents: Set[int],
        window_bytes: int,
        compute_s: Sequence[float],
        costs: Costs,
    ) -> None:
        self.steps = 0  # uses simulated
        self._uses: list[_Use] = []
        gap_s = 0.0
        for index, use_s in zip(order, compute_s, strict=True):
            if index in residents:
                gap_s += use_s
                continue
            group = groups[index]
            need_bytes, read_s = group.need_bytes, costs.read_s(group)
            share = need_bytes / group.size_bytes if need_bytes < group.size_bytes else 1.0
            tail_s = read_s * (1.0 - share)
            self._uses.append(_Use(need_bytes, read_s - tail_s, tail_s, gap_s, use_s, use_s * share if tail_s else 0.0))
            gap_s = 0.0
        self._rest_s = gap_s  # compute of the resident groups after the last streamed use
        self._fit(window_bytes)
        self._over = [0.0] * len(self._uses)  # when each use was over, the last time
        self._started = [0.0] * len(self._uses)  # when its read began
        self._elapsed_s = 0.0

    def _fit(self, window_bytes: int) -> None:
        uses, count = self._uses, len(self._uses)
        oldest = held_bytes = 0
        for at in range(2 * count):
            held_bytes += uses[at % count].need_bytes
            while held_bytes > window_bytes or at - oldest >= count:
                held_bytes -= uses[oldest % count].need_bytes
                oldest += 1
            if oldest > at:
                raise ValueError(f"A window of {window_bytes} bytes does not hold {uses[at % count].need_bytes}.")
            uses[at % count].waits_for = (oldest - 1) % count

    def run(self) -> float:
        """Seconds per cycle in the steady state. Times are max-plus linear: what repeats once repeats for ever."""
        if not self._uses:
            return self._rest_s
        over, started = self._over, self._started
        reader_free = compute_free = 0.0
        ends: list[float] = []
        for _ in range(MAX_CYCLES):
            before = [*over, reader_free, compute_free]
            for at, use in enumerate(self._uses):
                begin = over[use.waits_for]
                if begin < reader_free:
                    begin = reader_free
                started[at] = begin
                reader_free = begin + use.head_s
                compute_free += use.gap_s
                if compute_free < reader_free:
                    compute_free = reader_free
                if use.tail_s:
                    reader_free = compute_free + use.tail_s
                    compute_free = max(compute_free + use.compute_s, reader_free + use.last_tile_s)
                else:
                    compute_free += use.compute_s
                over[at] = compute_free
            compute_free += self._rest_s
            ends.append(compute_free)
            passed = list(map(sub, [*over, reader_free, compute_free], before))
            self._elapsed_s = max(passed)
            if self._elapsed_s - min(passed) <= 1e-9 * self._elapsed_s:
                break
        else:
            half = MAX_CYCLES // 2
            self._elapsed_s = (ends[-1] - ends[-1 - half]) / half
        self.steps = len(over) * len(ends)
        return self._elapsed_s

    def peak_bytes(self) -> int:
        """The most that is read or being read at one time, in the last cycle that was run."""
        uses, count = self._uses, len(self._uses)
        over = [time - self._elapsed_s for time in self._over] + self._over
        peak_bytes = held_bytes = oldest = 0
        for at in range(2 * count):
            use = uses[at % count]
            started = self._started[at % count] - (self._elapsed_s if at < count else 0.0)
            waits_for = at - ((at - use.waits_for) % count or count)
            while oldest <= waits_for or (oldest < at and over[oldest] <= started):
                held_bytes -= uses[oldest % count].need_bytes
                oldest += 1
            held_bytes += use.need_bytes
            if at >= count:
                peak_bytes = max(peak_bytes, held_bytes)
        return peak_bytes
