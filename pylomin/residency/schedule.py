"""Which groups stay in memory while the others stream through a window: pure decisions.

On an order that repeats, a cache that evicts what was used longest ago hits nothing; a fixed set of residents hits its
share, and what streams is read ahead of its use, in order, round and round. Residents are those that save most reading
for their bytes; among equals they are spread over the order, so that there is always a computation to read behind.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import accumulate, chain, combinations, pairwise

from pylomin.residency.simulation import Costs, Group, StreamedCycle

TYPICAL_COSTS = Costs(bandwidth_bytes_per_s=2e9, latency_s=100e-6)
COMPUTE_FOR_READING = 0.5  # compute time for the time it takes to read what is used, where neither is known
KNOWN_GAIN = 1e-9  # part of the time; less is rounding
ASSUMED_GAIN = 0.03  # part of the time for which more is read, where it is but assumed
EQUAL_VALUE = 1.25  # ratio up to which groups save as much for their bytes as others
LARGEST_STEPS = 4  # sizes from which on groups are tried as residents for their size alone
FEW_GROUPS = 10  # every choice of residents is weighed
SHORT_USES = 64  # orders up to this are searched to the end
SEARCHED_USES = 1_000  # in longer orders nothing is simulated
SEARCH_STEPS = 60_000  # uses to simulate in others, before the best so far is taken


@dataclass(frozen=True, slots=True)
class Schedule:
    """What :func:`choose_residents` decided."""

    residents: frozenset[int]
    window_bytes: int  # all of the budget that residents do not take
    elapsed_s: float | None = None  # of one cycle, where its costs are known and it was simulated


def smallest_budget(order: Iterable[int], groups: Sequence[Group]) -> int:
    """With less, one group cannot be used at all."""
    return max((groups[index].need_bytes for index in set(order)), default=0)


def choose_residents(
    order: Sequence[int],
    groups: Sequence[Group],
    budget_bytes: int,
    *,
    compute_s: Sequence[float] | None = None,
    costs: Costs | None = None,
) -> Schedule | None:
    """The residents for an order of uses that repeats.

    The quickest of a family of candidates by simulation; all choices, where groups are few. The family does not depend
    on the budget, so that a larger one is never slower, where costs are known; in orders of more than ``SHORT_USES``
    but for what a search that is cut short may miss. In those of more than ``SEARCHED_USES``, the least reading that
    leaves room for two neighbours in the window.

    Args:
        order: the groups of one cycle in order of use, as indices into ``groups``.
        groups: sizes.
        budget_bytes: for residents and window together.
        compute_s: for each use of ``order``, the time it computes; default: assumed from what it reads.
        costs: what reading takes; default: that of an ordinary disk.

    Returns:
        None where the budget is below :func:`smallest_budget`.
    """
    if budget_bytes < smallest_budget(order, groups):
        return None
    costs_known = compute_s is not None and costs is not None
    costs = costs or TYPICAL_COSTS
    if compute_s is None:
        compute_s = [COMPUTE_FOR_READING * costs.read_s(groups[index]) for index in order]
    weighed = _Weighed(order, groups, costs)
    if weighed.bytes_of(weighed.used) <= budget_bytes:
        residents, elapsed_s = frozenset(weighed.used), float(sum(compute_s))
    elif len(order) > SEARCHED_USES:
        residents, elapsed_s, costs_known = _least_reading(weighed, budget_bytes), 0.0, False
    else:
        gain = KNOWN_GAIN if costs_known else ASSUMED_GAIN
        residents, elapsed_s = _quickest(weighed, budget_bytes, compute_s, gain)
    window_bytes = budget_bytes - weighed.bytes_of(residents)
    return Schedule(residents, window_bytes, elapsed_s if costs_known else None)


class _Weighed:
    """The used groups, and what each saves when resident."""

    def __init__(self, order: Sequence[int], groups: Sequence[Group], costs: Costs) -> None:
        self.order, self.groups, self.costs = order, groups, costs
        uses = Counter(order)
        self.used = list(uses)  # in order of first use
        self._saved_s = {index: count * costs.read_s(groups[index]) for index, count in uses.items()}
        self._value = {index: saved / max(groups[index].size_bytes, 1) for index, saved in self._saved_s.items()}
        self.by_value = sorted(self.used, key=self._value.__getitem__, reverse=True)
        self._bytes_by_value = list(accumulate(groups[index].size_bytes for index in self.by_value))
        self._saved_by_value = list(accumulate((self._saved_s[index] for index in self.by_value), initial=0.0))

    def bytes_of(self, indices: Iterable[int]) -> int:
        return sum(self.groups[index].size_bytes for index in indices)

    def read_s(self, residents: Set[int]) -> float:
        """Time that a cycle reads."""
        return sum(saved for index, saved in self._saved_s.items() if index not in residents)

    def least_read_s(self, resident_bytes: float) -> float:
        """No residents of so many bytes leave less to read (Dantzig's bound, 1957: the last one in part)."""
        whole = bisect_right(self._bytes_by_value, resident_bytes)
        left_s = self._saved_by_value[-1] - self._saved_by_value[whole]
        if whole == len(self.by_value):
            return left_s
        rest_bytes = resident_bytes - (self._bytes_by_value[whole - 1] if whole else 0)
        return left_s - rest_bytes * self._value[self.by_value[whole]]

    def smallest_window(self, residents: Set[int]) -> int:
        return max((self.groups[index].need_bytes for index in self.used if index not in residents), default=0)

    def window_for_two(self, residents: Set[int]) -> int:
        """Room for each streamed use and the next, which is read while it computes."""
        needs = [self.groups[index].need_bytes for index in self.order if index not in residents]
        if len(needs) < 2:
            return sum(needs)
        return max(map(sum, pairwise([needs[-1], *needs])))

    def classes(self, without: Set[int]) -> list[list[int]]:
        """Groups of about equal value together, the most valuable first; each class in order of first use."""
        classes: dict[float, list[int]] = {}
        for index in self.used:
            if index not in without:
                value = self._value[index]
                level = round(math.log(value, EQUAL_VALUE)) if value > 0 else -math.inf
                classes.setdefault(level, []).append(index)
        return [classes[level] for level in sorted(classes, reverse=True)]

    def spread(self, indices: Sequence[int], share: float) -> list[int]:
        """About ``share`` of the bytes of ``indices``, evenly over their order (Bresenham's error accumulation).

        Off by half of the largest group at most.
        """
        taken = []
        owed_bytes = 0.0
        for index in indices:
            size_bytes = self.groups[index].size_bytes
            owed_bytes += share * size_bytes
            if 2 * owed_bytes >= size_bytes * (1 - 1e-9):
                taken.append(index)
                owed_bytes -= size_bytes
        return taken


def _kept_for_size(weighed: _Weighed) -> Iterator[frozenset[int]]:
    """None, then more and more of the largest groups: a window for them would be too large for the others."""
    yield frozenset()
    by_need = sorted(weighed.used, key=lambda index: weighed.groups[index].need_bytes, reverse=True)
    needs = [weighed.groups[index].need_bytes for index in by_need]
    steps = [at for at, (larger, smaller) in enumerate(pairwise(needs), 1) if larger > EQUAL_VALUE * smaller]
    for at in steps[:LARGEST_STEPS]:
        yield frozenset(by_need[:at])


def _least_reading(weighed: _Weighed, budget_bytes: int) -> frozenset[int]:
    """Without simulation: fill the budget by value, but for the window."""
    found = []
    for kept in _kept_for_size(weighed):
        free_bytes = budget_bytes - weighed.bytes_of(kept)
        if free_bytes >= weighed.smallest_window(kept):
            window_bytes = min(weighed.window_for_two(kept), free_bytes)
            found.append(_top_up(weighed, _fill(weighed, kept, free_bytes - window_bytes), budget_bytes))
    return min(found, key=weighed.read_s)


def _fill(weighed: _Weighed, kept: frozenset[int], free_bytes: int) -> frozenset[int]:
    """Whole classes while they fit, and what fits of the next."""
    residents = set(kept)
    for equals in weighed.classes(without=kept):
        class_bytes = weighed.bytes_of(equals)
        if class_bytes > free_bytes:
            share = free_bytes / class_bytes
            while (excess_bytes := weighed.bytes_of(taken := weighed.spread(equals, share)) - free_bytes) > 0:
                share -= excess_bytes / class_bytes
            return frozenset(residents.union(taken))
        residents.update(equals)
        free_bytes -= class_bytes
    return frozenset(residents)


def _top_up(weighed: _Weighed, residents: frozenset[int], budget_bytes: int) -> frozenset[int]:
    """Whatever else fits beside a window for two, the most valuable first."""
    free_bytes = budget_bytes - weighed.bytes_of(residents) - weighed.window_for_two(residents)
    added = []
    for index in weighed.by_value:
        if index not in residents and weighed.groups[index].size_bytes <= free_bytes:
            added.append(index)
            free_bytes -= weighed.groups[index].size_bytes
    return residents.union(added)


Candidate = tuple[frozenset[int], float]
"""Residents, and a time that neither they nor the candidates after them read less than."""


def _quickest(
    weighed: _Weighed, budget_bytes: int, compute_s: Sequence[float], gain: float
) -> tuple[frozenset[int], float]:
    """The quickest candidate, and its time: branch and bound. One that comes later must be quicker by ``gain``."""
    best, best_s = frozenset[int](), math.inf
    compute_sum_s = sum(compute_s)
    most_steps = SEARCH_STEPS if len(weighed.order) > SHORT_USES else math.inf
    seen: set[frozenset[int]] = set()
    steps = 0
    for candidates in _families(weighed, budget_bytes):
        for residents, bound_s in candidates:
            if max(compute_sum_s, bound_s) >= best_s or steps > most_steps:
                break
            steps += len(weighed.used)
            window_bytes = budget_bytes - weighed.bytes_of(residents)
            if residents in seen or window_bytes < weighed.smallest_window(residents):
                continue
            seen.add(residents)
            if max(compute_sum_s, weighed.read_s(residents)) >= best_s:
                continue
            cycle = StreamedCycle(weighed.order, weighed.groups, residents, window_bytes, compute_s, weighed.costs)
            elapsed_s = cycle.run()
            steps += cycle.steps
            if elapsed_s < best_s * (1 - gain):
                best, best_s = residents, elapsed_s
    return best, best_s


def _families(weighed: _Weighed, budget_bytes: int) -> Iterator[Iterable[Candidate]]:
    """Candidates; which of them fit depends on the budget, but not what they are (in short orders)."""
    used = weighed.used
    if len(used) <= FEW_GROUPS:
        subsets = chain.from_iterable(combinations(used, count) for count in range(len(used) + 1))
        yield sorted(((residents, weighed.read_s(residents)) for residents in map(frozenset, subsets)), key=_bound)
        return
    if len(weighed.order) > SHORT_USES:
        yield [(_least_reading(weighed, budget_bytes), 0.0)]
    for kept in _kept_for_size(weighed):
        yield _shrinking(weighed, kept, weighed.classes(without=kept), budget_bytes)
        yield _shrinking(weighed, kept, [[index for index in used if index not in kept]], budget_bytes)


def _bound(candidate: Candidate) -> float:
    return candidate[1]


def _shrinking(
    weighed: _Weighed, kept: frozenset[int], classes: Sequence[Sequence[int]], budget_bytes: int
) -> Iterator[Candidate]:
    """What is kept, some classes, and a share of the next: from as much as fits down to nothing."""
    bases = list(accumulate(classes, lambda base, equals: base.union(equals), initial=kept))
    for base, equals in zip(reversed(bases[:-1]), reversed(classes), strict=True):
        base_bytes, class_bytes = weighed.bytes_of(base), weighed.bytes_of(equals)
        largest_bytes = max(weighed.groups[index].size_bytes for index in equals)
        parts = 2 * len(equals)
        room_bytes = budget_bytes - base_bytes + largest_bytes
        most = min(parts, room_bytes * parts // max(class_bytes, 1))
        for part in range(most, -1, -1):
            residents = base.union(weighed.spread(equals, part / parts))
            yield residents, weighed.least_read_s(base_bytes + class_bytes * part / parts + largest_bytes)
