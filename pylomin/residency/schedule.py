"""Which groups stay in memory while the others stream through a window: pure decisions.

On an order that repeats, a cache that evicts what was used longest ago hits nothing; a fixed set of residents hits its
share, and what streams is read ahead of its use, in order, round and round. Residents are those that save most reading
for their bytes; among equals they are spread over the order, so that there is always a computation to read behind.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import chain, combinations, pairwise

from pylomin.residency.simulation import Costs, Group, StreamedCycle

FEW_GROUPS = 10  # every choice of residents is weighed
SIMULATED_USES = 1_000  # in longer orders nothing is simulated
SIMULATION_STEPS = 60_000  # uses to simulate before the best so far is taken
CLASS_WIDTH = 1.25  # groups whose savings for their bytes differ by less are equals
LARGEST_STEPS = 4  # sizes from which on groups are tried as residents for their size alone
TYPICAL_COSTS = Costs(bandwidth_bytes_per_s=2e9, latency_s=100e-6)


@dataclass(frozen=True, slots=True)
class Schedule:
    """What :func:`choose_residents` decided."""

    residents: frozenset[int]
    window_bytes: int  # all of the budget that residents do not take
    elapsed_s: float | None = None  # of one cycle, where it was simulated


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

    With ``compute_s`` (for each use) and ``costs``, the quickest of a family of candidates by simulation. The family
    does not depend on the budget, so that a larger one is never slower. Without them, or in a long order, the
    least reading that leaves room for two neighbours in the window.

    Returns:
        None where the budget is below :func:`smallest_budget`.
    """
    if budget_bytes < smallest_budget(order, groups):
        return None
    weighed = _Weighed(order, groups, costs or TYPICAL_COSTS)
    total_bytes = sum(groups[index].size_bytes for index in weighed.used)
    if total_bytes <= budget_bytes:
        elapsed_s = None if compute_s is None else float(sum(compute_s))
        return Schedule(frozenset(weighed.used), budget_bytes - total_bytes, elapsed_s)
    if compute_s is None or costs is None or len(order) > SIMULATED_USES:
        residents = _least_reading(weighed, budget_bytes)
        return Schedule(residents, budget_bytes - weighed.bytes_of(residents))
    return _quickest(weighed, budget_bytes, compute_s)


class _Weighed:
    """The used groups, and what each saves when resident."""

    def __init__(self, order: Sequence[int], groups: Sequence[Group], costs: Costs) -> None:
        self.order, self.groups, self.costs = order, groups, costs
        uses = Counter(order)
        self.used = list(uses)  # in order of first use
        self.saved_s = {index: count * costs.read_s(groups[index]) for index, count in uses.items()}
        self.value = {index: saved / max(groups[index].size_bytes, 1) for index, saved in self.saved_s.items()}
        self.by_value = sorted(self.used, key=self.value.__getitem__, reverse=True)

    def bytes_of(self, indices: Iterable[int]) -> int:
        return sum(self.groups[index].size_bytes for index in indices)

    def smallest_window(self, residents: Set[int]) -> int:
        return max((self.groups[index].need_bytes for index in self.used if index not in residents), default=0)

    def spread(self, indices: Sequence[int], share: float) -> list[int]:
        """About ``share`` of the bytes of ``indices``, evenly over their order (Bresenham's error accumulation)."""
        taken = []
        owed = 0.0
        for index in indices:
            size = self.groups[index].size_bytes
            owed += share * size
            if 2 * owed >= size * (1 - 1e-9):
                taken.append(index)
                owed -= size
        return taken

    def classes(self, without: Set[int]) -> list[list[int]]:
        """Groups of about equal value together, the most valuable first; each class in order of first use."""
        classes: dict[int, list[int]] = {}
        for index in self.used:
            if index in without:
                continue
            value = self.value[index]
            level = round(math.log(value, CLASS_WIDTH)) if value > 0 else -(1 << 30)
            classes.setdefault(level, []).append(index)
        return [classes[level] for level in sorted(classes, reverse=True)]

    def read_s(self, residents: Set[int]) -> float:
        return sum(saved for index, saved in self.saved_s.items() if index not in residents)

    def window_for_two(self, residents: Set[int]) -> int:
        """Room for each streamed group and the one that is read while it computes."""
        needs = [self.groups[index].need_bytes for index in self.order if index not in residents]
        if len(needs) < 2:
            return sum(needs)
        return max(map(sum, pairwise([needs[-1], *needs])))


def _least_reading(weighed: _Weighed, budget_bytes: int) -> frozenset[int]:
    """The candidate that reads least, topped up with whatever else fits beside a window for two."""
    best: frozenset[int] = frozenset()
    best_s = math.inf
    for kept in _largest_kept(weighed):
        free_bytes = budget_bytes - weighed.bytes_of(kept)
        window_bytes = weighed.window_for_two(kept)
        for window in (window_bytes, weighed.smallest_window(kept)) if free_bytes < window_bytes else (window_bytes,):
            if free_bytes < window:
                continue
            residents = _fill(weighed, kept, free_bytes - window)
            residents = _top_up(weighed, residents, budget_bytes)
            read_s = weighed.read_s(residents)
            if read_s < best_s:
                best, best_s = residents, read_s
    return best


def _fill(weighed: _Weighed, kept: frozenset[int], free_bytes: int) -> frozenset[int]:
    residents = set(kept)
    for equals in weighed.classes(without=kept):
        class_bytes = weighed.bytes_of(equals)
        if class_bytes <= free_bytes:
            residents.update(equals)
            free_bytes -= class_bytes
            continue
        share = free_bytes / class_bytes
        while (taken_bytes := weighed.bytes_of(taken := weighed.spread(equals, share))) > free_bytes:
            share -= max(taken_bytes - free_bytes, 1) / class_bytes
        residents.update(taken)
        break
    return frozenset(residents)


def _top_up(weighed: _Weighed, residents: frozenset[int], budget_bytes: int) -> frozenset[int]:
    window_bytes = min(weighed.window_for_two(residents), budget_bytes - weighed.bytes_of(residents))
    free_bytes = budget_bytes - weighed.bytes_of(residents) - window_bytes
    added = []
    for index in weighed.by_value:
        if index not in residents and weighed.groups[index].size_bytes <= free_bytes:
            added.append(index)
            free_bytes -= weighed.groups[index].size_bytes
    return residents.union(added)


def _largest_kept(weighed: _Weighed) -> Iterator[frozenset[int]]:
    """Nothing, then more and more of the largest groups, which would need a large window for their one use."""
    yield frozenset()
    by_need = sorted(weighed.used, key=lambda index: weighed.groups[index].need_bytes, reverse=True)
    steps = 0
    for at, (larger, smaller) in enumerate(pairwise(by_need), start=1):
        if weighed.groups[larger].need_bytes > CLASS_WIDTH * weighed.groups[smaller].need_bytes:
            yield frozenset(by_need[:at])
            steps += 1
            if steps == LARGEST_STEPS:
                return


def _quickest(weighed: _Weighed, budget_bytes: int, compute_s: Sequence[float]) -> Schedule:
    """The quickest candidate; of equally quick ones that which reads least."""
    best: Schedule | None = None
    best_s = math.inf
    steps = 0
    total_compute_s = sum(compute_s)
    for residents in _candidates(weighed, budget_bytes):
        window_bytes = budget_bytes - weighed.bytes_of(residents)
        if window_bytes < weighed.smallest_window(residents):
            continue
        if max(total_compute_s, weighed.read_s(residents)) >= best_s:
            continue
        cycle = StreamedCycle(weighed.order, weighed.groups, residents, window_bytes, compute_s, weighed.costs)
        elapsed_s = cycle.run()
        steps += cycle.steps
        if elapsed_s < best_s * (1 - 1e-9):
            best, best_s = Schedule(residents, window_bytes, elapsed_s), elapsed_s
        if steps > SIMULATION_STEPS:
            break
    assert best is not None
    return best


def _candidates(weighed: _Weighed, budget_bytes: int) -> Iterable[frozenset[int]]:
    """Sets of residents; those that may fit do not depend on the budget. Roughly by what they read, least first."""
    if len(weighed.used) <= FEW_GROUPS:
        subsets = chain.from_iterable(combinations(weighed.used, size) for size in range(len(weighed.used) + 1))
        return sorted(map(frozenset, subsets), key=weighed.read_s)
    found: dict[frozenset[int], float] = {}
    for kept in _largest_kept(weighed):
        for classes in (weighed.classes(without=kept), [[i for i in weighed.used if i not in kept]]):
            below = set(kept)
            for equals in classes:
                class_bytes = weighed.bytes_of(equals)
                free = budget_bytes - weighed.bytes_of(below)
                for k in range(len(equals) * 2):
                    if class_bytes * (k - 4) > len(equals) * 2 * free:
                        break
                    r = frozenset(below.union(weighed.spread(equals, k / len(equals) / 2)))
                    if r not in found:
                        found[r] = weighed.read_s(r)
                below.update(equals)
    return sorted(found, key=found.__getitem__)
